"""Nested cross-validation, bootstrap intervals, paired comparisons and scores by fold.

Everything that is fitted on OOF predictions (cut points, thresholds, calibration, blend weights, stackers)
goes through nested_predict(), so that no row is scored with parameters that were fitted on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import metric_formulas
from comp.engine.bank.metric import Metric, sample_weights
from comp.engine.bank.metric_formulas import Array, MetricUndefined

CONFIDENCE = 0.95  # a comparison is significant if one side wins at least this share of the resamples


class NestedPrediction(NamedTuple):
    prediction: (
        Array  # float64, out of sample; NaN in rows without a fold and of unfitted folds without a fallback
    )
    parameters: dict[int, Any]  # by fold
    final: Any  # fitted on the rows of all folds; used for test rows
    unfitted: tuple[int, ...]  # folds without training rows: the first one of a split by time


def nested_predict(
    fold: Array,
    fit: Callable[[NDArray[np.int64]], Any],
    apply: Callable[[Any, NDArray[np.int64]], Array],
    *,
    train_mask: Callable[[int], Array] | None = None,
    groups: Any = None,
    fallback: Any = None,
) -> NestedPrediction:
    """Predict each fold with parameters fitted on the other folds.

    fit(positions) -> parameters; apply(parameters, positions) -> predictions of these rows.

    fold        of every row; rows below 0 are neither trained on nor predicted
    train_mask  fold -> mask of its training rows, for splits that exclude more than the fold itself
    groups      of every row: rows that share a group with the fold are excluded from its training rows
    fallback    parameters for folds without training rows
    """
    fold = np.asarray(fold)
    group = None if groups is None else group_codes(groups)
    prediction: Array | None = None
    parameters, unfitted = {}, []
    for k in (int(value) for value in np.unique(fold[fold >= 0])):
        in_fold = fold == k
        train = (fold >= 0) & ~in_fold
        if train_mask is not None:
            mask = np.asarray(train_mask(k), dtype=bool)
            assert not (mask & in_fold).any(), f"train_mask({k}) contains rows of fold {k}"
            train &= mask
        if group is not None:
            train &= ~np.isin(group, group[in_fold])
        if train.any():
            parameters[k] = fit(np.flatnonzero(train))
        else:
            unfitted.append(k)
            if fallback is None:
                continue
            parameters[k] = fallback
        positions = np.flatnonzero(in_fold)
        values = np.asarray(apply(parameters[k], positions), dtype=np.float64)
        assert len(values) == len(positions), (
            f"apply returned {len(values)} rows for {len(positions)} of fold {k}"
        )
        if prediction is None:
            prediction = np.full((len(fold), *values.shape[1:]), np.nan)
        prediction[positions] = values
    if prediction is None:
        raise MetricUndefined("no fold has training rows in another fold")
    return NestedPrediction(prediction, parameters, fit(np.flatnonzero(fold >= 0)), tuple(unfitted))


def group_codes(groups: Any) -> NDArray[np.int64]:
    """Groups as integer codes from 0; each row without a group gets a code of its own."""
    import pandas as pd

    codes = pd.factorize(np.asarray(groups))[0].astype(np.int64)
    missing = codes < 0
    codes[missing] = codes.max(initial=-1) + 1 + np.arange(missing.sum())
    return codes


def bootstrap_counts(rows: int, groups: Any, n: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """n bootstrap samples, each as the number of times every row is drawn. With groups, whole groups are
    drawn."""
    codes = None if groups is None else group_codes(groups)
    num_units = rows if codes is None else int(codes.max(initial=-1)) + 1
    if num_units < 2:
        raise MetricUndefined(
            f"there is only one {'group' if codes is not None else 'row'}, so nothing to resample"
        )
    random = np.random.default_rng(seed)
    for _ in range(n):
        counts = np.bincount(random.integers(0, num_units, num_units), minlength=num_units)
        yield counts if codes is None else counts[codes]


def bootstrap_scorer(
    metric: Metric, truth: Array, prediction: Array, rows: Any = None
) -> Callable[[NDArray[np.int64]], float]:
    """counts -> score of a bootstrap sample. What is equal for all samples (logarithms, sorting) is computed
    once."""
    truth, prediction = metric.validate(truth, prediction)
    if metric.kind == "custom":

        def repeated(counts: NDArray[np.int64]) -> float:
            drawn = np.repeat(np.arange(len(truth)), counts)
            return metric(truth[drawn], prediction[drawn], None if rows is None else rows.iloc[drawn])

        return repeated
    weight = sample_weights(rows, len(truth))
    if metric.kind == "row":
        values = metric.function(truth, prediction)
        return lambda counts: metric_formulas.weighted_mean(values, weight * counts, metric.finish)
    if metric.kind == "curve":
        columns = []
        for known, target, score in metric_formulas.binary_columns(truth, prediction):
            order = np.argsort(-score, kind="stable")
            starts = np.flatnonzero(np.append(True, np.diff(score[order]) != 0)) if len(order) else order
            mass = weight[known[order]]
            columns.append((known[order], mass * target[order], mass * (1 - target[order]), starts))

        def drawn_columns(counts: NDArray[np.int64]) -> Iterator[tuple[Array, Array]]:
            for at, positive, negative, starts in columns:
                here = counts[at]
                drawn = positive * here, negative * here
                if len(starts) < len(at):  # ties
                    drawn = np.add.reduceat(drawn[0], starts), np.add.reduceat(drawn[1], starts)
                yield drawn

        return lambda counts: metric_formulas.mean_curve(
            metric.function, metric.skip_undefined, drawn_columns(counts)
        )
    return lambda counts: metric.weighted_score(truth, prediction, weight * counts)


class Interval(NamedTuple):
    score: float
    low: float
    high: float
    error: float  # bootstrap standard error
    level: float
    n: int  # resamples with a score
    failed: int  # resamples without one, because a class was missing

    def __str__(self) -> str:
        places = decimals(self.error)
        return f"{self.score:.{places}f} ({self.low:.{places}f} to {self.high:.{places}f})"


def bootstrap(
    metric: Metric,
    truth: Array,
    prediction: Array,
    groups: Any = None,
    n: int = 1000,
    seed: int = 0,
    rows: Any = None,
    level: float = 0.9,
) -> Interval:
    """The score with its bootstrap interval over rows; with groups, over groups."""
    score = metric(truth, prediction, rows)
    (scores,), failed = _resampled(
        [bootstrap_scorer(metric, truth, prediction, rows)], bootstrap_counts(len(truth), groups, n, seed), n
    )
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return Interval(score, float(low), float(high), float(scores.std(ddof=1)), level, len(scores), failed)


def wilson(right: float, rows: float, level: float = 0.9) -> tuple[float, float]:
    """Wilson interval of a proportion. Unlike a bootstrap it has a width where all rows are right, or
    none."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, shrink = right / rows, 1 + z**2 / rows
    middle = (share + z**2 / (2 * rows)) / shrink
    reach = z / shrink * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    return 0.0 if right == 0 else middle - reach, 1.0 if right == rows else middle + reach


