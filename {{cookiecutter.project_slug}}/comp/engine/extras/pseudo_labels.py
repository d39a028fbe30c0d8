"""comp pseudo: confident test predictions of a run as labels for the training of other runs.

A fold gets labels from its own models alone, which were not trained on its validation rows; the refit on all
data gets those of all folds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from comp.engine import text_table
from comp.engine.bank.predictions import PredictionSet
from comp.engine.data import folds, samples
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import UserError
from comp.engine.run import pseudo_rows, teachers
from comp.engine.run.teachers import TeacherEnsemble
from comp.engine.store import artifacts, locks, paths
from comp.engine.tasks.kinds import VALUES, Head

DEFAULT_CONFIDENCE = 0.9  # lower bound where neither --confidence nor --share is given


class Predicted(NamedTuple):
    """Every test row that has predictions of a fold's models."""

    rows: Positions
    mean: PredictionSet
    confidence: NDArray[np.float64]  # (rows,), 0 to 1


class Selection(NamedTuple):
    """Which rows are taken, and as what."""

    confidence: float | None  # lower bound
    share: float | None  # of the rows of each class, the most confident
    soft: bool  # class probabilities instead of the class
    weight: float  # of such a row in the loss


def all_folds(split: Folds) -> list[int | str]:
    return [*range(split.count), "full"]


def label(
    source: str,
    *,
    table: str | None = None,
    confidence: float | None = None,
    share: float | None = None,
    soft: bool = False,
    weight: float = 1.0,
) -> None:
    """comp pseudo: the options of `Selection`; `table` is the name of the table, default: `source`."""
    write(source, table or source, Selection(confidence, share, soft, weight))


def write(source: str, name: str, selection: Selection) -> None:
    """Write data/pseudo/<name>.parquet from the test predictions of `source`, a run, a member or a plain
    average."""
    rows = samples.load()
    split = folds.load(rows)
    if split.meta["rule"] == "earlier":
        raise UserError(
            "pseudo-labels-without-effect",
            where="comp pseudo",
            what="folds by time train on earlier rows only, and test rows are later, so their labels have "
            "no effect",
        )
    models = teachers.load(source, split, "comp pseudo")
    _validate(rows.heads, selection)
    tables, weights = [], {}
    for fold in tqdm(all_folds(split), desc="labels", unit="fold", delay=2, leave=False, disable=None):
        part = predicted(models, fold, rows, split, selection)
        tables.append(select(part, fold, rows, selection))
        if fold != "full":
            weights[str(fold)] = part.mean.meta["weights"]
    frame = pd.concat(tables, ignore_index=True)
    file = paths.pseudo_file(name)
    with locks.lock(file.parent, f"writing {file.name}"):
        with artifacts.atomic(file) as temporary:
            frame.to_parquet(temporary, index=False)
        artifacts.add_to_manifest(
            file,
            samples=rows.hash,
            folds=split.hash,
            source=source,
            command=_command(source, name, selection),
            selection=selection._asdict(),
            weights=weights,
        )
    _report(frame, rows, split)
    print(
        f"written: {paths.relative(file)}, from {', '.join(teacher.address for teacher in models.teachers)}"
    )
    run = models.teachers[0].run
    print(f"next: comp train {run} --as {run}p data.pseudo_labels={name}")


def _command(source: str, name: str, selection: Selection) -> str:
    """What makes the same table again."""
    options = (
        ("as", name, source),
        ("confidence", selection.confidence, None),
        ("share", selection.share, None),
        ("weight", selection.weight, 1.0),
    )
    given = "".join(f" --{key} {value}" for key, value, default in options if value not in (None, default))
    return f"comp pseudo {source}{given}" + " --soft" * selection.soft


