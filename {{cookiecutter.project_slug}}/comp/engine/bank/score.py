"""What a set of OOF predictions scores: the same numbers, by the same function, for runs and for ensembles.

Labels from values (grades) need cut points. Those of a fold are fitted on the folds that may teach it, and these decide too
whether fitted ones are used at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp import metrics
from comp.engine import pages
from comp.engine.bank import nested_cv, thresholds
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Positions, Samples, aggregate_rows, unique_rows
from comp.engine.errors import Refused, UserError
from comp.engine.store import artifacts
from comp.engine.tasks.kinds import TASKS, Array, Head
from comp.metrics import Metric

if TYPE_CHECKING:
    import pandas as pd

WIDE = 100  # labels; above, one threshold for all: most have too few rows for one of their own
PARTS = 5  # of a fold that has to do as several
LISTED = 100  # columns of a ranking: no metric looks further


def metric_of(cfg: Config, head: Head | None = None) -> Metric:
    """The competition's metric, or that of one target; `metric` is your own function in comp/competition.py."""
    named, tasks = cfg.competition.metric, cfg.competition.tasks
    where = "configs/competition.yaml: metric"
    if isinstance(named, dict):
        each = [_found(where, named[t], tasks[t]) for t in tasks]
        if len({metric.direction for metric in each}) > 1:
            raise Refused(
                f"{where}: {', '.join(named.values())} cannot be averaged: of some more is better, of some less"
            )
        return _found(where, named[head.name], tasks[head.name]) if head else each[0]
    kinds = [head.task] if head else list(dict.fromkeys(tasks.values()))
    found = [_found(where, named, task) for task in kinds]
    return found[0]


def _found(where: str, name: str, task: str) -> Metric:
    if name == "metric":
        hook = pages.get("metric")
        if hook is None:
            raise Refused(
                f"{where}: metric is your own function, and comp/competition.py defines none of that name"
            )
        return metrics.custom(hook)
    try:
        found = metrics.find(name)
    except UserError as refused:
        raise Refused(f"{where}: {refused}") from None
    if found.tasks and task not in found.tasks:
        fit = [m.name for m in metrics.METRICS.values() if task in m.tasks]
        raise Refused(
            f"{where}: {name} does not fit the task {task}; its own is {TASKS[task].metric}, {', '.join(fit)} fit"
        )
    return found


def evaluate(cfg: Config, samples: Samples, folds: Folds, predictions: PredictionSet) -> dict[str, Any]:
    """The record that score.json holds.

    oof: over all rows at once. folds, mean, std: fold by fold; n of them have a score. With several targets each number is
    the mean over them. cuts: what turns the values of new rows into grades, fitted on all OOF rows.
    """
    assert predictions.fold is not None, "only OOF predictions are scored"
    kept = predictions.predicted
    rows, fold = predictions.row[kept].astype(np.int64), predictions.fold[kept].astype(np.int64)
    here = scored_rows(samples, rows, fold)
    table, whole, undefined, cuts = [], [], [], {}
    for head in samples.heads:
        try:
            ask = metric_input(cfg, head, predictions.probability(head)[kept], samples, folds, here)
            whole.append(ask.metric(ask.truth, ask.prediction, ask.frame))
            by_fold = nested_cv.fold_table(ask.metric, ask.truth, ask.prediction, here.fold, ask.frame)
        except MetricUndefined as fault:
            undefined.append(f"{head.name}: {fault}")
            continue
        table.append([score for *_, score in by_fold.folds])
        undefined += [f"{head.name}: {reason}" for reason in by_fold.undefined]
        if ask.cuts is not None:
            cuts[head.name] = [float(cut) for cut in ask.cuts]
    every = len(table) == len(samples.heads)
    scores = [_mean(list(column)) for column in zip(*table, strict=True)] if every else []
    known = [score for score in scores if score is not None]
    partial = [] if kept.all() else ["partial"]
    return {
        "metric": ", ".join(dict.fromkeys(metric_of(cfg, head).name for head in samples.heads)),
        "direction": metric_of(cfg).direction,
        "oof": _mean(whole) if every else None,
        "folds": scores,
        "mean": _mean(known),
        "std": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "n": len(known),
        "rows": len(here.rows),
        "marks": sorted({*predictions.meta["marks"], *partial}),
        "undefined": undefined,
        "cuts": cuts,
        "made_for": {"samples": samples.hash, "folds": folds.hash},
    }


