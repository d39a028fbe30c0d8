"""comp label-errors: likely label errors, that is rows where all models agree against the label, out of fold.

Rows are sorted by margin: probability of the prediction less that of the label, the smallest over the
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine import text_table
from comp.engine.bank import bank
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import resolve
from comp.engine.data import folds, samples
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.extras import contact_sheet
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

if TYPE_CHECKING:
    import pandas as pd

DRAWN, PRINTED = 40, 15
COLUMNS = ("id", "target", "label", "predicted", "margin")


def label_errors(names: Sequence[str]) -> pd.DataFrame:
    """Write data/label_errors.csv and .png, by all of `names` together; default: every run with OOF
    predictions of all rows."""
    import pandas as pd

    cfg = resolve.load(paths.root(), "base").config
    rows = samples.load()
    split = folds.load(rows)
    by_name = {name: bank.load(name, "oof", rows, split) for name in names} or _complete_runs(rows, split)
    if not by_name:
        raise UserError(
            "predictions-missing",
            where="comp label-errors",
            what="no run has OOF predictions of all rows",
            remedy="comp train exp001",
        )
    names, sets = list(by_name), list(by_name.values())
    common = np.logical_and.reduce([predictions.predicted for predictions in sets])
    if not common.any():
        raise UserError(
            "predictions-missing", where=", ".join(names), what="no row is predicted by all of them"
        )
    found = [line for head in rows.heads for line in _lines(rows, common, head, sets)]
    found.sort(key=lambda line: -line["margin"])
    frame = pd.DataFrame(found, columns=[*COLUMNS, "fold", "image", "position"])
    file, sheet = paths.path("data", "label_errors.csv"), paths.path("data", "label_errors.png")
    artifacts.write_text(file, frame.drop(columns="position").to_csv(index=False))
    print(
        f"{len(frame)} of {int(common.sum())} rows are likely label errors: {', '.join(names)} agree "
        "against the label"
    )
    if len(names) == 1:
        print("a single model is often wrong itself; name several, like comp label-errors exp001 exp002")
    if len(frame):
        cells = [
            [str(line[name]) for name in COLUMNS[:-1]] + [f"{line['margin']:.3f}"] for line in found[:PRINTED]
        ]
        print(text_table.render(COLUMNS, cells, ["margin"]))
        captions = ((line["image"], f"{line['label']} -> {line['predicted']}") for line in found[:DRAWN])
        title = "label -> prediction of all models, largest margin first"
        contact_sheet.write(cfg, captions, sheet, title)
        print(_margin_text(rows.heads))
        drawn = f"{paths.relative(sheet)} (the first {min(DRAWN, len(found))})"
        print(f"written: {paths.relative(file)}, {drawn}")
    else:
        print(f"written: {paths.relative(file)}")
    print(
        "next: look at them; correct or remove wrong rows in read_samples (comp/competition.py), then comp "
        "prepare"
    )
    return frame


def _margin_text(heads: Sequence[Head]) -> str:
    """What the column margin holds, for the kinds of targets there are."""
    values = {head.spec.space == "value" for head in heads}
    units = ["probability of the prediction less that of the label"] * (False in values)
    units += ["error in standard deviations of the model's errors"] * (True in values)
    return f"margin: {' or '.join(units)}, the smallest over the models"


def _complete_runs(rows: Samples, split: Folds) -> dict[str, PredictionSet]:
    """Runs that predict every row. A --debug run would leave next to no common rows, and one on other folds
    cannot be read; both are left out, with the reason printed."""
    found = {}
    files = sorted(paths.path("runs").glob("*/oof.arrow"))
    for name in (
        file.parent.name for file in files if file.parent.name[0] != "." and artifacts.manifest_entry(file)
    ):
        try:
            oof = bank.load(name, "oof", rows, split)
        except UserError as error:
            print(f"left out: {error}")
            continue
        if oof.predicted.all():
            found[name] = oof
        else:
            print(f"left out: {name} predicts {oof.predicted.sum()} of {len(oof.row)} rows")
    return found


def _lines(
    rows: Samples, common: NDArray[np.bool_], head: Head, sets: Sequence[PredictionSet]
) -> list[dict[str, Any]]:
    """One line per row (and label, if a row has several) where all models agree against the label."""
    at = np.asarray(sets[0].row, np.int64)[common]
    fold = np.asarray(sets[0].fold)[common]
    target = rows.targets(head)[at]
    values = [np.asarray(oof.probability(head), np.float64)[common] for oof in sets]  # (rows, outputs) each
    find = {"value": _value_errors, "multilabel": _multilabel_errors}.get(
        "value" if head.spec.space == "value" else head.task, _class_errors
    )
    lines = []
    for row, label, predicted, margin in find(head, target, values):
        position = int(at[row])
        lines.append(
            {
                "id": rows.frame["id"].iloc[position],
                "target": head.name,
                "label": label,
                "predicted": predicted,
                "margin": margin,
                "fold": int(fold[row]),
                "image": rows.frame["images"].iloc[position][0],
                "position": position,
            }
        )
    return lines


Errors = list[tuple[int, str, str, float]]  # row, label, prediction, smallest margin over models


def _class_errors(head: Head, target: NDArray[Any], probability: list[NDArray[Any]]) -> Errors:
    """All models predict the same other class. Margin: difference of the two probabilities."""
    if probability[0].shape[1] == 1:
        probability = [np.hstack([1 - p, p]) for p in probability]
    label = np.rint(target[:, 0]).astype(int) if target.shape[1] == 1 else target.argmax(axis=1)
    names = head.classes or ("0", "1")
    other = probability[0].argmax(axis=1)
    every = np.arange(len(label))
    margin = np.min([p[every, other] - p[every, label] for p in probability], axis=0)
    unanimous = np.all([p.argmax(axis=1) == other for p in probability], axis=0) & (other != label)
    return [(int(i), names[label[i]], names[other[i]], float(margin[i])) for i in np.flatnonzero(unanimous)]


def _multilabel_errors(head: Head, target: NDArray[Any], probability: list[NDArray[Any]]) -> Errors:
    """Each label by itself: all models above 0.5 where it is 0, or below where it is 1."""
    against = np.min([np.where(target > 0.5, 1 - p, p) for p in probability], axis=0)
    return [
        (
            int(i),
            f"{head.outputs[j]} {target[i, j]:g}",
            f"{np.mean([p[i, j] for p in probability]):.3f}",
            float(2 * against[i, j] - 1),
        )
        for i, j in np.argwhere(against > 0.5)
    ]


def _value_errors(head: Head, target: NDArray[Any], values: list[NDArray[Any]]) -> Errors:
    """All models are off to the same side by more than two standard deviations of their error. Margin: in
    standard deviations."""
    lines = []
    for column in range(target.shape[1]):
        error = np.stack([p[:, column] - target[:, column] for p in values])  # (models, rows)
        error = error / np.maximum(np.nanstd(error, axis=1, keepdims=True), 1e-12)
        same_side = (np.sign(error) == np.sign(error[0])).all(axis=0)
        margin = np.where(same_side, np.abs(error).min(axis=0), 0)
        mean = np.mean([p[:, column] for p in values], axis=0)
        lines += [
            (int(i), f"{target[i, column]:.5g}", f"{mean[i]:.5g}", float(margin[i]))
            for i in np.flatnonzero(margin > 2)
        ]
    return lines