def _validate(heads: tuple[Head, ...], selection: Selection) -> None:
    for option, value in (("--confidence", selection.confidence), ("--share", selection.share)):
        if value is not None and not 0 < value <= 1:
            raise UserError(
                "option-out-of-range", where=f"{option} {value:g}", what="must be above 0 and at most 1"
            )
    if selection.weight <= 0:
        raise UserError("option-out-of-range", where=f"--weight {selection.weight:g}", what="must be above 0")
    if selection.soft and all(head.task == "regression" for head in heads):
        raise UserError(
            "option-unused", where="--soft", what="has no effect on regression targets", remedy="leave it out"
        )
    if selection.soft and any(head.task == "retrieval" for head in heads):
        raise UserError(
            "option-unused",
            where="--soft",
            what="retrieval trains on one class per image",
            remedy="leave it out",
        )


def predicted(
    models: TeacherEnsemble, fold: int | str, rows: Samples, split: Folds, selection: Selection
) -> Predicted:
    """Mean test predictions of the models of one fold, with a confidence for each row."""
    mean, sets = teachers.merged_test_predictions(models, fold, rows, split)
    known = mean.predicted
    confidence = np.mean([_confidence(head, mean, sets, rows, selection) for head in rows.heads], axis=0)
    values = {name: values[known] for name, values in mean.heads.items()}
    own = PredictionSet(mean.row[known], None, values, mean.meta)
    return Predicted(mean.row.astype(np.int64)[known], own, confidence[known])


def _confidence(
    head: Head, mean: PredictionSet, sets: list[PredictionSet], rows: Samples, selection: Selection
) -> NDArray[np.float64]:
    """(rows,), 0 to 1. Classes: the largest probability. Several labels: the mean over labels of max(p, 1 -
    p). Values: how close the models are to each other, relative to the deviation of the targets."""
    if head.spec.spaces is VALUES:
        if len(sets) == 1 and selection.share != 1:
            raise UserError(
                "confidence-unknown",
                where="comp pseudo",
                key=head.name,
                what="one model gives no confidence for a regression target",
                remedy="train a second seed (comp train RUN --seed 1), name an ensemble of several runs, "
                "or take every row with --share 1",
            )
        deviation = teachers.spread(mean, sets, head.name)
        scale = np.nanstd(rows.targets(head)[rows.positions("train")])
        return np.asarray(1 / (1 + deviation / scale))
    p = mean.probability(head)
    return np.asarray(p.max(axis=1) if head.exclusive else np.maximum(p, 1 - p).mean(axis=1))


def select(predicted: Predicted, fold: int | str, rows: Samples, selection: Selection) -> pd.DataFrame:
    """The lines of one fold: the most confident rows of each class, with their labels."""
    head = rows.heads[0]
    has_classes = head.spec.spaces is not VALUES and head.task != "multilabel"
    codes = np.zeros(len(predicted.rows), np.int64)
    if has_classes:
        codes = head.spec.to_label(predicted.mean.probability(head))
    least = selection.confidence
    if least is None:
        least = DEFAULT_CONFIDENCE if selection.share is None else 0.0
    taken = np.zeros(len(predicted.rows), bool)
    for code in np.unique(codes):
        of_class = np.flatnonzero(codes == code)
        count = None if selection.share is None else max(1, round(selection.share * len(of_class)))
        of_class = of_class[np.argsort(-predicted.confidence[of_class], kind="stable")][:count]
        taken[of_class[predicted.confidence[of_class] >= least]] = True
    # The mean over all folds is less confident than each fold, so the refit may be left without
    # pseudo-labels.
    if not taken.any() and fold != "full":
        raise UserError(
            "confidence-too-high",
            where=f"fold {fold}",
            what=f"no test row has a confidence of {least:g}, the highest is "
            f"{predicted.confidence.max():.3f}",
            remedy=f"--confidence {np.quantile(predicted.confidence, 0.8):.2f} takes a fifth of the rows, "
            "--share 0.2 a fifth of each class",
        )
    columns: dict[str, Any] = {
        "id": rows.frame["id"].to_numpy()[predicted.rows[taken]],
        "fold": np.full(int(taken.sum()), pseudo_rows.FULL if fold == "full" else int(fold), np.int16),
        "confidence": predicted.confidence[taken],
        "weight": selection.weight,
        "label": [head.classes[code] for code in codes[taken]] if has_classes and head.classes else "",
    }
    for each in rows.heads:
        columns |= labels(each, predicted.mean.probability(each)[taken], selection.soft)
    return pd.DataFrame(columns)


