"""The audit of folds and comp folds: contents, faults that make scores invalid, and that folds are frozen."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import config
from test_folds import made, table

from comp.engine import cli
from comp.engine.data import fold_audit, fold_schemes, folds, make_folds, prepare, samples
from comp.engine.data.folds import HOLDOUT, TRAIN_ONLY, Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

# --- audit --------------------------------------------------------------------------------------------------


def altered(found: Folds, rows: Any, fold: int) -> Folds:
    frame = found.frame.copy()
    frame.loc[rows, "fold"] = fold
    return Folds(frame, found.meta, found.samples)


def faults(folds_: Folds) -> list[UserError]:
    return fold_audit.errors(fold_audit.audit(folds_.samples, folds_))


def test_the_audit_counts() -> None:
    found = made(table(), "stratified_group", holdout=0.1)
    report = fold_audit.audit(found.samples, found)
    assert sum(line["valid_rows"] for line in report["folds"]) + report["holdout_rows"] == 600
    for line in report["folds"]:
        train_rows, valid_rows = found.split(line["fold"])
        assert (line["valid_rows"], line["train_rows"]) == (len(valid_rows), len(train_rows))
        assert line["groups"] == found.samples.frame["group"].iloc[valid_rows].nunique()
        there = np.bincount(found.samples.frame["target.y"].iloc[valid_rows].to_numpy(np.int64), minlength=4)
        shares = line["targets"]["y"]
        assert list(shares["shares"].values()) == (there / there.sum()).tolist()
        assert shares["rarest"] == "abcd"[there.argmin()] and shares["rarest_rows"] == there.min()
    text = fold_audit.table(report).splitlines()
    assert text[0].split() == ["fold", "valid", "train", "groups", "a", "b", "c", "d", "rarest"]
    assert len(text) == 7 and f"{report['holdout_rows']} rows are the locked hold-out" in text[6]


def test_the_audit_of_numbers() -> None:
    found = made(table(task="regression"), "quantiles")
    first = fold_audit.audit(found.samples, found)["folds"][0]
    values = found.samples.frame["target.y"].to_numpy()[found.split(0)[1]]
    assert first["targets"]["y"] == {
        "mean": values.mean(),
        "std": values.std(),
        "min": values.min(),
        "max": values.max(),
    }


def test_a_group_in_two_folds_is_a_fault() -> None:
    found = made(table(), "stratified_group")
    group = found.samples.frame["group"]
    name = group.value_counts().index[0]
    rows = group.index[group == name]
    here = int(found.assignment[0, rows[0]])
    low, high = sorted((here, (here + 1) % 5))
    for fold, where in (
        ((here + 1) % 5, f"fold {low} and fold {high}"),
        (HOLDOUT, f"the hold-out and fold {here}"),
        (TRAIN_ONLY, f"the train-only rows and fold {here}"),
    ):
        (fault,) = faults(altered(found, rows[0], fold))
        assert (fault.code, fault.where) == ("group-across-folds", f"group {name!r}")
        assert fault.what == f"is in {where}"
    blind = made(table(), "stratified")
    report = fold_audit.audit(blind.samples, blind)
    assert report["faults"] == [] and report["notes"][0].startswith("folds.blind_to_groups: 5")


def test_an_empty_fold_is_a_fault() -> None:
    found = made(table(), "stratified")
    few = table(600, group=[f"g{i % 3}" for i in range(600)])
    for folds_ in (altered(found, found.assignment[0] == 3, 2), made(few, "group")):
        assert ("fold-empty", "fold 3") in [(fault.code, fault.where) for fault in faults(folds_)]


def test_a_class_that_could_be_everywhere_and_is_not_is_a_fault() -> None:
    one = table()
    rare = np.zeros(600)
    rare[:5] = 3
    found = made(Samples(one.frame.assign(**{"target.y": rare}), one.heads, "hash"), "kfold")
    found = altered(found, slice(0, 4), 0)
    (fault,) = faults(altered(found, 4, 1))
    assert (fault.code, fault.where, fault.key) == ("class-missing", "fold 2, 3, 4", "y")
    assert "class 'd' has 5 rows" in fault.what and fault.remedy == "use folds.scheme: stratified"
    rare[4] = 0  # four rows cannot be in five folds
    found = made(Samples(one.frame.assign(**{"target.y": rare}), one.heads, "hash"), "kfold")
    assert faults(altered(found, slice(0, 4), 0)) == []


def test_with_groups_a_class_needs_as_many_groups_as_folds() -> None:
    target = np.zeros(600)
    group = np.array([f"g{i % 60}" for i in range(600)], object)
    target[np.isin(group, ["g0", "g1", "g2", "g3"])] = 1  # 40 rows, but four groups
    one = table(600, group=group, target=target)
    assert faults(made(one, "stratified_group")) == []
    target[group == "g4"] = 1
    one = table(600, group=group, target=target)
    found = made(one, "stratified_group")
    assert faults(found) == [], "five groups, one in each fold"
    there = found.assignment[0]
    moved = altered(found, np.isin(there, [there[0]]) & (target == 1), int((there[0] + 1) % 5))
    assert any(fault.code == "class-missing" and "'b' has 5 groups" in fault.what for fault in faults(moved))


# --- comp folds ---------------------------------------------------------------------------------------------


def again(remake: bool = False) -> Folds:
    make_folds.make(config(experiment="base"), samples.load(), remake)
    return folds.load(samples.load())


def test_folds_are_written_with_their_audit(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = folds.load(samples.load())
    assert {k: found.meta[k] for k in ("scheme", "k", "repeats", "seed", "rule", "gap")} == {
        "scheme": "stratified_group", "k": 5, "repeats": 1, "seed": 0, "rule": "others", "gap": 0,
    }  # fmt: skip
    written = artifacts.read_json(project / "data" / "folds_audit.json")
    assert written == fold_audit.audit(found.samples, found) and written["faults"] == []
    before = paths.folds_file().read_bytes()
    again()
    printed = capsys.readouterr().out
    assert (
        "unchanged" in printed
        and fold_audit.table(written) in printed
        and printed.splitlines()[-1].startswith("next: comp train")
    )
    assert fold_audit.table(written) + "\n" == (project / "data" / "folds_audit.txt").read_text()
    again(remake=True)
    assert paths.folds_file().read_bytes() == before
    paths.folds_file().unlink()
    again()
    assert paths.folds_file().read_bytes() == before


def test_other_settings_are_refused_by_name(project: Path) -> None:
    before = paths.folds_file().read_bytes()
    file = project / "configs" / "competition.yaml"
    file.write_text(file.read_text().replace("k: 5, seed: 0", "k: 4, seed: 1"))
    with pytest.raises(UserError) as refused:
        again()
    assert [(error.code, error.where, error.key, error.what) for error in refused.value.errors] == [
        ("folds-differ", "data/folds.parquet", "folds.k", "made with 5, now 4"),
        ("folds-differ", "data/folds.parquet", "folds.seed", "made with 0, now 1"),
    ]
    assert "comp folds --remake" in refused.value.lines[-1]
    assert paths.folds_file().read_bytes() == before
    assert again(remake=True).meta["k"] == 4


def test_other_samples_are_refused_by_name(project: Path) -> None:
    one = samples.load()
    samples.save(one.frame.iloc[3:].reset_index(drop=True), one.heads)
    with pytest.raises(UserError, match="0 rows are new and 3 are gone"):
        again()
    assert len(again(remake=True).frame) == 1434


def test_folds_that_fail_their_audit_are_not_written(project: Path) -> None:
    file = project / "configs" / "competition.yaml"
    file.write_text(file.read_text().replace("k: 5", "k: 17"))
    before = {
        name: (project / "data" / name).read_bytes()
        for name in ("folds.parquet", "folds_audit.json", "manifest.json")
    }
    with pytest.raises(UserError, match="fold 16: has no validation rows"):
        again(remake=True)
    assert before == {name: (project / "data" / name).read_bytes() for name in before}
    refused = artifacts.read_json(project / "data" / "folds_refused.json")
    assert refused["k"] == 17 and ("fold-empty", "fold 16") in [
        (f["code"], f["where"]) for f in refused["faults"]
    ]
    assert "FAULT fold 16: has no validation rows" in (project / "data" / "folds_refused.txt").read_text()
    file.write_text(file.read_text().replace("k: 17", "k: 5"))
    again()
    assert not list((project / "data").glob("folds_refused.*")), "the audit of the refused folds is removed"


def test_a_flipped_byte_is_refused(project: Path) -> None:
    data = bytearray(paths.folds_file().read_bytes())
    data[len(data) // 2] ^= 1
    paths.folds_file().write_bytes(bytes(data))
    for read in (again, lambda: folds.load(samples.load())):
        with pytest.raises(UserError, match=r"data/folds\.parquet: damaged"):
            read()
    again(remake=True)


def test_killed_before_the_seal_it_is_made_again(project: Path) -> None:
    before = paths.folds_file().read_bytes()
    manifest = artifacts.read_json(project / "data" / "manifest.json")
    del manifest["folds.parquet"]
    artifacts.write_json(project / "data" / "manifest.json", manifest)
    again()
    assert paths.folds_file().read_bytes() == before


# --- rows that share an image -------------------------------------------------------------------------------


def with_images(one: Samples, names: list[str]) -> Samples:
    return Samples(one.frame.assign(images=pd.Series([[name] for name in names])), one.heads, one.hash)


def crops() -> Samples:
    """600 rows that crop 200 images: row 00000, 00200 and 00400 name the same file, spelled in three ways."""
    ways = ("train/{}.png", "train/./{}.png", 'train/{}.png///{{"x":"3"}}')
    one = table(group=[f"g{i % 200 % 40}" for i in range(600)])
    return with_images(one, [ways[i // 200].format(i % 200) for i in range(600)])


@pytest.mark.parametrize("scheme", [each for each in fold_schemes.SCHEMES if each != "time"])
@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_rows_that_name_one_file_share_a_fold_under_every_scheme(scheme: str, holdout: float) -> None:
    found = made(crops(), scheme, holdout=holdout, repeats=2)
    for fold in found.assignment:
        assert (fold[:200] == fold[200:400]).all() and (fold[:200] == fold[400:]).all()
    assert faults(found) == [] and len(np.unique(found.assignment[0])) == 5 + (holdout > 0)
    for fold in range(found.count):
        train_rows, select_rows = found.inner_split(fold, 0.2)
        assert not set(train_rows % 200) & set(select_rows % 200)


def test_rows_share_an_image_if_they_share_one_of_its_channels() -> None:
    one = with_images(
        table(),
        [f"red/{i % 200}.png//green/{i}.png" if i < 400 else f"red/{i % 200}.png" for i in range(600)],
    )
    fold = made(one, "kfold").assignment[0]
    assert (fold[:200] == fold[200:400]).all() and (fold[:200] == fold[400:]).all()


def test_one_file_on_both_sides_of_a_fold_is_a_fault() -> None:
    found = made(crops(), "stratified")
    here = int(found.assignment[0, 0])
    for there, place in (
        ((here + 1) % 5, f"fold {(here + 1) % 5}"),
        (HOLDOUT, "the hold-out"),
        (TRAIN_ONLY, "the train-only rows"),
    ):
        (fault,) = faults(altered(found, 0, there))
        assert fault.code == "image-across-folds" and "train/0.png" in fault.where
        assert place in fault.what and f"fold {here}" in fault.what
        assert "00000" in fault.what and "00200" in fault.what
        assert "comp folds --remake" in fault.remedy


def test_a_split_by_time_that_has_a_file_on_both_sides_is_refused_by_name() -> None:
    shared = faults(made(crops(), "time"))
    assert len(shared) == 11 and {fault.code for fault in shared} == {"image-across-folds"}
    assert "train/" in shared[0].where and "folds.scheme" in shared[0].remedy
    assert "more images" in shared[10].what


def test_an_extra_row_does_not_train_the_fold_that_scores_its_image() -> None:
    """As `extra: [{table: train.csv}]` makes them: each training row once more."""
    one = table(600, source=["train"] * 300 + ["extra"] * 299 + ["test"])
    one = with_images(one, [f"train/{i % 300}.png" for i in range(600)])
    for scheme in fold_schemes.SCHEMES:
        found = made(one, scheme, holdout=0.2)
        assert not [fault for fault in faults(found) if fault.code == "image-across-folds"], scheme
        source = one.frame["source"].to_numpy()
        for train_rows, valid_rows in [found.split("full"), *map(found.split, range(5))]:
            assert set(source[valid_rows]) <= {"train"}
            assert not np.isin(train_rows % 300, valid_rows % 300).any()
            assert not np.isin(train_rows % 300, found.holdout_rows() % 300).any(), "nor the hold-out"
        assert (source[found.split(0)[0]] == "extra").any() or scheme == "time"
        assert len(found.holdout_rows()) == 300 - len(found.oof_rows) - (scheme == "time") * int(
            (found.assignment[0, :300] == -1).sum()
        )
        assert (
            any("299 extra rows" in note for note in fold_audit.audit(one, found)["notes"])
            or scheme == "time"
        )


def test_a_pseudo_labelled_row_does_not_train_the_fold_that_scores_its_image() -> None:
    one = table(600, source=["train"] * 300 + ["test"] * 300)
    one = with_images(one, [f"train/{i % 300}.png" for i in range(600)])
    found = made(one, "stratified", holdout=0.2)
    source = np.array(["train"] * 300 + ["pseudo:x:fold3"] * 300, object)
    later = Folds(found.frame, found.meta, Samples(one.frame.assign(source=source), one.heads, one.hash))
    for train_rows, valid_rows in (later.split(3), later.split("full")):
        never = [*(valid_rows % 300), *(found.holdout_rows() % 300)]
        assert (train_rows >= 300).any() and not np.isin(train_rows % 300, never).any()
    assert np.array_equal(later.oof_rows, found.oof_rows) and later.oof_rows.max() < 300


def copied_files(project: Path, pairs: list[tuple[str, str]]) -> None:
    """The second file of each pair becomes a copy of the first."""
    for one, other in pairs:
        (project / "data/raw" / other).write_bytes((project / "data/raw" / one).read_bytes())


def in_folds(number: int, count: int) -> list[str]:
    """Images of the first training rows of a fold."""
    rows, split = samples.load(), folds.load(samples.load())
    return [rows.frame["images"].iloc[at][0] for at in split.split(number)[1][:count]]


def declare(project: Path, *changes: tuple[str, str]) -> None:
    file = project / "configs" / "competition.yaml"
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)


GROUPED = ("k: 5, seed: 0", "k: 5, seed: 0, duplicates: group")


def test_equal_bytes_on_both_sides_of_a_fold_are_a_fault(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With and without an image cache that has their hashes; without faults if folds.duplicates is group."""
    copied_files(project, list(zip(in_folds(0, 12), in_folds(3, 12), strict=True)))
    one, other = in_folds(0, 1)[0], in_folds(3, 1)[0]
    before = paths.folds_file().read_bytes()
    for remake in (False, True):
        capsys.readouterr()
        assert cli.main(["folds", *["--remake"] * remake]) == 2
        said = capsys.readouterr()
        assert one in said.err and other in said.err and "fold 0" in said.err and "fold 3" in said.err
        assert "folds.duplicates: group" in said.err and "2 more images" in said.err
        assert paths.folds_file().read_bytes() == before
    assert cli.main(["check"]) == 0
    assert "24 train rows have files of the same bytes" in capsys.readouterr().out
    declare(project, GROUPED)
    assert cli.main(["folds", "--remake"]) == 0
    assert "12 pairs of duplicates" in capsys.readouterr().out
    of, rows = folds.load(samples.load()).assignment[0], samples.load()
    place = {images[0]: of[at] for at, images in enumerate(rows.frame["images"])}
    assert place[one] == place[other]
    assert cli.main(["folds"]) == 0, "frozen, and without a fault"


