"""Scores of OOF predictions, computed by the same function for runs and ensembles.

Labels of ordinal and multilabel targets need cut points or thresholds. Those of a fold are fitted on its
training folds, which also decide whether fitted ones are used at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import declared_metric, nested_cv, thresholds
from comp.engine.bank.metric import Metric
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Positions, Samples, aggregate_rows, unique_rows
from comp.engine.errors import UserError
from comp.engine.store import artifacts
from comp.engine.tasks.kinds import Array, Head

if TYPE_CHECKING:
    import pandas as pd

SHARED_THRESHOLD = 100  # with more labels all share one threshold: most have too few rows to fit their own
PARTS = 5  # parts of a single training fold, to cross-validate within it
LISTED = 100  # columns of a ranking; no metric uses more


def metric_of(cfg: Config, head: Head | None = None) -> Metric:
    """The competition's metric, or that of one target. `metric: metric` is the function in
    comp/competition.py."""
    names, tasks = cfg.competition.metric, cfg.competition.tasks
    if isinstance(names, dict):
        by_target = [declared_metric.find(names[target], tasks[target]) for target in tasks]
        if len({metric.direction for metric in by_target}) > 1:
            what = f"{', '.join(names.values())} have no mean: higher is better for some, lower for others"
            raise declared_metric.error("metrics-differ", what, "use metrics of one direction")
        return declared_metric.find(names[head.name], tasks[head.name]) if head else by_target[0]
    by_task = [
        declared_metric.find(names, task) for task in ([head.task] if head else dict.fromkeys(tasks.values()))
    ]
    return by_task[0]


def check_metric(cfg: Config) -> list[UserError]:
    """Faults for comp check: of every target's metric, otherwise of all together."""
    names, faults = cfg.competition.metric, []
    for target, task in cfg.competition.tasks.items():
        try:
            declared_metric.find(names if isinstance(names, str) else names[target], task)
        except UserError as error:
            faults += error.errors
    if not faults:
        try:
            metric_of(cfg)
        except UserError as error:
            faults += error.errors
    return faults


