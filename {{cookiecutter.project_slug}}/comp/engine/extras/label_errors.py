"""comp label-errors: rows whose label several models deny, out of fold and with one voice. Often it is the label that is wrong.

A model denies a row as far as it prefers another answer to the given one; a row counts as far as the mildest of them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine import text_table
from comp.engine.bank import bank
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.data import folds, image_reader, samples
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import Refused
from comp.engine.readers import arrays
from comp.engine.readers.arrays import DamagedImage
from comp.engine.report import plots
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

if TYPE_CHECKING:
    import pandas as pd

DRAWN, SHOWN = 40, 15
COLUMNS = ("id", "target", "given", "models say", "denied")


def contradicted(names: Sequence[str]) -> pd.DataFrame:
    """data/contradicted.csv and .png. Without names every run that has OOF predictions of all rows."""
    import pandas as pd

    cfg = resolve.load(paths.root(), "base").config
    rows = samples.load()
    split = folds.load(rows)
    found_sets = {name: bank.load(name, "oof", rows, split) for name in names} or _whole(rows, split)
    if not found_sets:
        raise Refused("no run has OOF predictions of all rows yet: comp train exp001")
    names, sets = list(found_sets), list(found_sets.values())
    kept = np.logical_and.reduce([each.predicted for each in sets])
    if not kept.any():
        raise Refused(f"{', '.join(names)}: no row was predicted by all of them")
    at = np.asarray(sets[0].row, np.int64)[kept]
    found = [line for head in rows.heads for line in _denied(rows, at, kept, head, sets)]
    found.sort(key=lambda line: -line["denied"])
    frame = pd.DataFrame(found, columns=[*COLUMNS, "fold", "image", "position"])
    file, sheet = paths.path("data", "contradicted.csv"), paths.path("data", "contradicted.png")
    artifacts.write_text(file, frame.drop(columns="position").to_csv(index=False))
    print(f"{len(frame)} rows of {len(at)} are denied by all of {', '.join(names)}")
    if len(names) == 1:
        print("one model alone is often wrong by itself: name several, like comp label-errors exp001 exp002")
    if len(frame):
        cells = [
            [str(line[name]) for name in COLUMNS[:-1]] + [f"{line['denied']:.3f}"] for line in found[:SHOWN]
        ]
        print(text_table.render(COLUMNS, cells, ["denied"]))
        _drawn(cfg, found[:DRAWN], sheet)
        print(
            f"{paths.relative(file)}: all of them\n{paths.relative(sheet)}: the first {min(DRAWN, len(found))}"
        )
    print("next: look; a wrong label belongs out of the training table, then comp prepare")
    return frame


def _whole(rows: Samples, split: Folds) -> dict[str, PredictionSet]:
    """Runs that predict every row. One of --debug, or of folds that were made anew since, would leave next to nothing to look
    at; it is left out with its reason."""
    found = {}
    places = sorted(paths.path("runs").glob("*/oof.arrow"))
    for name in (p.parent.name for p in places if p.parent.name[0] != "." and artifacts.manifest_entry(p)):
        try:
            said = bank.load(name, "oof", rows, split)
        except Refused as refused:
            print(f"left out: {refused}")
            continue
        if said.predicted.all():
            found[name] = said
        else:
            print(f"left out: {name} predicts {said.predicted.sum()} of {len(said.row)} rows")
    return found


def _denied(
    rows: Samples, at: NDArray[np.int64], kept: NDArray[np.bool_], head: Head, sets: Sequence[PredictionSet]
) -> list[dict[str, Any]]:
    """A line a row (and label, of several) that every model denies in the same sense."""
    target = rows.targets(head)[at]
    said = [np.asarray(each.probability(head), np.float64)[kept] for each in sets]  # (rows, outputs) each
    ways = {"value": _values, "multilabel": _labels}
    way = ways.get("value" if head.row.space == "value" else head.task, _classes)
    lines = []
    fold = np.asarray(sets[0].fold)[kept]
    for row, given, instead, denied in way(head, target, said):
        position = int(at[row])
        lines.append(
            {
                "id": rows.frame["id"].iloc[position], "target": head.name, "given": given, "models say": instead,
                "denied": denied, "fold": int(fold[row]), "image": rows.frame["images"].iloc[position][0],
                "position": position,
            }
        )  # fmt: skip
    return lines


Denied = list[tuple[int, str, str, float]]  # row, given, what the models say, how sure the mildest is


def _classes(head: Head, target: NDArray[Any], said: list[NDArray[Any]]) -> Denied:
    """All models name the same other class; denied by how much likelier it is to each."""
    if said[0].shape[1] == 1:
        said = [np.hstack([1 - p, p]) for p in said]
    given = np.rint(target[:, 0]).astype(int) if target.shape[1] == 1 else target.argmax(axis=1)
    names = head.classes or ("0", "1")
    other = said[0].argmax(axis=1)
    every = np.arange(len(given))
    margin = np.min([p[every, other] - p[every, given] for p in said], axis=0)
    one_voice = np.all([p.argmax(axis=1) == other for p in said], axis=0) & (other != given)
    return [(int(i), names[given[i]], names[other[i]], float(margin[i])) for i in np.flatnonzero(one_voice)]


def _labels(head: Head, target: NDArray[Any], said: list[NDArray[Any]]) -> Denied:
    """Each label by itself: all models above a half where it is 0, or below where it is 1."""
    against = np.min([np.where(target > 0.5, 1 - p, p) for p in said], axis=0)
    return [
        (int(i), f"{head.outputs[j]} {target[i, j]:g}", f"{np.mean([p[i, j] for p in said]):.3f}", float(2 * against[i, j] - 1))
        for i, j in np.argwhere(against > 0.5)
    ]  # fmt: skip


def _values(head: Head, target: NDArray[Any], said: list[NDArray[Any]]) -> Denied:
    """All models miss to the same side, by more than two standard deviations of what they usually miss."""
    lines = []
    for column in range(target.shape[1]):
        off = np.stack([p[:, column] - target[:, column] for p in said])  # (models, rows)
        off = off / np.maximum(np.nanstd(off, axis=1, keepdims=True), 1e-12)
        same = (np.sign(off) == np.sign(off[0])).all(axis=0)
        least = np.where(same, np.abs(off).min(axis=0), 0)
        mean = np.mean([p[:, column] for p in said], axis=0)
        lines += [
            (int(i), f"{target[i, column]:.5g}", f"{mean[i]:.5g}", float(least[i]))
            for i in np.flatnonzero(least > 2)
        ]
    return lines


def _drawn(cfg: Config, lines: list[dict[str, Any]], file: Any) -> None:
    reader = replace(image_reader.from_config(cfg), size=plots.TILE, resize="contain")
    tiles = []
    for line in lines:
        try:
            image = arrays.to_uint8(reader.image(line["image"]))
        except DamagedImage:
            image = np.zeros((plots.TILE, plots.TILE, 3), np.uint8)
        tiles.append((image, f"{line['given']}? {line['models say']}!"))
    plots.image_grid(tiles, file, title="given? what the models say!  the most denied first")