def test_the_training_table_as_extra_data_trains_no_fold_that_scores_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under its own paths, and as duplicate files with other names."""
    declare(project, ("id: id", 'id: id\nextra: [{table: train.csv, image: "train/{id}.png"}]'))
    prepare.prepare(config(experiment="base"))
    assert cli.main(["folds", "--remake"]) == 0
    assert "1437 extra rows" in capsys.readouterr().out
    rows, raw = samples.load(), project / "data/raw"

    def leaking() -> int:
        split, count = folds.load(rows), 0
        for fold in range(5):
            train_rows, valid_rows = split.split(fold)
            files = {(raw / rows.frame["images"].iloc[at][0]).read_bytes() for at in valid_rows}
            count += sum((raw / rows.frame["images"].iloc[at][0]).read_bytes() in files for at in train_rows)
        return count

    assert leaking() == 0
    shutil.copytree(raw / "train", raw / "old")
    declare(project, ('image: "train/{id}.png"}]', 'image: "old/{id}.png"}]'))
    prepare.prepare(config(experiment="base"))
    rows = samples.load()
    assert cli.main(["folds", "--remake"]) == 2
    said = capsys.readouterr().err
    assert (
        "old/" in said
        and "the train-only rows" in said
        and "folds.duplicates: group" in said
        and "1427 more images" in said
    )
    declare(project, GROUPED)
    assert cli.main(["folds", "--remake"]) == 0
    assert leaking() == 0
    assert cli.main(["folds", "--duplicates"]) == 0
    assert "with extra rows: 1437 pairs, 0 across folds" in capsys.readouterr().out


def test_duplicates_of_training_rows_among_the_test_rows_are_noted(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = samples.load()
    test = [rows.frame["images"].iloc[at][0] for at in rows.positions("test")[:7]]
    copied_files(project, list(zip(in_folds(2, 7), test, strict=True)))
    assert cli.main(["folds", "--remake"]) == 0
    assert "7 test rows share an image with a training row" in capsys.readouterr().out
    split = folds.load(rows)
    assert (split.assignment[0, rows.positions("test")[:7]] == 2).all() and (
        split.assignment[0, rows.positions("test")[7:]] == -1
    ).all()
