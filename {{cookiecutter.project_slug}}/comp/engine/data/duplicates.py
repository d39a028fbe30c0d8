"""Copies among the pictures: the same bytes, or so nearly the same pixels that only encoding, size, light or a small crop differ.

A copy across folds makes a score too good, and one between train and test is worth a look by itself. `comp folds --duplicates`
lists them; `folds.duplicates: group` keeps them on one side. Every picture is decoded once, into a cache of 32 px.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine import text_table
from comp.engine.config.schema import Config
from comp.engine.data import cache, folds, image_reader, phash
from comp.engine.data import samples as table
from comp.engine.data.samples import Samples
from comp.engine.readers import arrays
from comp.engine.readers.arrays import DamagedImage
from comp.engine.report import plots
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pandas as pd

SHOWN, DRAWN = 12, 32  # pairs on the screen and on the sheet; the csv has all
SPLIT = ("train and train", "with extra rows")  # kinds of pairs that a fold can have on both sides
COLUMNS = ("source_a", "source_b", "id_a", "id_b", "how", "label_a", "label_b", "fold_a", "fold_b")


@dataclass(frozen=True)
class Duplicates:
    """Pairs of samples (positions), the picture of each, and how alike they are; 1 is the same bytes."""

    pairs: NDArray[np.int64]  # (pairs, 2)
    images: list[tuple[str, str]]
    alike: NDArray[np.float32]
    level: phash.Threshold
    looked: int  # pictures that could be read
    unclear: int = 0  # pairs above the level that are left out, since about as many are there by chance


def find(cfg: Config, samples: Samples) -> Duplicates:
    owners: dict[str, list[int]] = {}
    for position, names in enumerate(samples.frame["images"]):
        for name in names:
            owners.setdefault(name, []).append(position)
    names = list(owners)
    grey, hashed = _looked(cfg, names)
    content: dict[str, list[int]] = {}
    for at, each in enumerate(hashed):
        if each:
            content.setdefault(each, []).append(at)
    firsts = np.array([same[0] for same in content.values()], np.int64)
    pairs, alike, level = phash.find_duplicates(grey[firsts])
    unclear = len(pairs) if len(pairs) <= phash.BEYOND * level.chance else 0
    if unclear:
        pairs, alike = pairs[:0], alike[:0]
    found = {(same[0], other): 1.0 for same in content.values() for other in same[1:]}
    found |= {(int(firsts[a]), int(firsts[b])): float(how) for (a, b), how in zip(pairs, alike, strict=True)}
    found |= {
        (at, at): 1.0 for at, name in enumerate(names) if len(owners[name]) > 1
    }  # listed by several rows
    lines = [
        (p, q, names[a], names[b], how)
        for (a, b), how in found.items()
        for p, q in _across(owners[names[a]], owners[names[b]])
    ]
    lines.sort()
    return Duplicates(
        np.array([line[:2] for line in lines], np.int64).reshape(-1, 2),
        [line[2:4] for line in lines],
        np.array([line[4] for line in lines], np.float32),
        level,
        len(hashed) - hashed.count(""),
        unclear,
    )


def _across(one: list[int], other: list[int]) -> set[tuple[int, int]]:
    """The first sample of either picture with all of the other: enough to hold them together, without all pairs."""
    return {
        (min(p, q), max(p, q))
        for p, q in [*((one[0], q) for q in other), *((p, other[0]) for p in one)]
        if p != q
    }


def _looked(cfg: Config, names: list[str]) -> tuple[phash.Grey, list[str]]:
    """Grey pixels, and a hash of each file; of a damaged one black and none: comp check names those."""
    small = cfg.data.model_copy(update={"size": phash.SIDE, "cache_scale": 1.0, "resize": "stretch"})
    images = cache.open_images(cfg.model_copy(update={"data": small}), names, cfg.machine.progress)
    grey = np.zeros((len(names), phash.SIDE, phash.SIDE), np.float32)
    hashed = [""] * len(names)
    listed = images.pages.table["hash"] if isinstance(images, cache.CachedImages) else None
    for at, name in enumerate(names):
        try:
            grey[at] = images[at].mean(axis=2) / (arrays.MAX_VALUE[cfg.data.depth] // 255)
        except DamagedImage:
            continue
        if listed is not None and isinstance(images, cache.CachedImages) and images.where[at] >= 0:
            hashed[at] = listed[int(images.where[at])].as_py()
        else:
            hashed[at] = artifacts.digest(image_reader.from_config(cfg).read(name).hex())
    return grey, hashed


def connected_components(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """(count,): a number for each, the same where pairs lead from one to the other."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def group_names(names: NDArray[Any], copies: Iterable[Iterable[int]]) -> NDArray[Any]:
    """What must share a fold: samples of one name, and copies. Each unit goes by the first of its names."""
    known, code = np.unique(names.astype(str), return_inverse=True)
    part = connected_components(len(known), code[np.array(list(copies), np.int64).reshape(-1, 2)])
    first = np.unique(part, return_index=True)[1]  # known is sorted, so this is the smallest name
    return np.asarray(known[first[part]][code])


# --- comp folds --duplicates ---------------------------------------------------------------------------------------------


def list_duplicates(cfg: Config) -> None:
    """comp folds --duplicates: of data/samples.parquet."""
    report(cfg, table.load())


