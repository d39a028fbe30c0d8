"""comp pseudo: test rows that a run is sure of, as a table that teaches others. For each fold by the models of this fold alone,
which never saw the rows it scores; for the refit on all data by those of all folds.
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
from comp.engine.errors import Refused
from comp.engine.run import pseudo_rows, teachers
from comp.engine.run.teachers import TeacherEnsemble
from comp.engine.store import artifacts, locks, paths
from comp.engine.tasks.kinds import VALUES, Head

SURE = 0.9  # confidence that is asked for where neither it nor a share is given


class Said(NamedTuple):
    """Of every test row that was predicted."""

    rows: Positions
    mean: PredictionSet
    confidence: NDArray[np.float64]


class Wish(NamedTuple):
    confidence: float | None
    share: float | None
    soft: bool
    weight: float


def label(
    source: str,
    *,
    table: str | None = None,
    confidence: float | None = None,
    share: float | None = None,
    soft: bool = False,
    weight: float = 1.0,
) -> None:
    """comp pseudo"""
    write(source, table or source, Wish(confidence, share, soft, weight))


def write(source: str, name: str, wish: Wish) -> None:
    rows = samples.load()
    split = folds.load(rows)
    if split.meta["rule"] == "earlier":
        raise Refused(
            "comp pseudo: these folds are by time: earlier rows teach a fold, and test rows come later, so their labels would never teach"
        )
    who = teachers.load(source, split, "comp pseudo")
    _refuse(rows.heads, wish)
    command = f"comp pseudo {source}" + "".join(
        f" --{key} {value}" for key, value in (("as", name), ("confidence", wish.confidence), ("share", wish.share), ("weight", wish.weight))
        if value not in (None, source, 1.0)
    ) + " --soft" * wish.soft  # fmt: skip
    parts, weights = [], {}
    numbers: list[int | str] = [*range(split.count), "full"]
    for number in tqdm(numbers, desc="labels", unit="fold", delay=2, leave=False, disable=None):
        said = of_fold(who, number, rows, split, wish)
        parts.append(lines(said, number, rows, wish))
        if number != "full":
            weights[str(number)] = said.mean.meta["weights"]
    frame = pd.concat(parts, ignore_index=True)
    file = paths.pseudo_file(name)
    with locks.lock(file.parent, f"writing {file.name}"):
        with artifacts.atomic(file) as temporary:
            frame.to_parquet(temporary, index=False)
        artifacts.add_to_manifest(
            file,
            samples=rows.hash,
            folds=split.hash,
            source=source,
            command=command,
            wish=wish._asdict(),
            weights=weights,
        )
    _tell(frame, rows, split)
    print(f"written: {paths.relative(file)}, from {', '.join(voice.address for voice in who.voices)}")
    run = who.voices[0].run
    print(f"next: comp train {run} --as {run}p data.pseudo={name}")


def _refuse(heads: tuple[Head, ...], wish: Wish) -> None:
    for key, value in (("--confidence", wish.confidence), ("--share", wish.share)):
        if value is not None and not 0 < value <= 1:
            raise Refused(f"{key} {value:g}: a number above 0, up to 1")
    if wish.weight <= 0:
        raise Refused(f"--weight {wish.weight:g}: must be above 0")
    if wish.soft and all(head.task == "regression" for head in heads):
        raise Refused("--soft: has no effect on values, which have no softer form; leave it out")
    if wish.soft and any(head.task == "retrieval" for head in heads):
        raise Refused("--soft: retrieval learns from one class a picture; leave it out")


def of_fold(who: TeacherEnsemble, number: int | str, rows: Samples, split: Folds, wish: Wish) -> Said:
    mean, each = teachers.merged_test_predictions(who, number, rows, split)
    there = mean.predicted
    sure = np.mean([_sure(head, mean, each, rows, wish) for head in rows.heads], axis=0)
    return Said(mean.row.astype(np.int64)[there], _taken(mean, there), sure[there])


def _taken(said: PredictionSet, there: NDArray[Any]) -> PredictionSet:
    return PredictionSet(
        said.row[there], None, {name: values[there] for name, values in said.heads.items()}, said.meta
    )


def _sure(
    head: Head, mean: PredictionSet, each: list[PredictionSet], rows: Samples, wish: Wish
) -> NDArray[np.float64]:
    """(rows,), 0 to 1: of one class its probability; of several labels the mean of how sure each is; of values how near its models are
    to each other, against how far apart the labels are."""
    if head.row.spaces is VALUES:
        if len(each) == 1 and wish.share != 1:
            raise Refused(
                f"{head.name} is a value, and one model does not say how sure it is of it: train a second seed (comp train RUN --seed 1), "
                "name an ensemble of several runs, or take every row with --share 1"
            )
        apart = teachers.spread(mean, each, head.name)
        wide = np.nanstd(rows.targets(head)[rows.positions("train")])
        return np.asarray(1 / (1 + apart / wide))
    p = mean.probability(head)
    return np.asarray(p.max(axis=1) if head.exclusive else np.maximum(p, 1 - p).mean(axis=1))


def lines(said: Said, number: int | str, rows: Samples, wish: Wish) -> pd.DataFrame:
    """The lines of one fold: of each class the surest."""
    head = rows.heads[0]
    classed = head.row.spaces is not VALUES and head.task != "multilabel"
    codes = np.zeros(len(said.rows), np.int64)
    if classed:
        codes = head.row.label(said.mean.probability(head))
    least = wish.confidence if wish.confidence is not None else SURE if wish.share is None else 0.0
    taken = np.zeros(len(said.rows), bool)
    for code in np.unique(codes):
        mine = np.flatnonzero(codes == code)
        mine = mine[np.argsort(-said.confidence[mine], kind="stable")][
            : None if wish.share is None else max(1, round(wish.share * len(mine)))
        ]
        taken[mine[said.confidence[mine] >= least]] = True
    if (
        not taken.any() and number != "full"
    ):  # a mean of all is less sure than each; then nothing teaches a refit beside its rows
        raise Refused(
            f"fold {number}: no test row is as sure as {least:g}, the surest is {said.confidence.max():.3f}; "
            f"--confidence {np.quantile(said.confidence, 0.8):.2f} would take a fifth of them, --share 0.2 a fifth of each class"
        )
    columns: dict[str, Any] = {
        "id": rows.frame["id"].to_numpy()[said.rows[taken]],
        "fold": np.full(int(taken.sum()), pseudo_rows.FULL if number == "full" else int(number), np.int16),
        "confidence": said.confidence[taken],
        "weight": wish.weight,
        "label": [head.classes[code] for code in codes[taken]] if classed and head.classes else "",
    }
    for each in rows.heads:
        columns |= labels(each, said.mean.probability(each)[taken], wish.soft)
    return pd.DataFrame(columns)


def labels(head: Head, said: NDArray[np.float64], soft: bool) -> dict[str, NDArray[np.float64]]:
    """Columns as the samples have them, and shares of classes beside a class code."""
    if head.exclusive:
        hard = np.eye(len(head.outputs))[said.argmax(axis=1)]
        if len(head.columns) > 1:
            return dict(zip(head.columns, (said if soft else hard).T, strict=True))
        shares = dict(zip(pseudo_rows.soft_columns(head), said.T, strict=True)) if soft else {}
        return {head.columns[0]: said.argmax(axis=1).astype(np.float64), **shares}
    if head.task == "ordinal":
        said = said.clip(0, len(head.classes) - 1)
    if head.task == "regression" or soft:
        return dict(zip(head.columns, said.T, strict=True))
    return dict(
        zip(head.columns, head.row.label(said).reshape(len(said), -1).astype(np.float64).T, strict=True)
    )


def _tell(frame: pd.DataFrame, rows: Samples, split: Folds) -> None:
    """What was taken, class by class, and whether the folds agree."""
    own, test = rows.positions("train"), len(rows.positions("test"))
    mine = frame[frame["fold"] != pseudo_rows.FULL]
    body = []
    if (frame["label"] != "").any():
        head = rows.heads[0]
        truth = pd.Series([rows.label(int(position)) for position in own]).value_counts(normalize=True)
        count = (
            mine.groupby(["label", "fold"])
            .size()
            .unstack(fill_value=0)
            .reindex(columns=range(split.count), fill_value=0)
        )
        for name in head.classes:
            each = count.loc[name].to_numpy() if name in count.index else np.zeros(split.count)
            sure = mine.loc[mine["label"] == name, "confidence"].mean()
            body.append([
                name, f"{truth.get(name, 0):.1%}", f"{each.sum() / len(mine):.1%}", f"{each.min():.0f}-{each.max():.0f}",
                "-" if np.isnan(sure) else f"{sure:.3f}",
            ])  # fmt: skip
        print(
            text_table.render(
                ["class", "of training", "of taken", "rows a fold", "confidence"],
                body,
                ["of training", "of taken", "rows a fold", "confidence"],
            )
        )
    size = mine.groupby("fold").size()
    by_row = mine.groupby("id")
    everywhere = by_row.size() == split.count
    same = ""
    if body:
        same = f", {int((by_row['label'].nunique() == 1)[everywhere].sum())} of them with one label"
    position = pd.Series(np.arange(len(rows.frame)), rows.frame["id"])
    fold = split.assignment[:, position.loc[mine["id"]].to_numpy()]
    k = int(split.meta["k"])
    repeat, number = np.divmod(mine["fold"].to_numpy(np.int64), k)
    where = fold[repeat, np.arange(len(mine))]
    if out := int(((where == number) | (where == folds.HOLDOUT)).sum()):
        print(
            f"{out} of these lines do not train: their image is a copy of one that their fold, or the hold-out, scores"
        )
    print(
        f"{size.min()} to {size.max()} of {test} test rows a fold; {int(everywhere.sum())} are taken in every fold{same}"
    )
