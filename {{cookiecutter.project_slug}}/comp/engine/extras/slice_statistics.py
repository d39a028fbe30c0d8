"""Statistics of a slice for comp slices: score, confidence interval, and a test of whether it differs from
the other rows.

Intervals are of each slice by itself: Wilson's for a share of correct rows, else a bootstrap. The test is
Fisher's exact test for a share, else a permutation test against random sets of as many rows. p-values are
corrected by Holm for the number of slices, so that on data without any difference no slice is reported in 9
of 10 cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import nested_cv
from comp.engine.bank.metric import Metric
from comp.engine.bank.metric_formulas import MetricUndefined

if TYPE_CHECKING:
    import pandas as pd

MIN_GROUPS = 5  # of a slice, to resample its groups instead of its rows
RESAMPLES = 400  # of a bootstrap interval
LEVEL = 0.9  # of an interval
ALPHA = 0.1  # probability that any slice is reported if none differs
EXTREME = (
    20  # random sets at least as far from the whole, after which a test stops: the slice is not significant
)
Positions = NDArray[np.int64]


@dataclass(frozen=True)
class SliceScorer:
    """A metric, with its inputs for all rows."""

    metric: Metric
    truth: NDArray[Any]
    prediction: NDArray[Any]
    frame: pd.DataFrame
    groups: Positions | None  # errors of rows of one group are correlated

    def score(self, at: Positions) -> float:
        return self.metric(self.truth[at], self.prediction[at], self.frame.iloc[at])

    @cached_property
    def whole(self) -> float:
        return self.metric(self.truth, self.prediction, self.frame)

    @cached_property
    def correct(self) -> NDArray[np.float64] | None:
        """0 or 1 for every row, if the metric is an accuracy."""
        if self.metric.kind != "row" or self.metric.name.partition("@")[0] != "accuracy":
            return None
        values: NDArray[np.float64] = self.metric.function(*self.metric.validate(self.truth, self.prediction))
        return values

    def groups_of(self, at: Positions) -> Positions | None:
        """Groups to resample; None for a slice with too few, for example one that is a group itself."""
        if self.groups is None or len(np.unique(self.groups[at])) < MIN_GROUPS:
            return None
        return self.groups


def group_codes(groups: NDArray[Any] | None) -> Positions | None:
    return None if groups is None else nested_cv.group_codes(groups)


def describe(scorer: SliceScorer, at: Positions, comparisons: int) -> dict[str, float]:
    """score, low, high, all, gain and the uncorrected p; NaN and 1.0 where the metric is undefined, as for
    one class only."""
    try:
        value, (low, high) = scorer.score(at), interval(scorer, at)
        if scorer.correct is None:
            p = permutation_test(scorer, at, comparisons)
        else:
            p = fisher_test(scorer, at)
    except MetricUndefined:
        value, low, high, p = np.nan, np.nan, np.nan, 1.0
    gain = scorer.metric.sign * (value - scorer.whole)
    return {"score": value, "low": low, "high": high, "all": scorer.whole, "gain": gain, "p": p}


def correct_p_values(lines: list[dict[str, Any]]) -> None:
    """Replaces p by "p (Holm)", corrected for all slices, and gain by "against all": worse, better or
    nothing."""
    for line, p in zip(lines, nested_cv.holm(np.array([line["p"] for line in lines])), strict=True):
        direction = "better" if line.pop("gain") > 0 else "worse"
        del line["p"]
        line |= {"p (Holm)": float(p), "against all": direction if p <= ALPHA else ""}


def interval(scorer: SliceScorer, at: Positions) -> tuple[float, float]:
    if scorer.correct is not None:
        rows = len(at) / _design_effect(scorer, at)
        return nested_cv.wilson(float(scorer.correct[at].mean()) * rows, rows, LEVEL)
    groups = scorer.groups_of(at)
    found = nested_cv.bootstrap(
        scorer.metric,
        scorer.truth[at],
        scorer.prediction[at],
        None if groups is None else groups[at],
        RESAMPLES,
        rows=scorer.frame.iloc[at],
        level=LEVEL,
    )
    return found.low, found.high


def fisher_test(scorer: SliceScorer, at: Positions) -> float:
    """p-value of the number of correct rows in the slice, against the other rows."""
    from scipy.stats import fisher_exact

    assert scorer.correct is not None
    inside = np.zeros(len(scorer.correct), bool)
    inside[at] = True
    table = [[(scorer.correct[part] == value).sum() for value in (1, 0)] for part in (inside, ~inside)]
    return float(fisher_exact(np.rint(np.array(table) / _design_effect(scorer, at)).astype(np.int64))[1])


def _design_effect(scorer: SliceScorer, at: Positions) -> float:
    """How many rows of groups carry the information of one independent row (Kish), at least 1. From the
    residuals after the difference between the slice and the rest, which the test is about, is removed."""
    groups = scorer.groups_of(at)
    if groups is None or scorer.correct is None:
        return 1.0
    inside = np.zeros(len(groups), bool)
    inside[at] = True
    residual = scorer.correct.copy()
    for part in (inside, ~inside):
        residual[part] -= residual[part].mean() if part.any() else 0.0
    by_row, count = float((residual**2).sum()), len(np.unique(groups))
    by_group = float((np.bincount(groups, residual) ** 2).sum()) * count / (count - 1)
    return max(1.0, by_group / by_row) if by_row > 0 else 1.0


def permutation_test(scorer: SliceScorer, at: Positions, comparisons: int) -> float:
    """p-value of the slice's distance from the whole among random sets of as many rows, or of random groups
    if the slice is made of whole ones. It stops early once the slice is clearly not significant (Besag and
    Clifford 1991)."""
    groups, random = scorer.groups_of(at), np.random.default_rng(0)
    if groups is not None and np.isin(groups, groups[at]).sum() > len(at):
        groups = None  # the slice has parts of groups
    distance, extreme, drawn = abs(scorer.score(at) - scorer.whole), 0, 0
    for _ in range(
        int(np.ceil(5 * comparisons / ALPHA))
    ):  # enough for a p-value that survives the correction
        if groups is None:
            sample = random.choice(len(scorer.truth), len(at), replace=False)
        else:
            sizes = np.bincount(groups)
            order = random.permutation(len(sizes))
            count = int(np.abs(np.cumsum(sizes[order]) - len(at)).argmin()) + 1
            sample = np.flatnonzero(np.isin(groups, order[:count]))
        try:
            extreme += abs(scorer.score(sample) - scorer.whole) >= distance - 1e-12
        except MetricUndefined:
            continue
        drawn += 1
        if extreme == EXTREME:
            return extreme / drawn
    return (extreme + 1) / (drawn + 1)