def report(cfg: Config, samples: Samples) -> pd.DataFrame:
    """data/duplicates.csv and a sheet of pictures; pairs of train and test come first."""
    copies = find(cfg, samples)
    frame = _frame(samples, copies)
    file, sheet = paths.path("data", "duplicates.csv"), paths.path("data", "duplicates.png")
    artifacts.write_text(file, frame.to_csv(index=False))
    print(
        f"{copies.looked} pictures: {len(frame)} pairs of copies, {int((frame['how'] == 1).sum())} of them the same bytes"
        f" (copies have a correlation from {copies.level.correlation:.3f} on, which {copies.level.chance:.2g} pairs of this set reach "
        "by chance)"
    )
    if copies.unclear:
        print(
            f"{copies.unclear} more pairs look alike, and about {copies.level.chance:.0f} do so by chance: this set cannot be judged by "
            "pixels, so only the same bytes count as copies"
        )
    for kind, mine in _kinds(frame).items():
        if len(mine):
            _told(kind, mine)
    if len(frame):
        _drawn(cfg, frame, sheet)
        print(
            f"{paths.relative(file)}: all of them\n{paths.relative(sheet)}: the first {min(DRAWN, len(frame))}"
        )
    apart = sum(_apart(mine) for kind, mine in _kinds(frame).items() if kind in SPLIT)
    if apart and cfg.competition.folds.scheme == "time":
        print(
            "next: a split by time cannot keep copies together: take rows out of the table, or use another folds.scheme"
        )
    elif apart and cfg.competition.folds.duplicates == "ignore":
        print("next: folds.duplicates: group in configs/competition.yaml, then comp folds --remake")
    elif apart and artifacts.manifest_entry(paths.folds_file()):
        print("next: comp folds --remake")
    else:
        print(
            "next: comp train exp001" if artifacts.manifest_entry(paths.folds_file()) else "next: comp folds"
        )
    return frame


def _kinds(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    test = (frame["source_a"] == "test").astype(int) + (frame["source_b"] == "test")
    train = (frame["source_a"] == "train") & (frame["source_b"] == "train")
    return {
        "train and test": frame[test == 1],
        "train and train": frame[train],
        "with extra rows": frame[(test == 0) & ~train],
        "test and test": frame[test == 2],
    }


def _told(kind: str, mine: pd.DataFrame) -> None:
    print(f"\n{kind}: {len(mine)} pairs" + _remark(kind, mine))
    shown = mine[list(COLUMNS)].head(SHOWN)
    cells = [
        [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in shown.itertuples(index=False)
    ]
    print(text_table.render(COLUMNS, cells, ["how", "fold_a", "fold_b"]))


def _apart(mine: pd.DataFrame) -> int:
    """Pairs of which one row trains the fold that scores the other. Of an extra row `fold` is the one that it does not train."""
    scored = (mine["source_a"] == "train") | (mine["source_b"] == "train")
    return int(((mine["fold_a"] != mine["fold_b"]) & scored).sum())


def _remark(kind: str, mine: pd.DataFrame) -> str:
    if kind not in SPLIT:
        return ""
    other = int((mine["label_a"] != mine["label_b"]).sum())
    return f", {_apart(mine)} on both sides of a fold, {other} with different labels"


def _frame(samples: Samples, copies: Duplicates) -> pd.DataFrame:
    import pandas as pd

    one, other = copies.pairs.T
    fold = np.full(len(samples.frame), "", object)
    if (
        artifacts.manifest_entry(paths.folds_file())
        and folds.read(paths.folds_file())[1]["samples"] == samples.hash
    ):
        fold = folds.load(samples).assignment[0].astype(str).astype(object)
    said: dict[str, Any] = {}
    for name in ("source", "id"):
        values = samples.frame[name].to_numpy(object)
        said |= {f"{name}_a": values[one], f"{name}_b": values[other]}
    label = [
        ["" if samples.frame["source"].iloc[p] == "test" else samples.label(int(p)) for p in side]
        for side in (one, other)
    ]
    said |= {"how": copies.alike.astype(float).round(4), "label_a": label[0], "label_b": label[1]}
    said |= {"fold_a": fold[one], "fold_b": fold[other]}
    said |= {"image_a": [a for a, _ in copies.images], "image_b": [b for _, b in copies.images]}
    frame = pd.DataFrame(said)
    mixed = (frame["source_a"] == "test") != (frame["source_b"] == "test")
    order = np.lexsort((np.arange(len(frame)), -frame["how"].to_numpy(), ~mixed.to_numpy()))
    return frame.iloc[order].reset_index(drop=True)


def _drawn(cfg: Config, frame: pd.DataFrame, file: Any) -> None:
    reader = replace(image_reader.from_config(cfg), size=plots.TILE, resize="contain")
    tiles = []
    for row in frame.head(DRAWN).itertuples():
        for side in "ab":
            said = [str(getattr(row, f"{name}_{side}")) for name in ("source", "id", "label")]
            tiles.append((arrays.to_uint8(reader.image(getattr(row, f"image_{side}"))), " ".join(said)))
    plots.image_grid(tiles, file, columns=8, title="copies, in pairs; train and test first", pairs=True)
