"""Duplicate images: planted ones are found, different images are not, and duplicates stay in one fold."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import config
from PIL import Image

from comp.engine.data import duplicates, folds, make_folds, phash, prepare, samples
from comp.engine.errors import UserError
from comp.engine.readers import decode


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def copied(pixels: np.ndarray, number: int) -> bytes:
    """As people make copies without noticing: other encoding, other size, 5 % brighter, 3 % cut off."""
    side, turn = pixels.shape[0], number // 4
    match number % 4:
        case 0:
            return encoded(pixels, "JPEG", quality=(60, 75, 90)[turn % 3])
        case 1:
            other = round(side * (0.5, 0.75, 1.5, 2)[turn % 4])
            return encoded(
                np.asarray(Image.fromarray(pixels).resize((other, other), Image.Resampling.BICUBIC))
            )
        case 2:
            return encoded(np.clip(np.rint(pixels * 1.05), 0, 255).astype(np.uint8))
    cropped = round(0.97 * side)
    top, left = turn % (side - cropped + 1), turn // 2 % (side - cropped + 1)
    return encoded(pixels[top : top + cropped, left : left + cropped])


def planted(practice: Path, images: int, copies: int) -> tuple[float, float]:
    """(share of the copies that is found, share of all other pairs that is listed)."""
    files = sorted((practice / "data" / "raw" / "train").glob("*.png"))[:images]
    chosen = np.random.default_rng(0).permutation(len(files))[:copies].tolist()
    data = [file.read_bytes() for file in files]
    data += [copied(np.asarray(Image.open(files[at])), number) for number, at in enumerate(chosen)]
    grey = [decode.decode(each, phash.SIDE, "stretch", 1, "")[:, :, 0] for each in data]
    pairs, _, _ = phash.find_duplicates(np.stack(grey).astype(np.float32))
    listed = set(map(tuple, pairs.tolist()))
    wanted = {(at, len(files) + number) for number, at in enumerate(chosen)}
    others = len(data) * (len(data) - 1) / 2 - len(wanted)
    return len(wanted & listed) / len(wanted), len(listed - wanted) / others


def test_planted_copies_are_found(practice: Path) -> None:
    found, others = planted(practice, 300, 40)
    assert found >= 0.95 and others <= 0.001


@pytest.mark.slow
def test_200_planted_copies_among_all_practice_images(practice: Path) -> None:
    found, others = planted(practice, 10_000, 200)
    print(f"{found:.3f} of the copies found, {100 * others:.4f} % of the other pairs listed")
    assert found >= 0.95 and others <= 0.001


def test_every_pair_of_near_hashes_and_no_other() -> None:
    random = np.random.default_rng(1)
    hashed = random.integers(0, 2**63, 400, dtype=np.uint64)
    for at in range(200):  # up to 13 bits from the first half, so on both sides of the limit
        flips = sum(1 << int(bit) for bit in random.permutation(64)[: at % 14])
        hashed[200 + at] = hashed[at] ^ np.uint64(flips)
    one, other = np.triu_indices(400, 1)
    near_enough = np.bitwise_count(hashed[one] ^ hashed[other]) <= phash.FAR
    wanted = set(zip(one[near_enough].tolist(), other[near_enough].tolist(), strict=True))
    assert {tuple(pair) for pair in phash.similar_pairs(hashed).tolist()} == wanted
    assert len(wanted) > 150


def test_images_of_one_colour_are_no_duplicates() -> None:
    flat = np.full((5, phash.SIDE, phash.SIDE), 7, np.float32)
    assert not len(phash.find_duplicates(flat)[0])


def test_similar_digits_are_no_duplicates(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1,797 handwritten digits, none of them twice: groups are not recommended for what chance gives."""
    duplicates.report(config(experiment="base"), samples.load())
    printed = capsys.readouterr().out
    assert "1797 images: 0 pairs of duplicates" in printed and "duplicates: group" not in printed


def test_as_many_pairs_as_by_chance_are_left_out(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phash, "MOST", 0.97)
    duplicates.report(config(experiment="base"), samples.load())
    printed = capsys.readouterr().out
    assert "more pairs reach the threshold" in printed and "only equal bytes count" in printed
    assert "0 pairs of duplicates" in printed and "duplicates: group" not in printed