def write(
    folder: Path, cfg: Config, samples: Samples, folds: Folds, predictions: PredictionSet, **more: Any
) -> dict[str, Any]:
    record = evaluate(cfg, samples, folds, predictions) | more
    artifacts.write_json(folder / "score.json", record)
    artifacts.add_to_manifest(folder / "score.json")
    return record


class ScoredRows(NamedTuple):
    """Scored rows. Of several samples of one row the first speaks for all."""

    keys: NDArray[Any]  # of every sample, its row
    order: list[str]
    rows: Positions
    fold: NDArray[np.int64]


def scored_rows(samples: Samples, rows: Positions, fold: NDArray[np.int64]) -> ScoredRows:
    keys = samples.frame["row"].to_numpy()[rows]
    order = unique_rows(keys)
    return ScoredRows(keys, order, *_one_fold_a_row(keys, order, rows, fold))


class MetricInput(NamedTuple):
    """What the metric of a head is asked. A score, its interval and every comparison are of these and nothing else."""

    metric: Metric
    truth: NDArray[Any]
    prediction: NDArray[Any]
    frame: pd.DataFrame
    cuts: Array | None  # what new rows get, where anything was fitted


def metric_input(
    cfg: Config, head: Head, probability: Array, samples: Samples, folds: Folds, here: ScoredRows
) -> MetricInput:
    """probability: of every sample."""
    metric = metric_of(cfg, head)
    merged = aggregate_rows(here.keys, probability, here.order, cfg.competition.merge)
    said, cuts = metric_predictions(metric, head, merged, samples, folds, here.rows, here.fold)
    truth = scored_columns(head, samples.truth(head, here.rows))
    return MetricInput(metric, truth, said, metric_frame(samples, here.rows), cuts)


def metric_predictions(
    metric: Metric,
    head: Head,
    probability: Array,
    samples: Samples,
    folds: Folds,
    rows: Positions,
    fold: NDArray[np.int64],
) -> tuple[NDArray[Any], Array | None]:
    """What the metric takes, each fold by parameters of the folds that may teach it; and the cut points that new rows get,
    where there are any."""
    if head.unknown and metric.needs in ("label", "ranking"):
        return _with_unknown(metric, head, probability, samples, folds, rows, fold)
    if not (metric.needs == "label" and (is_ordinal(head) or head.task == "multilabel")):
        return default_predictions(metric, head, probability), None
    cut = Thresholding(metric, head, probability, samples.truth(head, rows), metric_frame(samples, rows))
    fits: dict[bytes, Cuts] = {}  # without folds 1 and 2: asked for by both

    def fit(at: Positions) -> Cuts:
        key = at.tobytes()
        if key not in fits:
            fits[key] = cut.fit(at)
        return fits[key]

    def fit_where_it_gains(at: Positions) -> Cuts:
        """Fitted cut points only where they score more than plain rounding on rows, all of `at`, that did not fit them. Chosen by
        the rows that are scored, the luckier of the two would be reported."""
        plain_ = cut.unfitted(at)
        number, rule = fold[at], True
        if len(np.unique(number)) == 1:  # two folds, or the second of a split by time
            place = folds.shuffled_groups(rows[at], "parts of a fold")[1]
            number, rule = place * PARTS // (place.max() + 1), False
        try:
            own = nested_predict(
                samples, folds, rows[at], number,
                lambda few: fit(at[few]), lambda cuts, few: cut.apply(cuts, at[few]), plain_, rule,
            ).prediction  # fmt: skip
            gain = cut.reached(own, at) - cut.reached(cut.apply(plain_, at), at)
        except MetricUndefined:
            return plain_
        return fit(at) if gain > 0 else plain_

    everywhere = np.arange(len(rows))
    found = nested_predict(
        samples, folds, rows, fold, fit_where_it_gains, cut.apply, cut.unfitted(everywhere[:0])
    )
    return scored_columns(head, found.prediction.astype(np.int64)), found.final.cuts


