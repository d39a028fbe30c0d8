"""The formulas behind comp/metrics.py, on float64 arrays that Metric.validate has checked. Three kinds of
function:

row       (truth, prediction) -> (rows,) or (rows, columns); the metric is their weighted mean
curve     (positive, negative) -> float; both are the weights of such rows per distinct score, highest first
weighted  (truth, prediction, weight) -> float
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.errors import UserError

Array = NDArray[Any]
SMALLEST = float(
    np.finfo(np.float64).eps
)  # probabilities are clipped here before a logarithm, as in scikit-learn


class MetricUndefined(UserError, ValueError):
    """The metric has no value for these rows, for example because they hold one class only."""

    def __init__(self, what: str, metric: str = ""):
        super().__init__("metric-undefined", key=metric, what=what)

    def __reduce__(self) -> tuple[object, ...]:
        return MetricUndefined, (self.what, self.key)


def class_codes(truth: Array, classes: int) -> NDArray[np.int64]:
    wrong = (truth != np.rint(truth)) | (truth < 0) | (truth >= classes)
    if wrong.any():
        raise MetricUndefined(f"{truth[wrong][0]:g} is not a class code from 0 to {classes - 1}")
    return truth.astype(np.int64)


def unit_interval(values: Array, what: str) -> Array:
    if values.size and (values.min() < 0 or values.max() > 1):
        raise MetricUndefined(f"{what} ranges from {values.min():g} to {values.max():g}, expected 0 to 1")
    return values


def class_shares(values: Array, what: str) -> Array:
    off = np.abs(unit_interval(values, what).sum(axis=1) - 1)
    if off.max() > 1e-3:
        raise MetricUndefined(
            f"row {off.argmax()} of {what} sums to {values[off.argmax()].sum():g}, expected 1"
        )
    return values


# 1. One number per row. Sorting by it also finds a model's worst rows.


def weighted_mean(values: Array, weight: Array, finish: Callable[[Any], Any]) -> float:
    return float(np.mean(finish(weight @ values / weight.sum())))


def exact_match(truth: Array, prediction: Array) -> Array:
    """1 where the label is right; with several columns, where all of them are (subset accuracy)."""
    return (truth == prediction).reshape(len(truth), -1).all(axis=1).astype(np.float64)


def log_loss_columns(truth: Array, prediction: Array) -> Array:
    unit_interval(truth, "truth")
    p = np.clip(unit_interval(prediction, "prediction"), SMALLEST, 1 - SMALLEST)
    return -(truth * np.log(p) + (1 - truth) * np.log1p(-p))


def log_loss(truth: Array, prediction: Array) -> Array:
    """Clipped in float64, never rescaled: a row that sums to more than 1 must not gain by it."""
    if prediction.ndim == 1:
        return log_loss_columns(truth, prediction)
    class_shares(prediction, "prediction")
    if truth.ndim == 1:
        p = prediction[np.arange(len(truth)), class_codes(truth, prediction.shape[1])]
        return -np.log(np.clip(p, SMALLEST, 1))
    return -(class_shares(truth, "truth") * np.log(np.clip(prediction, SMALLEST, 1))).sum(axis=1)


def log_loss_rescaled(truth: Array, prediction: Array) -> Array:
    """Log loss after dividing each row by its sum, as Kaggle does in some competitions."""
    if prediction.ndim == 2:
        total = prediction.sum(axis=1, keepdims=True)
        if total.min() <= 0:
            raise MetricUndefined(
                f"row {total.argmin()} of prediction sums to {total.min():g}, so it cannot be rescaled"
            )
        prediction = prediction / total
    return log_loss(truth, prediction)


def kl(truth: Array, prediction: Array) -> Array:
    if prediction.ndim == 1:
        truth, prediction = (
            np.stack([1 - truth, truth], axis=1),
            np.stack([1 - prediction, prediction], axis=1),
        )
    loss = log_loss(truth, prediction)
    return loss if truth.ndim == 1 else loss + (truth * np.log(np.maximum(truth, SMALLEST))).sum(axis=1)


def squared_error(truth: Array, prediction: Array) -> Array:
    return (truth - prediction) ** 2


def absolute_error(truth: Array, prediction: Array) -> Array:
    return np.abs(truth - prediction)


def squared_log_error(truth: Array, prediction: Array) -> Array:
    for what, values in {"truth": truth, "prediction": prediction}.items():
        if values.min() < 0:
            raise MetricUndefined(
                f"{what} contains {values.min():g}, but a logarithmic error is defined from 0 up"
            )
    return (np.log1p(truth) - np.log1p(prediction)) ** 2


def fbeta_samples(truth: Array, prediction: Array, beta: float) -> Array:
    """F-beta of each row's set of labels. A row without true and predicted labels counts 0, as in
    scikit-learn."""
    if truth.ndim == 1:
        raise MetricUndefined("expected one column per label, got a single column")
    hit = (truth * prediction).sum(axis=1)
    return (1 + beta**2) * hit / np.maximum(beta**2 * truth.sum(axis=1) + prediction.sum(axis=1), SMALLEST)


def _hits(truth: Array, ranking: Array, k: int) -> Array:
    """(rows, k): whether the class at each place of the ranking is a true one."""
    ranking = ranking[:, :k].astype(np.int64)  # (rows, k)
    if truth.ndim == 1:
        hit = (truth[:, None] == ranking) & (ranking >= 0)
    else:
        if ranking.max() >= truth.shape[1]:
            raise MetricUndefined(
                f"the ranking contains class {ranking.max()}, truth has {truth.shape[1]} columns"
            )
        hit = (np.take_along_axis(truth, np.maximum(ranking, 0), axis=1) > 0) & (ranking >= 0)
    for place in range(1, ranking.shape[1]):  # a class listed twice counts once
        hit[:, place] &= (ranking[:, :place] != ranking[:, place : place + 1]).all(axis=1)
    return hit


def top_k_accuracy(truth: Array, ranking: Array, k: int) -> Array:
    return np.asarray(_hits(truth, ranking, k).any(axis=1), np.float64)


def average_precision_at(truth: Array, ranking: Array, k: int) -> Array:
    hit = _hits(truth, ranking, k)
    precision = hit.cumsum(axis=1) / np.arange(1, hit.shape[1] + 1)
    relevant: Any = 1.0 if truth.ndim == 1 else np.clip((truth > 0).sum(axis=1), 1, k)
    return (precision * hit).sum(axis=1) / relevant


# 2. Curves: functions of the order of the scores alone.


def binary_columns(truth: Array, prediction: Array) -> Iterator[tuple[NDArray[np.int64], Array, Array]]:
    """(rows with a known label, their truth, their score) of each column; for class codes, of each class
    one-vs-rest."""
    if prediction.ndim == 1:
        pairs: Iterable[tuple[Array, Array]] = [(truth, prediction)]
    elif truth.ndim == 1:
        class_codes(truth[~np.isnan(truth)], prediction.shape[1])
        pairs = (
            (np.where(np.isnan(truth), np.nan, truth == k), score) for k, score in enumerate(prediction.T)
        )
    else:
        pairs = zip(truth.T, prediction.T, strict=True)
    for target, score in pairs:
        known = np.flatnonzero(~np.isnan(target))
        yield known, unit_interval(target[known], "truth"), score[known]


def class_weights_by_score(truth: Array, score: Array, weight: Array) -> tuple[Array, Array]:
    """The input of a curve: (positive, negative), the weight of each at every distinct score, highest
    first."""
    level = np.unique(-score, return_inverse=True)[1]
    return np.bincount(level, weight * truth), np.bincount(level, weight * (1 - truth))


def mean_curve(
    curve: Callable[..., float], skip_undefined: bool, columns: Iterable[tuple[Array, Array]]
) -> float:
    """Mean of a curve over columns. skip_undefined: columns of one class are left out instead of raising."""
    scores = []
    for column, (positive, negative) in enumerate(columns):
        missing = "positive" if not positive.any() else "negative" if not negative.any() else ""
        if not missing:
            scores.append(curve(positive, negative))
        elif not skip_undefined:
            raise MetricUndefined(f"column {column} has no {missing} rows")
    if not scores:
        raise MetricUndefined("no column has both positive and negative rows")
    return float(np.mean(scores))


def roc_auc(positive: Array, negative: Array) -> float:
    below = negative.sum() - negative.cumsum() + negative / 2
    return float(positive @ below / (positive.sum() * negative.sum()))


def average_precision(positive: Array, negative: Array) -> float:
    precision = positive.cumsum() / np.maximum((positive + negative).cumsum(), SMALLEST)
    return float(positive @ precision / positive.sum())


def banded_auc(
    positive: Array, negative: Array, edges: tuple[float, ...], weights: tuple[float, ...], total: float
) -> float:
    """ROC area with one weight for each band of true positive rate, divided by `total`. The curve is split
    where it crosses an edge."""
    tpr = np.concatenate([[0.0], positive.cumsum() / positive.sum()])
    fpr = np.concatenate([[0.0], negative.cumsum() / negative.sum()])
    along = tpr + fpr  # neither falls, so their sum is a coordinate along the curve
    grid = np.sort(np.concatenate([along, np.interp(edges, tpr, along)]))
    tpr, step = np.interp(grid, along, tpr), np.diff(np.interp(grid, along, fpr))
    area = 0.0
    for low, high, weight in zip(edges[:-1], edges[1:], weights, strict=True):
        height = np.clip(tpr, low, high) - low
        area += weight * float(step @ (height[1:] + height[:-1]) / 2)
    return area / total


# 3. Labels: functions of counts per class.


def class_counts(truth: Array, prediction: Array, weight: Array) -> tuple[Array, Array, Array]:
    """(true, predicted, hit): weights of true labels, of predicted labels and of correct ones, per class or
    column."""
    if truth.ndim == 2:
        return weight @ truth, weight @ prediction, weight @ (truth * prediction)
    classes = int(max(truth.max(), prediction.max(), 1)) + 1
    t, p = class_codes(truth, classes), class_codes(prediction, classes)
    true, predicted = np.bincount(t, weight, classes), np.bincount(p, weight, classes)
    return true, predicted, np.bincount(t, weight * (t == p), classes)


def precision_recall_f1(truth: Array, prediction: Array, weight: Array, part: str) -> float:
    """part: "precision", "recall" or "f1" of class 1."""
    if truth.ndim == 2 or max(truth.max(), prediction.max()) > 1:
        raise MetricUndefined(
            "expected labels 0 and 1; for several classes or columns use f1_macro or f1_micro"
        )
    true, predicted, hit = (count[1] for count in class_counts(truth, prediction, weight))
    if true == 0:
        raise MetricUndefined("truth has no positive rows")
    denominator = {"precision": predicted, "recall": true, "f1": (true + predicted) / 2}[part]
    return (
        float(hit / denominator) if denominator else 0.0
    )  # no positive prediction: precision is 0 by convention


def f1_micro(truth: Array, prediction: Array, weight: Array) -> float:
    true, predicted, hit = (count.sum() for count in class_counts(truth, prediction, weight))
    if true + predicted == 0:
        raise MetricUndefined("neither truth nor prediction has a label set")
    return float(2 * hit / (true + predicted))


def f1_macro(truth: Array, prediction: Array, weight: Array) -> float:
    """Mean over the classes that occur in truth or prediction; with several columns, over all columns."""
    true, predicted, hit = class_counts(truth, prediction, weight)
    f1 = 2 * hit / np.maximum(true + predicted, SMALLEST)
    return float(np.mean(f1 if truth.ndim == 2 else f1[true + predicted > 0]))


def _validate_two_classes(true: Array) -> None:
    if (true > 0).sum() < 2:
        raise MetricUndefined(f"truth contains only class {true.argmax()}")


def balanced_accuracy(truth: Array, prediction: Array, weight: Array) -> float:
    true, _, hit = class_counts(truth, prediction, weight)
    _validate_two_classes(true)
    return float(np.mean(hit[true > 0] / true[true > 0]))


def mcc(truth: Array, prediction: Array, weight: Array) -> float:
    true, predicted, hit = class_counts(truth, prediction, weight)
    _validate_two_classes(true)
    total = true.sum()
    spread = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return (
        float((hit.sum() * total - true @ predicted) / math.sqrt(spread))
        if (predicted > 0).sum() > 1
        else 0.0
    )


def qwk(truth: Array, prediction: Array, weight: Array) -> float:
    """Quadratic weighted kappa by the moments of the grades: equal to cohen_kappa_score with every grade
    listed."""
    share = weight / weight.sum()
    t, p = truth - share @ truth, prediction - share @ truth
    if not np.ptp(truth[weight > 0]):
        raise MetricUndefined(f"truth contains only grade {truth[0]:g}")
    return float(2 * (share @ (t * p)) / (share @ t**2 + share @ p**2))


def probabilistic_f1(truth: Array, prediction: Array, weight: Array) -> float:
    positive = weight @ unit_interval(truth, "truth")
    if positive == 0:
        raise MetricUndefined("truth has no positive rows")
    return float(
        2 * (weight @ (truth * unit_interval(prediction, "prediction"))) / (positive + weight @ prediction)
    )


# 4. Regression, and the ranking of labels within a row.


def mean_over_columns(truth: Array, prediction: Array, weight: Array, one: Callable[..., float]) -> float:
    pairs = [(truth, prediction)] if truth.ndim == 1 else zip(truth.T, prediction.T, strict=True)
    used = weight > 0
    return float(np.mean([one(t[used], p[used], weight[used] / weight.sum()) for t, p in pairs]))


def r2(truth: Array, prediction: Array, share: Array) -> float:
    if not np.ptp(truth):
        raise MetricUndefined(f"truth is constant ({truth[0]:g})")
    return float(1 - share @ (truth - prediction) ** 2 / (share @ (truth - share @ truth) ** 2))


def spearman(truth: Array, prediction: Array, share: Array) -> float:
    ranks = []
    for what, values in {"truth": truth, "prediction": prediction}.items():
        if not np.ptp(values):
            raise MetricUndefined(f"{what} is constant ({values[0]:g}), so it has no order")
        level = np.unique(values, return_inverse=True)[1]
        mass = np.bincount(level, share)
        rank = (mass.cumsum() - mass / 2)[level]
        ranks.append(rank - share @ rank)
    a, b = ranks
    return float(share @ (a * b) / math.sqrt((share @ a**2) * (share @ b**2)))


def label_ranking(truth: Array, prediction: Array, weight: Array, by_label: bool) -> float:
    """Precision at each true label, averaged over rows (lrap) or, by_label, over all true labels (lwlrap)."""
    from sklearn.metrics import label_ranking_average_precision_score

    if truth.ndim == 1 or not np.isin(truth, (0, 1)).all():
        raise MetricUndefined("expected one column of 0 and 1 per label")
    weight = weight * truth.sum(axis=1) if by_label else weight
    used = weight > 0
    if not used.any():
        raise MetricUndefined("truth has no label set")
    return float(
        label_ranking_average_precision_score(truth[used], prediction[used], sample_weight=weight[used])
    )