def with_copies(project: Path) -> None:
    """The first 150 digits. The last ten test rows, and ten new rows of other writers, copy training rows."""
    raw = project / "data" / "raw"
    train, test = (pd.read_csv(raw / f"{kind}.csv", dtype=str) for kind in ("train", "test"))
    sample = pd.read_csv(raw / "sample_submission.csv", dtype=str)
    train = train.groupby("writer").head(12)
    more = train.iloc[:10].assign(id=[f"copy{i}" for i in range(10)], writer=[f"else{i}" for i in range(10)])
    for number, (id_, copy) in enumerate(zip(train["id"], more["id"], strict=False)):
        pixels = np.asarray(Image.open(raw / "train" / f"{id_}.png"))
        (raw / "train" / f"{copy}.png").write_bytes(copied(pixels, number))
    for old, new in zip(train["id"].iloc[20:30], test["id"], strict=False):
        shutil.copy(raw / "train" / f"{old}.png", raw / "test" / f"{new}.png")
    pd.concat([train, more]).to_csv(raw / "train.csv", index=False)
    test.head(30).to_csv(raw / "test.csv", index=False)
    sample.head(30).to_csv(raw / "sample_submission.csv", index=False)
    (project / "data" / "folds.parquet").unlink()
    (project / "data" / "manifest.json").unlink()
    prepare.prepare(config(experiment="base"))


def test_duplicates_are_listed_drawn_and_grouped(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_copies(project)
    rows = samples.load()
    file = make_folds.make(config(experiment="base"), rows)
    duplicates.report(config(experiment="base"), rows)
    printed = capsys.readouterr().out
    listed = pd.read_csv(project / "data" / "duplicates.csv", dtype=str)
    assert (listed.head(10)[["source_a", "source_b"]].to_numpy() == ["train", "test"]).all()
    assert "train and test: 10 pairs" in printed and "10 of them the same bytes" in printed
    assert len(set(listed["id_b"]) & {f"copy{i}" for i in range(10)}) >= 9  # a crop may be missed
    assert "next: folds.duplicates: group" in printed
    assert Image.open(project / "data" / "duplicates.png").width > 800
    yaml = project / "configs" / "competition.yaml"
    yaml.write_text(yaml.read_text().replace("k: 5, seed: 0", "k: 5, seed: 0, duplicates: group"))
    with pytest.raises(UserError) as differ:
        make_folds.make(config(experiment="base"), rows)
    assert (differ.value.code, differ.value.key) == ("folds-differ", "folds.duplicates")
    assert differ.value.what == "made with ignore, now group"
    make_folds.make(config(experiment="base"), rows, remake=True)
    of = folds.load(rows, file).assignment[0]
    pairs = duplicates.find(config(experiment="base"), rows).pairs
    of_train = pairs[(rows.frame["source"].to_numpy()[pairs] == "train").all(axis=1)]
    assert len(of_train) >= 9 and (of[of_train[:, 0]] == of[of_train[:, 1]]).all()
    writers = rows.frame[["group"]].assign(fold=of)[rows.frame["source"] == "train"]
    assert (writers.groupby("group")["fold"].nunique() == 1).all()


@pytest.mark.parametrize("scheme", ["kfold", "stratified"])
def test_copies_without_a_group_column(project: Path, scheme: str) -> None:
    rows = samples.load()
    plan = config(experiment="base").competition.folds.model_copy(
        update={"scheme": scheme, "duplicates": "group"}
    )
    ours = rows.positions("train")
    pairs = np.column_stack([ours[:40], ours[40:80]])
    frame = make_folds.assign(
        samples.Samples(rows.frame.drop(columns="group"), rows.heads, rows.hash), plan, pairs
    )
    of = dict(zip(frame["id"], frame["fold"], strict=True))
    ids = rows.frame["id"].to_numpy()
    assert all(of[ids[a]] == of[ids[b]] for a, b in pairs)
    sizes = np.bincount(frame["fold"].to_numpy())
    assert sizes.max() - sizes.min() <= 3


def test_a_group_has_its_smallest_name() -> None:
    names = np.array(["b", "a", "c", "d", "c"])
    assert duplicates.group_names(names, [(0, 1), (1, 2)]).tolist() == ["a", "a", "a", "d", "a"]
    assert duplicates.group_names(names, []).tolist() == names.tolist()
