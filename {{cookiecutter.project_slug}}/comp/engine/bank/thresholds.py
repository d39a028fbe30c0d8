"""Labels from numbers: cut points for ordinal values and thresholds for probabilities, each the exact
optimum.

An exact optimum also fits the noise of its rows, so score it with nested_cv.nested_predict, never on the rows
it was fitted on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from comp.engine.bank import metric_formulas
from comp.engine.bank.metric import Metric, as_float_array, sample_weights, validate_finite
from comp.engine.bank.metric_formulas import Array, MetricUndefined

GRID = 128  # candidates for metrics without an exact solution; each costs one call of the metric


def apply_cuts(value: ArrayLike, cuts: ArrayLike) -> NDArray[np.int64]:
    """Grade g for values from cuts[g - 1] (included) up to cuts[g]."""
    value = as_float_array(value, "value")
    validate_finite(value, "value")
    return np.searchsorted(np.asarray(cuts, np.float64), value, side="right").astype(np.int64)


def fit_cuts(value: ArrayLike, truth: ArrayLike, num_grades: int, metric: Metric, rows: Any = None) -> Array:
    """(num_grades - 1) non-decreasing cut points. Exact for qwk, accuracy and balanced_accuracy; for any
    other metric the best of those three and of plain rounding, by that metric."""
    value, truth = as_float_array(value, "value"), as_float_array(truth, "truth")
    validate_finite(value, "value")
    metric_formulas.class_codes(truth, num_grades)
    mass = sample_weights(rows, len(truth))
    levels, place = np.unique(value, return_inverse=True)

    def cheapest(cost: Callable[[int], Array]) -> Array:
        return _between(levels)[_boundaries(place, len(levels), num_grades, cost)]

    def accuracy() -> Array:
        return cheapest(lambda grade: mass * (truth != grade))

    def balanced_accuracy() -> Array:
        share = mass / np.maximum(
            np.bincount(truth.astype(np.int64), mass)[truth.astype(np.int64)], metric_formulas.SMALLEST
        )
        return cheapest(lambda grade: share * (truth != grade))

    def qwk() -> Array:
        # QWK is a ratio of two sums over rows. Dinkelbach: maximise numerator - ratio * denominator for the
        # ratio reached so far; the result has a higher ratio, until none has. Each round is exact, so the
        # result is the global optimum.
        mean = mass @ truth / mass.sum()

        def at_ratio(ratio: float) -> tuple[float, Array]:
            cuts = cheapest(
                lambda grade: mass * (ratio * (grade - mean) ** 2 - 2 * (truth - mean) * (grade - mean))
            )
            return metric_formulas.qwk(truth, apply_cuts(value, cuts).astype(np.float64), mass), cuts

        return _dinkelbach(at_ratio)

    exact = {"qwk": qwk, "accuracy": accuracy, "balanced_accuracy": balanced_accuracy}
    if metric.name in exact and metric.kind != "custom":
        return exact[metric.name]()
    candidates = [np.arange(1, num_grades) - 0.5, *(fit() for fit in exact.values())]
    scores = [metric.sign * metric(truth, apply_cuts(value, cuts), rows) for cuts in candidates]
    return candidates[int(np.argmax(scores))]


def _dinkelbach(at_ratio: Callable[[float], tuple[float, Array]]) -> Array:
    reached, best = at_ratio(0.0)
    while True:
        score, found = at_ratio(reached)
        if score <= reached + 1e-12:
            return best
        reached, best = score, found


def _between(levels: Array) -> Array:
    """The cut value of each boundary i: levels from i on are above it. The midpoint, unless it rounds to the
    lower level."""
    middle = (levels[:-1] + levels[1:]) / 2
    middle = np.where(middle > levels[:-1], middle, levels[1:])
    return np.concatenate([levels[:1], middle, np.nextafter(levels[-1:], np.inf)])


def _boundaries(
    place: Array, num_levels: int, num_grades: int, cost: Callable[[int], Array]
) -> NDArray[np.int64]:
    """Boundaries that minimise the sum of cost(grade) over rows. What a cut saves depends on its own place
    alone, and cuts only have to keep their order, so dynamic programming needs one pass per grade."""
    here = np.arange(num_levels + 1)
    best = np.zeros(num_levels + 1)
    came_from = []
    for grade in range(1, num_grades):
        saved = np.bincount(place, cost(grade - 1) - cost(grade), num_levels)
        above = np.append(saved[::-1].cumsum()[::-1], 0.0)
        reach = np.maximum.accumulate(best)  # the best of all boundaries up to this one
        came_from.append(np.maximum.accumulate(np.where(np.append(True, best[1:] > reach[:-1]), here, 0)))
        best = reach + above
    chosen = [int(best.argmax())]
    for back in came_from[:0:-1]:
        chosen.append(int(back[chosen[-1]]))
    return np.array(chosen[::-1], dtype=np.int64)


def with_unknown(probability: ArrayLike, unknown: int, shift: float, listed: int) -> NDArray[np.int64]:
    """(rows, listed) classes, most likely first, with the log probability of the unknown class shifted by
    `shift`."""
    ranked, at = _ranked(np.asarray(probability, np.float64), unknown, listed)
    return _inserted(ranked, at, unknown, shift, listed)


def fit_unknown(
    probability: ArrayLike, truth: ArrayLike, unknown: int, metric: Metric, listed: int, rows: Any = None
) -> float:
    """The best of GRID shifts: quantiles of those where the unknown class overtakes one of the five most
    likely classes."""
    ranked, at = _ranked(np.asarray(probability, np.float64), unknown, listed)
    shifts = np.unique(np.quantile(at[:, :5], np.linspace(0, 1, GRID), method="lower"))
    shifts = np.concatenate([[0.0], shifts + 1e-9])
    scores = [
        metric.sign * metric(truth, _as_needed(_inserted(ranked, at, unknown, shift, listed), metric), rows)
        for shift in shifts
    ]
    return float(shifts[int(np.argmax(scores))])


def _as_needed(ranking: NDArray[np.int64], metric: Metric) -> NDArray[np.int64]:
    return ranking if metric.needs == "ranking" else ranking[:, 0]


def _ranked(probability: Array, unknown: int, listed: int) -> tuple[NDArray[np.int64], Array]:
    """The other classes, most likely first, and how far the log probability of each is above that of the
    unknown class."""
    log_p = np.log(np.maximum(probability, 1e-300))
    others = np.delete(log_p, unknown, axis=1)
    ranked = np.argsort(-others, axis=1, kind="stable")[:, :listed]
    ahead = np.take_along_axis(others, ranked, axis=1) - log_p[:, [unknown]]
    return ranked + (ranked >= unknown), ahead


def _inserted(
    ranked: NDArray[np.int64], ahead: Array, unknown: int, shift: float, listed: int
) -> NDArray[np.int64]:
    place = (ahead >= shift).sum(axis=1, keepdims=True)
    column = np.arange(min(ranked.shape[1] + 1, listed))
    before = np.take_along_axis(
        ranked, np.minimum(column, ranked.shape[1] - 1)[None].repeat(len(ranked), 0), axis=1
    )
    after = np.take_along_axis(ranked, np.maximum(column - 1, 0)[None].repeat(len(ranked), 0), axis=1)
    return np.where(column < place, before, np.where(column == place, unknown, after))


def _mcc(tp: Array, fp: Array, fn: Array, tn: Array) -> Array:
    return (tp * tn - fp * fn) / np.sqrt(np.maximum((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn), 1e-300))


def _f1_macro(tp: Array, fp: Array, fn: Array, tn: Array) -> Array:
    return tp / (2 * tp + fp + fn) + tn / (2 * tn + fp + fn)


# Metrics of 0/1 truth from the confusion matrix, for all thresholds at once.
RATES: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "f1": lambda tp, fp, fn, tn: 2 * tp / (2 * tp + fp + fn),
    "f1_macro": _f1_macro,
    "f1_micro": lambda tp, fp, fn, tn: (tp + tn) / (tp + fp + fn + tn),
    "accuracy": lambda tp, fp, fn, tn: (tp + tn) / (tp + fp + fn + tn),
    "balanced_accuracy": lambda tp, fp, fn, tn: (tp / (tp + fn) + tn / (tn + fp)) / 2,
    "mcc": _mcc,
    "qwk": lambda tp, fp, fn, tn: 2 * (tp * tn - fp * fn) / ((tp + fp) * (fp + tn) + (tp + fn) * (fn + tn)),
}


def apply_threshold(
    probability: ArrayLike, threshold: ArrayLike, at_least_one: bool = False
) -> NDArray[np.int64]:
    """1 from the threshold on (included). at_least_one: a row without a label gets the one that is closest to
    its threshold."""
    probability = as_float_array(probability, "probability")
    validate_finite(probability, "probability")
    label = (probability >= threshold).astype(np.int64)
    if at_least_one and label.ndim == 2:
        empty = np.flatnonzero(label.sum(axis=1) == 0)
        label[empty, (probability - threshold)[empty].argmax(axis=1)] = 1
    return label


def fit_threshold(truth: ArrayLike, probability: ArrayLike, metric: Metric, rows: Any = None) -> float:
    """For 0/1 truth: exact for the metrics of RATES, else the best of GRID candidates; of equal ones the
    lowest."""
    truth, probability = as_float_array(truth, "truth"), as_float_array(probability, "probability")
    validate_finite(probability, "probability")
    metric_formulas.class_codes(truth, 2)
    if metric.name in ("precision", "recall"):
        raise MetricUndefined(
            f"{metric.name} alone is best at one extreme, so it has no optimal threshold: choose one by hand"
        )
    if metric.name not in RATES or metric.kind == "custom":
        return _best_of_grid(truth, probability, metric, rows)
    mass = sample_weights(rows, len(truth))
    if not 0 < mass @ truth < mass.sum():
        raise MetricUndefined("fitting a threshold needs rows of both classes")
    return _exact_threshold(truth, probability, RATES[metric.name], mass)


def _exact_threshold(
    truth: Array, probability: Array, rate: Callable[[Array, Array, Array, Array], Array], mass: Array
) -> float:
    levels, tp, predicted = _sweep(truth, probability, mass)
    fp, positive = predicted - tp, mass @ truth
    return float(_between(levels)[rate(tp, fp, positive - tp, mass.sum() - positive - fp).argmax()])


def fit_thresholds(
    truth: ArrayLike, probability: ArrayLike, metric: Metric, rows: Any = None, shared: bool = False
) -> Array:
    """(columns,) for multilabel: exact per column for f1_macro and f1_micro; for other metrics, or if shared,
    one value for all columns. For f1_macro a column of one class gets 0.5."""
    truth, probability = as_float_array(truth, "truth"), as_float_array(probability, "probability")
    validate_finite(probability, "probability")
    mass = sample_weights(rows, len(truth))
    num_columns = truth.shape[1]
    if shared or metric.name not in ("f1_macro", "f1_micro"):
        return np.full(num_columns, _best_of_grid(truth, probability, metric, rows))
    if metric.name == "f1_macro":
        fitted = np.full(num_columns, 0.5)
        for column in np.flatnonzero((mass @ truth > 0) & (mass @ truth < mass.sum())):
            metric_formulas.class_codes(truth[:, column], 2)
            fitted[column] = _exact_threshold(truth[:, column], probability[:, column], RATES["f1"], mass)
        return fitted
    # f1_micro is a ratio of two sums over columns, so Dinkelbach as for qwk.
    if not truth.any():
        raise MetricUndefined("truth has no label set")
    sweeps = [_sweep(truth[:, column], probability[:, column], mass) for column in range(num_columns)]

    def at_ratio(ratio: float) -> tuple[float, Array]:
        picks = [int((2 * tp - ratio * predicted).argmax()) for _, tp, predicted in sweeps]
        hit = sum(tp[i] for (_, tp, _), i in zip(sweeps, picks, strict=True))
        predicted = sum(counts[i] for (_, _, counts), i in zip(sweeps, picks, strict=True))
        thresholds = np.array([_between(levels)[i] for (levels, _, _), i in zip(sweeps, picks, strict=True)])
        return float(2 * hit / (predicted + (mass @ truth).sum())), thresholds

    return _dinkelbach(at_ratio)


def _sweep(truth: Array, probability: Array, mass: Array) -> tuple[Array, Array, Array]:
    """(levels, true positives, predicted positives), the last two for every boundary of _between(levels)."""
    levels, place = np.unique(probability, return_inverse=True)
    per_level = np.stack([np.bincount(place, mass * truth), np.bincount(place, mass)])
    tp, predicted = np.pad(per_level[:, ::-1].cumsum(axis=1)[:, ::-1], ((0, 0), (0, 1)))
    return levels, tp, predicted


def _best_of_grid(truth: Array, probability: Array, metric: Metric, rows: Any) -> float:
    from tqdm import tqdm

    cuts = _between(np.unique(probability))
    cuts = cuts[np.unique(np.linspace(0, len(cuts) - 1, min(GRID, len(cuts))).round().astype(np.int64))]
    scores = []
    for cut in tqdm(cuts, desc=f"threshold for {metric.name}", delay=2, disable=None, leave=False):
        try:
            scores.append(metric.sign * metric(truth, apply_threshold(probability, cut), rows))
        except (
            MetricUndefined
        ):  # at the extremes all rows get one label, and not every metric is defined there
            scores.append(-np.inf)
    if not np.isfinite(scores).any():
        raise MetricUndefined(f"{metric.name} is undefined at every threshold")
    return float(cuts[int(np.argmax(scores))])
