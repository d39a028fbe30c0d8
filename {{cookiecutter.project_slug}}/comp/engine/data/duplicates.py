"""Duplicate images: files of equal bytes, and near-duplicates that differ in encoding, size, brightness or a
small crop.

Duplicates across folds make scores optimistic; a duplicate in train and test may reveal a test label. `comp
folds --duplicates` lists the pairs, `folds.duplicates: group` keeps them in one fold. Every image is decoded
once, into a cache of 32 px.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine import text_table
from comp.engine.config.schema import Config
from comp.engine.data import cache, folds, image_reader, phash
from comp.engine.data import samples as samples_table
from comp.engine.data.samples import Samples
from comp.engine.readers import arrays
from comp.engine.readers.arrays import DamagedImage
from comp.engine.report import plots
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 12  # pairs printed of each kind; the csv has all
DRAWN = 32  # pairs in duplicates.png
# Kinds of pairs of which one can be in the training and one in the validation rows of a fold.
CROSSABLE = ("train and train", "with extra rows")
COLUMNS = ("source_a", "source_b", "id_a", "id_b", "similarity", "label_a", "label_b", "fold_a", "fold_b")


@dataclass(frozen=True)
class Duplicates:
    """Pairs of samples with duplicate images."""

    pairs: NDArray[np.int64]  # (pairs, 2) positions in the samples table
    images: list[tuple[str, str]]  # the image of each of the two
    similarity: NDArray[np.float32]  # (pairs,) correlation of the pixels; 1 for equal bytes
    threshold: phash.Threshold
    readable: int  # images that could be read
    by_chance: int = 0  # pairs above the threshold, left out since about as many are expected by chance


def find(cfg: Config, samples: Samples) -> Duplicates:
    rows_of: dict[str, list[int]] = {}  # image -> rows
    for position, names in enumerate(samples.frame["images"]):
        for name in names:
            rows_of.setdefault(name, []).append(position)
    names = list(rows_of)
    grey, hashes = _read_small(cfg, names)
    same_hash: dict[str, list[int]] = {}
    for at, each in enumerate(hashes):
        if each:
            same_hash.setdefault(each, []).append(at)
    # Near-duplicates are searched among different files only.
    firsts = np.array([same[0] for same in same_hash.values()], np.int64)
    pairs, similarity, threshold = phash.find_duplicates(grey[firsts])
    by_chance = len(pairs) if len(pairs) <= phash.CHANCE_FACTOR * threshold.expected else 0
    if by_chance:
        pairs, similarity = pairs[:0], similarity[:0]
    found = {(same[0], other): 1.0 for same in same_hash.values() for other in same[1:]}
    found |= {(int(firsts[a]), int(firsts[b])): float(s) for (a, b), s in zip(pairs, similarity, strict=True)}
    found |= {(at, at): 1.0 for at, name in enumerate(names) if len(rows_of[name]) > 1}
    lines = [
        (p, q, names[a], names[b], s)
        for (a, b), s in found.items()
        for p, q in _row_pairs(rows_of[names[a]], rows_of[names[b]])
    ]
    lines.sort()
    return Duplicates(
        np.array([line[:2] for line in lines], np.int64).reshape(-1, 2),
        [line[2:4] for line in lines],
        np.array([line[4] for line in lines], np.float32),
        threshold,
        len(hashes) - hashes.count(""),
        by_chance,
    )


def _row_pairs(one: list[int], other: list[int]) -> set[tuple[int, int]]:
    """Pairs of rows for a pair of images: the first row of either with all rows of the other, which connects
    all of them."""
    return {
        (min(p, q), max(p, q))
        for p, q in [*((one[0], q) for q in other), *((p, other[0]) for p in one)]
        if p != q
    }


def _read_small(cfg: Config, names: list[str]) -> tuple[phash.Grey, list[str]]:
    """Gray pixels and hash of each file. A damaged image, which comp check reports, is black without a
    hash."""
    small = cfg.data.model_copy(update={"size": phash.SIDE, "cache_scale": 1.0, "resize": "stretch"})
    images = cache.open_images(cfg.model_copy(update={"data": small}), names, cfg.machine.progress)
    grey = np.zeros((len(names), phash.SIDE, phash.SIDE), np.float32)
    hashes = [""] * len(names)
    listed = images.pages.table["hash"] if isinstance(images, cache.CachedImages) else None
    for at, name in enumerate(names):
        try:
            grey[at] = images[at].mean(axis=2) / (arrays.MAX_VALUE[cfg.data.bit_depth] // 255)
        except DamagedImage:
            continue
        if listed is not None and isinstance(images, cache.CachedImages) and images.rows[at] >= 0:
            hashes[at] = listed[int(images.rows[at])].as_py()
        else:
            hashes[at] = artifacts.digest(image_reader.from_config(cfg).read(name).hex())
    return grey, hashes


def connected_components(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """(count,): the component of each of `count` nodes with `pairs` as edges."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components as components

    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return np.asarray(components(graph, directed=False)[1], np.int64)


def group_names(names: NDArray[Any], pairs: Iterable[Iterable[int]]) -> NDArray[Any]:
    """The group of each row, for rows that must share a fold: those of one name, and pairs. A group is named
    after the first of its names."""
    unique, code = np.unique(names.astype(str), return_inverse=True)
    edges = code[np.array(list(pairs), np.int64).reshape(-1, 2)]
    component = connected_components(len(unique), edges)
    first = np.unique(component, return_index=True)[1]  # unique is sorted, so this is the smallest name
    return np.asarray(unique[first[component]][code])