class Cuts(NamedTuple):
    cuts: Array  # between grades, or one threshold a label
    at_least_one: bool = False  # a row has one label at least


@dataclass(frozen=True)
class Thresholding:
    """Values or probabilities to labels, by any rows of a head."""

    metric: Metric
    head: Head
    probability: Array
    truth: NDArray[Any]
    frame: pd.DataFrame

    def unfitted(self, at: Positions) -> Cuts:
        """Plain rounding; a floor where all the rows have a label."""
        if self.head.task == "multilabel":
            return Cuts(np.full(len(self.head.outputs), 0.5), self._always_labelled(at))
        return Cuts(np.arange(1.0, len(self.head.classes)) - 0.5)

    def fit(self, at: Positions) -> Cuts:
        truth, value, frame = self.truth[at], self.probability[at], self.frame.iloc[at]
        if self.head.task == "multilabel":
            shared = len(self.head.outputs) > WIDE
            return Cuts(
                thresholds.fit_thresholds(truth, value, self.metric, frame, shared), self._always_labelled(at)
            )
        return Cuts(thresholds.fit_cuts(value[:, 0], truth, len(self.head.classes), self.metric, frame))

    def apply(self, found: Cuts, at: Positions) -> NDArray[np.int64]:
        if self.head.task == "multilabel":
            return thresholds.apply_threshold(self.probability[at], found.cuts, found.at_least_one)
        return thresholds.apply_cuts(self.probability[at, 0], found.cuts)

    def reached(self, labels: NDArray[Any], at: Positions) -> float:
        """sign * score: more is better."""
        truth, said = (scored_columns(self.head, each) for each in (self.truth[at], labels.astype(np.int64)))
        return self.metric.sign * self.metric(truth, said, self.frame.iloc[at])

    def _always_labelled(self, at: Positions) -> bool:
        return bool(len(at) and (self.truth[at].sum(axis=1) > 0).all())


def nested_predict(
    samples: Samples,
    folds: Folds,
    rows: Positions,
    fold: NDArray[np.int64],
    fit: Callable[[Positions], Any],
    apply: Callable[[Any, Positions], NDArray[Any]],
    fallback: Any,
    rule: bool = True,
) -> nested_cv.NestedPrediction:
    """honest.nested, group-aware where samples have groups, and by the rule of this project's folds where `fold` holds these."""
    groups = groups_of(samples, rows)
    if folds.meta.get("blind_to_groups"):
        groups = None  # folds that mix groups on purpose: nobody would be left to teach
    train_mask = (lambda number: np.isin(rows, folds.split(number)[0])) if rule else None
    return nested_cv.nested_predict(fold, fit, apply, train_mask=train_mask, groups=groups, fallback=fallback)


def groups_of(samples: Samples, rows: Positions) -> Any:
    return samples.frame["group"].to_numpy()[rows] if "group" in samples.frame else None