def evaluate(cfg: Config, samples: Samples, folds: Folds, predictions: PredictionSet) -> dict[str, Any]:
    """The content of score.json.

    oof: the score of all rows at once. folds, mean, std: of the scores by fold; n folds have one. With
    several targets each number is the mean over targets. cuts: cut points or thresholds for new rows, fitted
    on all OOF rows.
    """
    assert predictions.fold is not None, "only OOF predictions are scored"
    predicted = predictions.predicted
    rows, fold = predictions.row[predicted].astype(np.int64), predictions.fold[predicted].astype(np.int64)
    scored = scored_rows(samples, rows, fold)
    table, whole, undefined, cuts = [], [], [], {}
    for head in samples.heads:
        try:
            inputs = metric_input(cfg, head, predictions.probability(head)[predicted], samples, folds, scored)
            whole.append(inputs.metric(inputs.truth, inputs.prediction, inputs.frame))
            by_fold = nested_cv.fold_table(
                inputs.metric, inputs.truth, inputs.prediction, scored.fold, inputs.frame
            )
        except MetricUndefined as error:
            undefined.append(f"{head.name}: {error}")
            continue
        table.append([score for *_, score in by_fold.folds])
        undefined += [f"{head.name}: {reason}" for reason in by_fold.undefined]
        if inputs.cuts is not None:
            cuts[head.name] = [float(cut) for cut in inputs.cuts]
    complete = len(table) == len(samples.heads)
    scores = [_mean(list(column)) for column in zip(*table, strict=True)] if complete else []
    known = [score for score in scores if score is not None]
    partial = [] if predicted.all() else ["partial"]
    return {
        "metric": ", ".join(dict.fromkeys(metric_of(cfg, head).name for head in samples.heads)),
        "direction": metric_of(cfg).direction,
        "oof": _mean(whole) if complete else None,
        "folds": scores,
        "mean": _mean(known),
        "std": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "n": len(known),
        "rows": len(scored.rows),
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
    """Samples grouped into the rows that the host scores. Truth and metadata of a row are those of its first
    sample."""

    keys: NDArray[Any]  # of every sample: the name of its row
    order: list[str]  # the names of the rows
    rows: Positions  # of every row: the position of its first sample
    fold: NDArray[np.int64]  # of every row


def scored_rows(samples: Samples, rows: Positions, fold: NDArray[np.int64]) -> ScoredRows:
    keys = samples.frame["row"].to_numpy()[rows]
    order = unique_rows(keys)
    return ScoredRows(keys, order, *_one_fold_per_row(keys, order, rows, fold))


class MetricInput(NamedTuple):
    """The arguments of one head's metric. Scores, intervals and comparisons all use these."""

    metric: Metric
    truth: NDArray[Any]
    prediction: NDArray[Any]
    frame: pd.DataFrame
    cuts: Array | None  # for new rows, where any were fitted


def metric_input(
    cfg: Config, head: Head, probability: Array, samples: Samples, folds: Folds, scored: ScoredRows
) -> MetricInput:
    """probability: of every sample."""
    metric = metric_of(cfg, head)
    aggregated = aggregate_rows(scored.keys, probability, scored.order, cfg.competition.merge)
    prediction, cuts = metric_predictions(metric, head, aggregated, samples, folds, scored.rows, scored.fold)
    truth = scored_columns(head, samples.truth(head, scored.rows))
    return MetricInput(metric, truth, prediction, metric_frame(samples, scored.rows), cuts)


def metric_predictions(
    metric: Metric,
    head: Head,
    probability: Array,
    samples: Samples,
    folds: Folds,
    rows: Positions,
    fold: NDArray[np.int64],
) -> tuple[NDArray[Any], Array | None]:
    """The prediction in the form the metric needs (probability, label, ranking or value), each fold by cut
    points of its training folds; and the cut points for new rows, if there are any."""
    if head.unknown and metric.needs in ("label", "ranking"):
        return _with_unknown(metric, head, probability, samples, folds, rows, fold)
    if not (metric.needs == "label" and (is_ordinal(head) or head.task == "multilabel")):
        return default_predictions(metric, head, probability), None
    labels = Thresholding(metric, head, probability, samples.truth(head, rows), metric_frame(samples, rows))
    fits: dict[bytes, Cuts] = {}  # the fit without folds 1 and 2 is needed for both

    def fit(at: Positions) -> Cuts:
        key = at.tobytes()
        if key not in fits:
            fits[key] = labels.fit(at)
        return fits[key]

    def fit_if_better(at: Positions) -> Cuts:
        """Fitted cut points if they score better than default ones in a cross-validation within `at`.
        Choosing by the scored rows instead would report the luckier of the two."""
        default = labels.default(at)
        inner, by_split = fold[at], True
        if len(np.unique(inner)) == 1:  # two folds, or the second fold of a split by time
            place = folds.shuffled_groups(rows[at], "parts of a fold")[1]
            inner, by_split = place * PARTS // (place.max() + 1), False
        try:
            nested = nested_predict(
                samples,
                folds,
                rows[at],
                inner,
                lambda few: fit(at[few]),
                lambda cuts, few: labels.apply(cuts, at[few]),
                default,
                by_split,
            ).prediction
            gain = labels.signed_score(nested, at) - labels.signed_score(labels.apply(default, at), at)
        except MetricUndefined:
            return default
        return fit(at) if gain > 0 else default

    no_rows = np.arange(0)
    nested = nested_predict(samples, folds, rows, fold, fit_if_better, labels.apply, labels.default(no_rows))
    return scored_columns(head, nested.prediction.astype(np.int64)), nested.final.cuts


class Cuts(NamedTuple):
    cuts: Array  # between grades, or one threshold per label
    at_least_one: bool = False  # every row gets at least one label


@dataclass(frozen=True)
class Thresholding:
    """Labels of one head from its values or probabilities. `at`: positions among the rows."""

    metric: Metric
    head: Head
    probability: Array
    truth: NDArray[Any]
    frame: pd.DataFrame

    def default(self, at: Positions) -> Cuts:
        """Rounding; at least one label per row if all rows `at` have one."""
        if self.head.task == "multilabel":
            return Cuts(np.full(len(self.head.outputs), 0.5), self._all_labelled(at))
        return Cuts(np.arange(1.0, len(self.head.classes)) - 0.5)

    def fit(self, at: Positions) -> Cuts:
        truth, value, frame = self.truth[at], self.probability[at], self.frame.iloc[at]
        if self.head.task == "multilabel":
            shared = len(self.head.outputs) > SHARED_THRESHOLD
            return Cuts(
                thresholds.fit_thresholds(truth, value, self.metric, frame, shared), self._all_labelled(at)
            )
        return Cuts(thresholds.fit_cuts(value[:, 0], truth, len(self.head.classes), self.metric, frame))

    def apply(self, cuts: Cuts, at: Positions) -> NDArray[np.int64]:
        if self.head.task == "multilabel":
            return thresholds.apply_threshold(self.probability[at], cuts.cuts, cuts.at_least_one)
        return thresholds.apply_cuts(self.probability[at, 0], cuts.cuts)

    def signed_score(self, labels: NDArray[Any], at: Positions) -> float:
        """sign * score, so that higher is better."""
        truth = scored_columns(self.head, self.truth[at])
        labels = scored_columns(self.head, labels.astype(np.int64))
        return self.metric.sign * self.metric(truth, labels, self.frame.iloc[at])

    def _all_labelled(self, at: Positions) -> bool:
        return bool(len(at) and (self.truth[at].sum(axis=1) > 0).all())


def nested_predict(
    samples: Samples,
    folds: Folds,
    rows: Positions,
    fold: NDArray[np.int64],
    fit: Callable[[Positions], Any],
    apply: Callable[[Any, Positions], NDArray[Any]],
    fallback: Any,
    by_split: bool = True,
) -> nested_cv.NestedPrediction:
    """nested_cv.nested_predict with the groups of the samples. by_split: `fold` holds the project's folds, so
    training rows are those that folds.split allows."""
    groups = groups_of(samples, rows)
    if folds.meta.get("blind_to_groups"):
        groups = None  # folds that split groups on purpose: hardly a row would be left to train on
    train_mask = (lambda k: np.isin(rows, folds.split(k)[0])) if by_split else None
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
    """Rankings in which the log probability of the unknown class is shifted; the shift is fitted on the
    training folds."""
    truth, code = samples.truth(head, rows), head.classes.index(head.unknown)

    def fit(positions: NDArray[np.int64]) -> Array:
        frame = metric_frame(samples, rows[positions])
        shift = thresholds.fit_unknown(probability[positions], truth[positions], code, metric, LISTED, frame)
        return np.array([shift])

    def apply(shift: Array, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        ranking = thresholds.with_unknown(probability[positions], code, float(shift[0]), LISTED)
        return ranking if metric.needs == "ranking" else ranking[:, 0]

    nested = nested_predict(samples, folds, rows, fold, fit, apply, np.zeros(1))
    return nested.prediction.astype(np.int64), nested.final


def metric_frame(samples: Samples, rows: Positions) -> pd.DataFrame:
    """The `rows` argument of a metric. Without the weights: they are for training, the host weighs every row
    alike."""
    return without_weights(samples.frame.iloc[rows])


def without_weights(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns="weight", errors="ignore")


def default_predictions(metric: Metric, head: Head, probability: Array) -> NDArray[Any]:
    """The prediction in the form the metric needs, without fitted parameters: ordinal values are rounded."""
    probability = scored_columns(head, probability)
    if metric.needs == "ranking":
        return np.argsort(-probability, axis=1, kind="stable")[:, :LISTED]
    if metric.needs != "label":
        return probability
    codes = head.spec.to_label(probability)
    return np.clip(codes, 0, len(head.classes) - 1) if is_ordinal(head) else codes


def scored_columns(head: Head, columns: NDArray[Any]) -> NDArray[Any]:
    """The columns that the host scores, where it does not score all of them."""
    return columns[:, head.scored_indices] if head.graded and columns.ndim == 2 else columns


def _one_fold_per_row(
    keys: NDArray[Any], order: list[str], rows: Positions, fold: NDArray[np.int64]
) -> tuple[Positions, NDArray[np.int64]]:
    if len(order) == len(rows):
        return rows, fold
    place = {key: i for i, key in reversed(list(enumerate(keys.tolist())))}
    first = np.array([place[key] for key in order], np.int64)
    fold_of = dict(zip(order, fold[first].tolist(), strict=True))
    for key, other in zip(keys.tolist(), fold.tolist(), strict=True):
        if fold_of[key] != other:
            raise UserError(
                "row-in-two-folds",
                where="data/folds.parquet",
                key=f"row {key!r}",
                what=f"has samples in folds {fold_of[key]} and {other}",
                remedy="all samples of a row must share a fold: see folds.scheme",
            )
    return rows[first], fold[first]


def is_ordinal(head: Head) -> bool:
    return head.spec.space == "value" and bool(head.classes)


def validation_score(
    cfg: Config, head: Head, stored: NDArray[Any], samples: Samples, rows: Positions
) -> float:
    """A score to follow during training, or NaN if it is undefined. Only `evaluate` computes the score called
    CV."""
    metric = metric_of(cfg, head)
    try:
        prediction = default_predictions(
            metric, head, head.spec.to_probability(np.asarray(stored, np.float64))
        )
        return metric(
            scored_columns(head, samples.truth(head, rows)), prediction, metric_frame(samples, rows)
        )
    except MetricUndefined:
        return float("nan")


def valid_text(cfg: Config, heads: Sequence[Head], report: Mapping[str, float]) -> str:
    """`, valid_loss 0.3, valid_accuracy 0.9` of a line of the log, where the metric is called valid_metric so
    that the keys of all runs are the same."""
    names = {f"valid_metric_{head.name}": f"valid_{metric_of(cfg, head).name}_{head.name}" for head in heads}
    names["valid_metric"] = f"valid_{metric_of(cfg, heads[0]).name}"
    valid = {key: value for key, value in report.items() if key.startswith("valid")}
    return "".join(f", {names.get(key, key)} {value:.4f}" for key, value in valid.items())


def summary(record: Mapping[str, Any], seeds: int = 1) -> str:
    """accuracy 0.9534 ± 0.0102 over 5 folds, OOF 0.9533. `seeds`: whose predictions were averaged first."""
    if record["oof"] is None:
        return f"{record['metric']} is undefined: {'; '.join(record['undefined']) or 'no rows'}"
    marks = f" [{', '.join(record['marks'])}]" if record["marks"] else ""
    averaged = f" ({seeds} seeds averaged)" if seeds > 1 else ""
    return (
        f"{record['metric']} {mean_std(record)} over {record['n']} folds, "
        f"OOF {record['oof']:.4f}{averaged}{marks}{_optimism(record)}"
    )


def _optimism(record: Mapping[str, Any]) -> str:
    """By how much choosing the epoch on the validation rows biased the score, where it was chosen so."""
    optimism = record.get("optimism")
    if optimism is None:
        return ""
    corrected = record["oof"] - (optimism if record["direction"] == "max" else -optimism)
    return f", optimism {optimism:+.4f} from choosing the epoch on the validation rows, corrected {corrected:.4f}"


def mean_std(record: Mapping[str, Any]) -> str:
    """0.9534 ± 0.0102"""
    if record["mean"] is None:
        return "-"
    return f"{record['mean']:.4f}" + ("" if record["std"] is None else f" ± {record['std']:.4f}")


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return float(np.mean(known)) if known and len(known) == len(scores) else None