def labels(head: Head, probability: NDArray[np.float64], soft: bool) -> dict[str, NDArray[np.float64]]:
    """Target columns as the samples have them; soft labels of a class code get a column per class
    (pseudo_rows.soft_columns)."""
    if head.exclusive:
        hard = np.eye(len(head.outputs))[probability.argmax(axis=1)]
        if len(head.columns) > 1:
            return dict(zip(head.columns, (probability if soft else hard).T, strict=True))
        shares = dict(zip(pseudo_rows.soft_columns(head), probability.T, strict=True)) if soft else {}
        return {head.columns[0]: probability.argmax(axis=1).astype(np.float64), **shares}
    if head.task == "ordinal":
        probability = probability.clip(0, len(head.classes) - 1)
    if head.task == "regression" or soft:
        return dict(zip(head.columns, probability.T, strict=True))
    label = head.spec.to_label(probability).reshape(len(probability), -1).astype(np.float64)
    return dict(zip(head.columns, label.T, strict=True))


def _report(frame: pd.DataFrame, rows: Samples, split: Folds) -> None:
    """Print which rows were taken, class by class, and whether the folds agree on their labels."""
    by_fold = frame[frame["fold"] != pseudo_rows.FULL]
    classes = bool((frame["label"] != "").any())
    if classes:
        _print_classes(by_fold, rows, split)
    size = by_fold.groupby("fold").size()
    by_row = by_fold.groupby("id")
    everywhere = by_row.size() == split.count
    same = ""
    if classes and rows.heads[0].classes:
        same = f", {int((by_row['label'].nunique() == 1)[everywhere].sum())} of them with one label"
    position = pd.Series(np.arange(len(rows.frame)), rows.frame["id"])
    fold = split.assignment[:, position.loc[by_fold["id"]].to_numpy()]  # (repeats, lines)
    repeat, own = np.divmod(by_fold["fold"].to_numpy(np.int64), int(split.meta["k"]))
    copy_of = fold[repeat, np.arange(len(by_fold))]
    if unused := int(((copy_of == own) | (copy_of == folds.HOLDOUT)).sum()):
        print(
            f"{unused} of these lines are not trained on: their image is a copy of one in the validation "
            "rows of "
            "their fold, or in the hold-out"
        )
    print(
        f"{size.min()} to {size.max()} of {len(rows.positions('test'))} test rows per fold; "
        f"{int(everywhere.sum())} are taken in every fold{same}"
    )


def _print_classes(by_fold: pd.DataFrame, rows: Samples, split: Folds) -> None:
    own = rows.positions("train")
    truth = pd.Series([rows.label(int(position)) for position in own]).value_counts(normalize=True)
    counts = by_fold.groupby(["label", "fold"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=range(split.count), fill_value=0)
    body = []
    for name in rows.heads[0].classes:
        count = counts.loc[name].to_numpy() if name in counts.index else np.zeros(split.count)
        confidence = by_fold.loc[by_fold["label"] == name, "confidence"].mean()
        body.append(
            [
                name,
                f"{truth.get(name, 0):.1%}",
                f"{count.sum() / len(by_fold):.1%}",
                f"{count.min():.0f}-{count.max():.0f}",
                "-" if np.isnan(confidence) else f"{confidence:.3f}",
            ]
        )
    numbers = ["of training", "of taken", "rows per fold", "confidence"]
    print(text_table.render(["class", *numbers], body, numbers))