def holm(p_values: Array) -> Array:
    """p-values corrected for multiple tests (Holm 1979): with those at most alpha rejected, the family-wise
    error is alpha."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))), 1.0)
    return adjusted


class Paired(NamedTuple):
    difference: float  # above 0: a is better, whatever the direction of the metric
    error: float  # bootstrap standard error of the difference
    share: float  # of resamples in which a is better; ties count half
    low: float
    high: float
    n: int

    @property
    def significant(self) -> bool:
        return max(self.share, 1 - self.share) >= CONFIDENCE

    def __str__(self) -> str:
        places = decimals(self.error)
        amount = f"{abs(self.difference):.{places}f} ± {self.error:.{places}f}"
        if self.difference == 0 and self.error == 0:
            return "identical scores"
        if not self.significant:
            sign = "-" if self.difference < 0 else "+"
            return f"within noise ({sign}{amount}, P(better) = {100 * self.share:.0f} %)"
        share = max(self.share, 1 - self.share)
        percent = "> 99 %" if share > 0.99 else f"= {100 * share:.0f} %"
        word = "better" if self.share > 0.5 else "worse"
        return f"{word} by {amount}, P({word}) {percent}"


def paired(
    metric: Metric,
    truth: Array,
    a: Array,
    b: Array,
    groups: Any = None,
    n: int = 1000,
    seed: int = 0,
    rows: Any = None,
    level: float = 0.9,
) -> Paired:
    """Is a better than b? Both are scored on the same resamples, so that easy and hard resamples cancel."""
    difference = metric.sign * (metric(truth, a, rows) - metric(truth, b, rows))
    both = [bootstrap_scorer(metric, truth, prediction, rows) for prediction in (a, b)]
    scores, _ = _resampled(both, bootstrap_counts(len(truth), groups, n, seed), n)
    gains = metric.sign * (scores[0] - scores[1])
    low, high = np.quantile(gains, [(1 - level) / 2, (1 + level) / 2])
    share = float(np.mean(gains > 0) + np.mean(gains == 0) / 2)
    return Paired(float(difference), float(gains.std(ddof=1)), share, float(low), float(high), len(gains))


def _resampled(scorers: list[Callable[..., float]], draws: Iterable[Array], n: int) -> tuple[Array, int]:
    from tqdm import tqdm

    scores, failed, reason = [], 0, ""
    for counts in tqdm(draws, total=n, desc="resampling", delay=2, disable=None, leave=False):
        try:
            scores.append([score(counts) for score in scorers])
        except MetricUndefined as error:
            failed, reason = failed + 1, str(error)
    if len(scores) < max(2, n / 2):
        raise MetricUndefined(
            f"{failed} of {n} resamples have no score ({reason}): too few rows of some class for an interval"
        )
    return np.array(scores).T, failed


class FoldTable(NamedTuple):
    folds: tuple[tuple[int, int, float | None], ...]  # fold, rows, score
    mean: float
    std: float | None  # over folds; None for a single fold
    undefined: tuple[str, ...]  # one reason for each fold without a score

    @property
    def n(self) -> int:
        return len(self.folds) - len(self.undefined)

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.4f}"
        undefined = f", {len(self.undefined)} undefined" if self.undefined else ""
        return f"{self.mean:.4f}{spread} ({self.n} fold{'s' * (self.n != 1)}{undefined})"


def fold_table(metric: Metric, truth: Array, prediction: Array, fold: Array, rows: Any = None) -> FoldTable:
    """The score of each fold. Rows of a fold below 0 are not scored."""
    truth, prediction, fold = np.asarray(truth), np.asarray(prediction), np.asarray(fold)
    lines: list[tuple[int, int, float | None]] = []
    undefined = []
    for k in (int(value) for value in np.unique(fold[fold >= 0])):
        at = np.flatnonzero(fold == k)
        try:
            score = metric(truth[at], prediction[at], None if rows is None else rows.iloc[at])
            lines.append((k, len(at), score))
        except MetricUndefined as error:
            lines.append((k, len(at), None))
            undefined.append(f"fold {k}: {error}")
    scores = [score for *_, score in lines if score is not None]
    if not scores:
        raise MetricUndefined("; ".join(undefined) or "no row belongs to a fold")
    std = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return FoldTable(tuple(lines), float(np.mean(scores)), std, tuple(undefined))


def decimals(error: float) -> int:
    """Decimal places that show two digits of the error; at least four."""
    return 4 if not error > 0 else min(max(4, 1 - math.floor(math.log10(error))), 12)