# --- comp folds --duplicates -------------------------------------------------------------------------------


def list_duplicates(cfg: Config) -> None:
    """comp folds --duplicates: searches and reports duplicates."""
    report(cfg, samples_table.load())


def report(cfg: Config, samples: Samples) -> pd.DataFrame:
    """Prints the pairs, and writes data/duplicates.csv and data/duplicates.png; pairs of train and test come
    first."""
    found = find(cfg, samples)
    frame = _frame(samples, found)
    file, drawing = paths.path("data", "duplicates.csv"), paths.path("data", "duplicates.png")
    artifacts.write_text(file, frame.to_csv(index=False))
    equal = int((frame["similarity"] == 1).sum())
    print(
        f"{found.readable} images: {len(frame)} pairs of duplicates, {equal} of them the same bytes"
        f" (threshold: correlation {found.threshold.correlation:.3f}, which "
        f"{found.threshold.expected:.2g} pairs are expected to reach by chance)"
    )
    if found.by_chance:
        print(
            f"{found.by_chance} more pairs reach the threshold, and about {found.threshold.expected:.0f} are "
            "expected by chance: pixels do not tell duplicates of this set, so only equal bytes count"
        )
    for kind, part in _by_kind(frame).items():
        if len(part):
            _print_pairs(kind, part)
    if len(frame):
        _draw(cfg, frame, drawing)
        print(f"{paths.relative(file)}: all pairs")
        print(f"{paths.relative(drawing)}: the first {min(DRAWN, len(frame))}")
    across = sum(_across_folds(part) for kind, part in _by_kind(frame).items() if kind in CROSSABLE)
    print(f"next: {_next_step(cfg, across)}")
    return frame


def _next_step(cfg: Config, across: int) -> str:
    made = bool(artifacts.manifest_entry(paths.folds_file()))
    if across and cfg.competition.folds.scheme == "time":
        return "remove rows from the table, or use another folds.scheme: time cannot keep duplicates together"
    if across and cfg.competition.folds.duplicates == "ignore":
        return "folds.duplicates: group in configs/competition.yaml, then comp folds --remake"
    if across and made:
        return "comp folds --remake"
    return "comp train exp001" if made else "comp folds"


def _by_kind(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    test = (frame["source_a"] == "test").astype(int) + (frame["source_b"] == "test")
    train = (frame["source_a"] == "train") & (frame["source_b"] == "train")
    return {
        "train and test": frame[test == 1],
        "train and train": frame[train],
        "with extra rows": frame[(test == 0) & ~train],
        "test and test": frame[test == 2],
    }


def _print_pairs(kind: str, part: pd.DataFrame) -> None:
    detail = ""
    if kind in CROSSABLE:
        other = int((part["label_a"] != part["label_b"]).sum())
        detail = f", {_across_folds(part)} across folds, {other} with different labels"
    print(f"\n{kind}: {len(part)} pairs{detail}")
    shown = part[list(COLUMNS)].head(SHOWN)
    cells = [
        [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in shown.itertuples(index=False)
    ]
    print(text_table.render(COLUMNS, cells, ["similarity", "fold_a", "fold_b"]))


def _across_folds(part: pd.DataFrame) -> int:
    """Counts the pairs of which one row is trained on in the fold that scores the other. The fold of an extra
    row is the one that does not train on it."""
    scored = (part["source_a"] == "train") | (part["source_b"] == "train")
    return int(((part["fold_a"] != part["fold_b"]) & scored).sum())


def _frame(samples: Samples, found: Duplicates) -> pd.DataFrame:
    import pandas as pd

    one, other = found.pairs.T
    fold = np.full(len(samples.frame), "", object)
    if (
        artifacts.manifest_entry(paths.folds_file())
        and folds.read(paths.folds_file())[1]["samples"] == samples.hash
    ):
        fold = folds.load(samples).assignment[0].astype(str).astype(object)
    columns: dict[str, Any] = {}
    for name in ("source", "id"):
        values = samples.frame[name].to_numpy(object)
        columns |= {f"{name}_a": values[one], f"{name}_b": values[other]}
    label = [
        ["" if samples.frame["source"].iloc[p] == "test" else samples.label(int(p)) for p in side]
        for side in (one, other)
    ]
    columns["similarity"] = found.similarity.astype(float).round(4)
    columns |= {"label_a": label[0], "label_b": label[1], "fold_a": fold[one], "fold_b": fold[other]}
    columns |= {"image_a": [a for a, _ in found.images], "image_b": [b for _, b in found.images]}
    frame = pd.DataFrame(columns)
    with_test = (frame["source_a"] == "test") != (frame["source_b"] == "test")
    order = np.lexsort((np.arange(len(frame)), -frame["similarity"].to_numpy(), ~with_test.to_numpy()))
    return frame.iloc[order].reset_index(drop=True)


def _draw(cfg: Config, frame: pd.DataFrame, file: Path) -> None:
    reader = replace(image_reader.from_config(cfg), size=plots.TILE, resize="contain")
    tiles = []
    for row in frame.head(DRAWN).itertuples():
        for side in "ab":
            caption = [str(getattr(row, f"{name}_{side}")) for name in ("source", "id", "label")]
            image = reader.image(getattr(row, f"image_{side}"))
            tiles.append((arrays.to_uint8(image), " ".join(caption)))
    plots.image_grid(tiles, file, columns=8, title="pairs of duplicates; train and test first", pairs=True)
