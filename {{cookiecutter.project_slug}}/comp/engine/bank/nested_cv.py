"""What a score is worth: parameters that never saw the rows they are scored on, intervals, comparisons, folds.

Whatever is fitted on OOF predictions (cut points and thresholds of decide.py, calibration, weights, stackers) goes
through nested().
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import metric_formulas
from comp.engine.bank.metric_formulas import Array, MetricUndefined
from comp.metrics import Metric, sample_weights

CONFIDENCE = 0.95  # share of resamples in which one must beat the other before it is called better


class NestedPrediction(NamedTuple):
    prediction: Array  # float64, out of sample; NaN in rows of no fold and of unfitted folds
    parameters: dict[int, Any]  # by fold
    final: Any  # fitted on the rows of all folds: what test rows get
    unfitted: tuple[int, ...]  # folds for which no other fold may teach: the first of a split by time


def nested_predict(
    fold: Array,
    fit: Callable[[NDArray[np.int64]], Any],
    apply: Callable[[Any, NDArray[np.int64]], Array],
    *,
    train_mask: Callable[[int], Array] | None = None,
    groups: Any = None,
    fallback: Any = None,
) -> NestedPrediction:
    """fit(positions) -> parameters, from the rows of other folds; apply(parameters, positions) -> what a fold gets.

    fold     of every row; rows below 0 neither teach nor are scored
    train_mask  fold -> mask of the rows that may teach it, for rules that forbid more than the fold itself
    groups   of every row: a group with rows in the fold does not teach it either
    fallback parameters for folds that nothing may teach
    """
    fold = np.asarray(fold)
    group = None if groups is None else group_codes(groups)
    prediction: Array | None = None
    parameters, unfitted = {}, []
    for number in (int(each) for each in np.unique(fold[fold >= 0])):
        mine = fold == number
        taught = (fold >= 0) & ~mine
        if train_mask is not None:
            mask = np.asarray(train_mask(number), dtype=bool)
            assert not (mask & mine).any(), f"train_mask({number}) lets rows of fold {number} teach it"
            taught &= mask
        if group is not None:
            taught &= ~np.isin(group, group[mine])
        if taught.any():
            parameters[number] = fit(np.flatnonzero(taught))
        else:
            unfitted.append(number)
            if fallback is None:
                continue
            parameters[number] = fallback
        positions = np.flatnonzero(mine)
        said = np.asarray(apply(parameters[number], positions), dtype=np.float64)
        assert len(said) == len(positions), (
            f"apply gave {len(said)} rows for {len(positions)} of fold {number}"
        )
        if prediction is None:
            prediction = np.full((len(fold), *said.shape[1:]), np.nan)
        prediction[positions] = said
    if prediction is None:
        raise MetricUndefined("no fold has another one to learn from")
    return NestedPrediction(prediction, parameters, fit(np.flatnonzero(fold >= 0)), tuple(unfitted))


def group_codes(groups: Any) -> NDArray[np.int64]:
    """Groups as codes from 0; a row without a group is a group of its own."""
    import pandas as pd

    codes = pd.factorize(np.asarray(groups))[0].astype(np.int64)
    alone = codes < 0
    codes[alone] = codes.max(initial=-1) + 1 + np.arange(alone.sum())
    return codes


def bootstrap_counts(rows: int, groups: Any, n: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each row is drawn, n times; whole groups are drawn where there are any."""
    codes = None if groups is None else group_codes(groups)
    num_units = rows if codes is None else int(codes.max(initial=-1)) + 1
    if num_units < 2:
        raise MetricUndefined(f"{'one group' if codes is not None else 'one row'} only: nothing to resample")
    random = np.random.default_rng(seed)
    for _ in range(n):
        times = np.bincount(random.integers(0, num_units, num_units), minlength=num_units)
        yield times if codes is None else times[codes]


def bootstrap_scorer(
    metric: Metric, truth: Array, prediction: Array, rows: Any = None
) -> Callable[[NDArray[np.int64]], float]:
    """times -> score of the rows drawn so often. What no draw changes (logarithms, sorting) is done once."""
    truth, prediction = metric.validate(truth, prediction)
    if metric.kind == "custom":

        def copied(times: NDArray[np.int64]) -> float:
            picked = np.repeat(np.arange(len(truth)), times)
            return metric(truth[picked], prediction[picked], None if rows is None else rows.iloc[picked])

        return copied
    weight = sample_weights(rows, len(truth))
    if metric.kind == "row":
        values = metric.function(truth, prediction)
        return lambda times: metric_formulas.weighted_mean(values, weight * times, metric.finish)
    if metric.kind == "curve":
        parts = []
        for graded, target, score in metric_formulas.binary_columns(truth, prediction):
            order = np.argsort(-score, kind="stable")
            starts = np.flatnonzero(np.append(True, np.diff(score[order]) != 0)) if len(order) else order
            mass = weight[graded[order]]
            parts.append((graded[order], mass * target[order], mass * (1 - target[order]), starts))

        def tallies(times: NDArray[np.int64]) -> Iterator[tuple[Array, Array]]:
            for kept, positive, negative, starts in parts:
                here = times[kept]
                drawn = positive * here, negative * here
                if len(starts) < len(kept):  # ties
                    drawn = np.add.reduceat(drawn[0], starts), np.add.reduceat(drawn[1], starts)
                yield drawn

        return lambda times: metric_formulas.mean_curve(
            metric.function, metric.skip_undefined, tallies(times)
        )
    return lambda times: metric.weighted(truth, prediction, weight * times)