def _with_unknown(
    metric: Metric,
    head: Head,
    probability: Array,
    samples: Samples,
    folds: Folds,
    rows: Positions,
    fold: NDArray[np.int64],
) -> tuple[NDArray[Any], Array]:
    """Where the class that stands for none of the others comes in the ranking: fitted on the folds that may teach."""
    truth, code = samples.truth(head, rows), head.classes.index(head.unknown)

    def fit(positions: NDArray[np.int64]) -> Array:
        frame = metric_frame(samples, rows[positions])
        shift = thresholds.fit_unknown(probability[positions], truth[positions], code, metric, LISTED, frame)
        return np.array([shift])

    def apply(shift: Array, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        ranking = thresholds.with_unknown(probability[positions], code, float(shift[0]), LISTED)
        return ranking if metric.needs == "ranking" else ranking[:, 0]

    found = nested_predict(samples, folds, rows, fold, fit, apply, np.zeros(1))
    return found.prediction.astype(np.int64), found.final


def metric_frame(samples: Samples, rows: Positions) -> pd.DataFrame:
    """What a metric sees of the rows. The weights teach; the host scores every row alike."""
    return without_weights(samples.frame.iloc[rows])


def without_weights(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns="weight", errors="ignore")


def default_predictions(metric: Metric, head: Head, probability: Array) -> NDArray[Any]:
    """What the metric takes, with nothing fitted: grades by rounding."""
    probability = scored_columns(head, probability)
    if metric.needs == "ranking":
        return np.argsort(-probability, axis=1, kind="stable")[:, :LISTED]
    if metric.needs != "label":
        return probability
    codes = head.row.label(probability)
    return np.clip(codes, 0, len(head.classes) - 1) if is_ordinal(head) else codes


def scored_columns(head: Head, columns: NDArray[Any]) -> NDArray[Any]:
    """What the host scores of several columns."""
    return columns[:, head.scored] if head.graded and columns.ndim == 2 else columns


def _one_fold_a_row(
    keys: NDArray[Any], order: list[str], rows: Positions, fold: NDArray[np.int64]
) -> tuple[Positions, NDArray[np.int64]]:
    if len(order) == len(rows):
        return rows, fold
    place = {key: i for i, key in reversed(list(enumerate(keys.tolist())))}
    first = np.array([place[key] for key in order], np.int64)
    mine = dict(zip(order, fold[first].tolist(), strict=True))
    for key, number in zip(keys.tolist(), fold.tolist(), strict=True):
        if mine[key] != number:
            raise Refused(
                f"row {key!r} stands in folds {mine[key]} and {number}: its samples must share one, see folds.scheme"
            )
    return rows[first], fold[first]


def is_ordinal(head: Head) -> bool:
    return head.row.space == "value" and bool(head.classes)


def validation_score(
    cfg: Config, head: Head, stored: NDArray[Any], samples: Samples, rows: Positions
) -> float:
    """A number to watch during training; NaN where the rows have none. The score called CV comes from `of` alone."""
    metric = metric_of(cfg, head)
    try:
        said = default_predictions(metric, head, head.row.probability(np.asarray(stored, np.float64)))
        return metric(scored_columns(head, samples.truth(head, rows)), said, metric_frame(samples, rows))
    except MetricUndefined:
        return float("nan")


def summary(record: Mapping[str, Any]) -> str:
    """accuracy 0.9534 ± 0.0102 over 5 folds, 0.9533 over all rows"""
    if record["oof"] is None:
        return f"{record['metric']} is undefined: {'; '.join(record['undefined']) or 'no rows'}"
    marks = f" [{', '.join(record['marks'])}]" if record["marks"] else ""
    return f"{record['metric']} {mean_std(record)} over {record['n']} folds, {record['oof']:.4f} over all rows{marks}{_flattery(record)}"


def _flattery(record: Mapping[str, Any]) -> str:
    """What is left of a score whose weights were chosen on the scored rows."""
    optimism = record.get("optimism")
    if optimism is None:
        return ""
    left = record["oof"] - (optimism if record["direction"] == "max" else -optimism)
    return f", about {abs(optimism):.4f} too {'good' if optimism >= 0 else 'bad'} by the choice: {left:.4f}"


def mean_std(record: Mapping[str, Any]) -> str:
    """0.9534 ± 0.0102"""
    if record["mean"] is None:
        return "-"
    return f"{record['mean']:.4f}" + ("" if record["std"] is None else f" ± {record['std']:.4f}")


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return float(np.mean(known)) if known and len(known) == len(scores) else None