class Interval(NamedTuple):
    score: float
    low: float
    high: float
    error: float  # standard deviation over resamples
    level: float
    n: int  # resamples with a score
    failed: int  # resamples without one, for want of a class

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
    """The score and where it would lie on other rows of the same kind; with groups, on other groups."""
    score = metric(truth, prediction, rows)
    (scores,), failed = _resampled(
        [bootstrap_scorer(metric, truth, prediction, rows)], bootstrap_counts(len(truth), groups, n, seed), n
    )
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return Interval(score, float(low), float(high), float(scores.std(ddof=1)), level, len(scores), failed)


def wilson(right: float, rows: float, level: float = 0.9) -> tuple[float, float]:
    """The interval of a share: unlike a bootstrap it has a width where all rows are right, or none."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, shrink = right / rows, 1 + z**2 / rows
    middle = (share + z**2 / (2 * rows)) / shrink
    reach = z / shrink * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    return 0.0 if right == 0 else middle - reach, 1.0 if right == rows else middle + reach


def holm(p_values: Array) -> Array:
    """p-values corrected for how many there are (Holm 1979): those at most alpha are wrong, any of them, with probability alpha."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))), 1.0)
    return adjusted


class Paired(NamedTuple):
    difference: float  # above 0: a is better, whatever the direction of the metric
    error: float
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
        if not self.significant:
            return f"within noise ({'-' if self.difference < 0 else '+'}{amount}, {100 * self.share:.0f} %)"
        sure = max(self.share, 1 - self.share)
        percent = ">99 %" if sure > 0.99 else f"{100 * sure:.0f} %"
        return f"{'better' if self.share > 0.5 else 'worse'} by {amount}, {percent}"


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
    """Is a better than b? Both are scored on the same draws, so what is merely an easy draw cancels."""
    difference = metric.sign * (metric(truth, a, rows) - metric(truth, b, rows))
    both = [bootstrap_scorer(metric, truth, each, rows) for each in (a, b)]
    scores, _ = _resampled(both, bootstrap_counts(len(truth), groups, n, seed), n)
    gains = metric.sign * (scores[0] - scores[1])
    low, high = np.quantile(gains, [(1 - level) / 2, (1 + level) / 2])
    share = float(np.mean(gains > 0) + np.mean(gains == 0) / 2)
    return Paired(float(difference), float(gains.std(ddof=1)), share, float(low), float(high), len(gains))


def _resampled(scorers: list[Callable[..., float]], draws: Iterable[Array], n: int) -> tuple[Array, int]:
    from tqdm import tqdm

    scores, failed, why = [], 0, ""
    for times in tqdm(draws, total=n, desc="resampling", delay=2, disable=None, leave=False):
        try:
            scores.append([score(times) for score in scorers])
        except MetricUndefined as fault:
            failed, why = failed + 1, str(fault)
    if len(scores) < max(2, n / 2):
        raise MetricUndefined(
            f"{failed} of {n} resamples have no score ({why}): too few rows of a kind for an interval"
        )
    return np.array(scores).T, failed


class FoldTable(NamedTuple):
    folds: tuple[tuple[int, int, float | None], ...]  # fold, rows, score
    mean: float
    std: float | None  # over folds; None for a single one
    undefined: tuple[str, ...]  # why a fold has no score

    @property
    def n(self) -> int:
        return len(self.folds) - len(self.undefined)

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.4f}"
        left_out = f", {len(self.undefined)} undefined" if self.undefined else ""
        return f"{self.mean:.4f}{spread} ({self.n} fold{'s' * (self.n != 1)}{left_out})"


def fold_table(metric: Metric, truth: Array, prediction: Array, fold: Array, rows: Any = None) -> FoldTable:
    """Rows of a fold below 0 are not scored."""
    truth, prediction, fold = np.asarray(truth), np.asarray(prediction), np.asarray(fold)
    lines: list[tuple[int, int, float | None]] = []
    undefined = []
    for number in (int(each) for each in np.unique(fold[fold >= 0])):
        mine = np.flatnonzero(fold == number)
        try:
            score = metric(truth[mine], prediction[mine], None if rows is None else rows.iloc[mine])
            lines.append((number, len(mine), score))
        except MetricUndefined as fault:
            lines.append((number, len(mine), None))
            undefined.append(f"fold {number}: {fault}")
    scores = [score for *_, score in lines if score is not None]
    if not scores:
        raise MetricUndefined(*undefined or ["no row belongs to a fold"])
    std = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return FoldTable(tuple(lines), float(np.mean(scores)), std, tuple(undefined))


def decimals(error: float) -> int:
    """Enough to see two digits of the error, four at least."""
    return 4 if not error > 0 else min(max(4, 1 - math.floor(math.log10(error))), 12)
