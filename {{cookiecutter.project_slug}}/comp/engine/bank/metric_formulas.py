"""The arithmetic behind metrics.py, on float64 arrays that it has checked. Four kinds of function:

row       (truth, prediction) -> one number a row, or one per row and column; the score is their weighted mean
curve     (positive, negative) -> number; the weight of both at each distinct score, best first; ties share a place
weighted  (truth, prediction, weight) -> number
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.errors import Refused

Array = NDArray[Any]
SMALLEST = float(
    np.finfo(np.float64).eps
)  # what a logarithm sees instead of 0; scikit-learn's own for float64


class MetricUndefined(Refused, ValueError):
    """No number can be given for these rows; the sentence says why."""


def class_codes(truth: Array, classes: int) -> NDArray[np.int64]:
    wrong = (truth != np.rint(truth)) | (truth < 0) | (truth >= classes)
    if wrong.any():
        raise MetricUndefined(f"{truth[wrong][0]:g} is no class code from 0 to {classes - 1}")
    return truth.astype(np.int64)


def unit_interval(values: Array, what: str) -> Array:
    if values.size and (values.min() < 0 or values.max() > 1):
        raise MetricUndefined(f"{what} goes from {values.min():g} to {values.max():g}, not from 0 to 1")
    return values


def class_shares(values: Array, what: str) -> Array:
    off = np.abs(unit_interval(values, what).sum(axis=1) - 1)
    if off.max() > 1e-3:
        raise MetricUndefined(
            f"row {off.argmax()} of {what} sums to {values[off.argmax()].sum():g}, not to 1"
        )
    return values


# 1. Row by row. The worst rows of a model are the extremes of the same numbers.


def weighted_mean(values: Array, weight: Array, finish: Callable[[Any], Any]) -> float:
    return float(np.mean(finish(weight @ values / weight.sum())))


def exact_match(truth: Array, prediction: Array) -> Array:
    """Of several columns all must be right."""
    return (truth == prediction).reshape(len(truth), -1).all(axis=1).astype(np.float64)


def log_loss_columns(truth: Array, prediction: Array) -> Array:
    unit_interval(truth, "truth")
    p = np.clip(unit_interval(prediction, "prediction"), SMALLEST, 1 - SMALLEST)
    return -(truth * np.log(p) + (1 - truth) * np.log1p(-p))


def log_loss(truth: Array, prediction: Array) -> Array:
    """Clipped in float64 and never rescaled: rows that do not sum to 1 would score better than they are."""
    if prediction.ndim == 1:
        return log_loss_columns(truth, prediction)
    class_shares(prediction, "prediction")
    if truth.ndim == 1:
        p = prediction[np.arange(len(truth)), class_codes(truth, prediction.shape[1])]
        return -np.log(np.clip(p, SMALLEST, 1))
    return -(class_shares(truth, "truth") * np.log(np.clip(prediction, SMALLEST, 1))).sum(axis=1)


def log_loss_rescaled(truth: Array, prediction: Array) -> Array:
    """As some hosts have it: each row is divided by its sum first."""
    if prediction.ndim == 2:
        total = prediction.sum(axis=1, keepdims=True)
        if total.min() <= 0:
            raise MetricUndefined(
                f"row {total.argmin()} of the prediction sums to {total.min():g} and cannot be rescaled"
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
                f"{what} goes down to {values.min():g}; a logarithmic error wants nothing below 0"
            )
    return (np.log1p(truth) - np.log1p(prediction)) ** 2


def fbeta_samples(truth: Array, prediction: Array, beta: float) -> Array:
    """F of each row's set of labels; nothing said where nothing is true counts 0, as scikit-learn has it."""
    if truth.ndim == 1:
        raise MetricUndefined("wants one column per label")
    hit = (truth * prediction).sum(axis=1)
    return (1 + beta**2) * hit / np.maximum(beta**2 * truth.sum(axis=1) + prediction.sum(axis=1), SMALLEST)


def _hits(truth: Array, ranking: Array, k: int) -> Array:
    ranking = ranking[:, :k].astype(np.int64)  # (rows, k)
    if truth.ndim == 1:
        hit = (truth[:, None] == ranking) & (ranking >= 0)
    else:
        if ranking.max() >= truth.shape[1]:
            raise MetricUndefined(
                f"the ranking holds code {ranking.max()}, truth has {truth.shape[1]} columns"
            )
        hit = (np.take_along_axis(truth, np.maximum(ranking, 0), axis=1) > 0) & (ranking >= 0)
    for place in range(1, ranking.shape[1]):  # a code listed twice counts once
        hit[:, place] &= (ranking[:, :place] != ranking[:, place : place + 1]).all(axis=1)
    return hit


def top_k_accuracy(truth: Array, ranking: Array, k: int) -> Array:
    return np.asarray(_hits(truth, ranking, k).any(axis=1), np.float64)


def average_precision_at(truth: Array, ranking: Array, k: int) -> Array:
    hit = _hits(truth, ranking, k)
    precision = hit.cumsum(axis=1) / np.arange(1, hit.shape[1] + 1)
    relevant: Any = 1.0 if truth.ndim == 1 else np.clip((truth > 0).sum(axis=1), 1, k)
    return (precision * hit).sum(axis=1) / relevant


# 2. What only sees the order of the predictions.


def binary_columns(truth: Array, prediction: Array) -> Iterator[tuple[NDArray[np.int64], Array, Array]]:
    """(graded rows, truth, score) of each column; where truth is class codes, of each class against the rest."""
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
        graded = np.flatnonzero(~np.isnan(target))
        yield graded, unit_interval(target[graded], "truth"), score[graded]


def class_weights_by_score(truth: Array, score: Array, weight: Array) -> tuple[Array, Array]:
    level = np.unique(-score, return_inverse=True)[1]
    return np.bincount(level, weight * truth), np.bincount(level, weight * (1 - truth))


def mean_curve(curve: Callable[..., float], skip: bool, tallies: Iterable[tuple[Array, Array]]) -> float:
    scores = []
    for column, (positive, negative) in enumerate(tallies):
        missing = "positive" if not positive.any() else "negative" if not negative.any() else ""
        if not missing:
            scores.append(curve(positive, negative))
        elif not skip:
            raise MetricUndefined(f"no row is {missing} in column {column}")
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
    positive: Array, negative: Array, edges: tuple[float, ...], weights: tuple[float, ...], whole: float
) -> float:
    """ROC area with a weight for each band of true positive rate; the curve is cut where it crosses an edge."""
    tpr = np.concatenate([[0.0], positive.cumsum() / positive.sum()])
    fpr = np.concatenate([[0.0], negative.cumsum() / negative.sum()])
    along = tpr + fpr  # neither falls, so their sum is a coordinate along the curve
    grid = np.sort(np.concatenate([along, np.interp(edges, tpr, along)]))
    tpr, step = np.interp(grid, along, tpr), np.diff(np.interp(grid, along, fpr))
    area = 0.0
    for low, high, weight in zip(edges[:-1], edges[1:], weights, strict=True):
        height = np.clip(tpr, low, high) - low
        area += weight * float(step @ (height[1:] + height[:-1]) / 2)
    return area / whole


# 3. Labels, by what is counted per class.


def class_counts(truth: Array, prediction: Array, weight: Array) -> tuple[Array, Array, Array]:
    """(true, predicted, hit), each one number a class, or a column where there are several."""
    if truth.ndim == 2:
        return weight @ truth, weight @ prediction, weight @ (truth * prediction)
    classes = int(max(truth.max(), prediction.max(), 1)) + 1
    t, p = class_codes(truth, classes), class_codes(prediction, classes)
    true, predicted = np.bincount(t, weight, classes), np.bincount(p, weight, classes)
    return true, predicted, np.bincount(t, weight * (t == p), classes)


def precision_recall_f1(truth: Array, prediction: Array, weight: Array, part: str) -> float:
    """precision, recall or f1 of the class 1."""
    if truth.ndim == 2 or max(truth.max(), prediction.max()) > 1:
        raise MetricUndefined(
            "wants labels 0 and 1; for several classes or columns take f1_macro or f1_micro"
        )
    true, predicted, hit = (count[1] for count in class_counts(truth, prediction, weight))
    if true == 0:
        raise MetricUndefined("no row is positive")
    of = {"precision": predicted, "recall": true, "f1": (true + predicted) / 2}[part]
    return float(hit / of) if of else 0.0  # nothing predicted positive: by convention a precision of 0


def f1_micro(truth: Array, prediction: Array, weight: Array) -> float:
    true, predicted, hit = (count.sum() for count in class_counts(truth, prediction, weight))
    if true + predicted == 0:
        raise MetricUndefined("no label is set, neither in truth nor in the prediction")
    return float(2 * hit / (true + predicted))


def f1_macro(truth: Array, prediction: Array, weight: Array) -> float:
    """Over the classes that occur in truth or prediction; over all columns where there are several."""
    true, predicted, hit = class_counts(truth, prediction, weight)
    f1 = 2 * hit / np.maximum(true + predicted, SMALLEST)
    return float(np.mean(f1 if truth.ndim == 2 else f1[true + predicted > 0]))


def _two_classes(true: Array) -> None:
    if (true > 0).sum() < 2:
        raise MetricUndefined(f"truth holds only the class {true.argmax()}")


def balanced_accuracy(truth: Array, prediction: Array, weight: Array) -> float:
    true, _, hit = class_counts(truth, prediction, weight)
    _two_classes(true)
    return float(np.mean(hit[true > 0] / true[true > 0]))


def mcc(truth: Array, prediction: Array, weight: Array) -> float:
    true, predicted, hit = class_counts(truth, prediction, weight)
    _two_classes(true)
    total = true.sum()
    spread = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return (
        float((hit.sum() * total - true @ predicted) / math.sqrt(spread))
        if (predicted > 0).sum() > 1
        else 0.0
    )


def qwk(truth: Array, prediction: Array, weight: Array) -> float:
    """By moments of the grades: one that nobody has moves nothing, unlike in cohen_kappa_score by itself."""
    share = weight / weight.sum()
    t, p = truth - share @ truth, prediction - share @ truth
    if not np.ptp(truth[weight > 0]):
        raise MetricUndefined(f"truth holds only the grade {truth[0]:g}")
    return float(2 * (share @ (t * p)) / (share @ t**2 + share @ p**2))


def probabilistic_f1(truth: Array, prediction: Array, weight: Array) -> float:
    positive = weight @ unit_interval(truth, "truth")
    if positive == 0:
        raise MetricUndefined("no row is positive")
    return float(
        2 * (weight @ (truth * unit_interval(prediction, "prediction"))) / (positive + weight @ prediction)
    )


# 4. Values, and the ranking of labels within a row.


def mean_over_columns(truth: Array, prediction: Array, weight: Array, one: Callable[..., float]) -> float:
    pairs = [(truth, prediction)] if truth.ndim == 1 else zip(truth.T, prediction.T, strict=True)
    kept = weight > 0
    return float(np.mean([one(t[kept], p[kept], weight[kept] / weight.sum()) for t, p in pairs]))


def r2(truth: Array, prediction: Array, share: Array) -> float:
    if not np.ptp(truth):
        raise MetricUndefined(f"truth holds only the value {truth[0]:g}")
    return float(1 - share @ (truth - prediction) ** 2 / (share @ (truth - share @ truth) ** 2))


def spearman(truth: Array, prediction: Array, share: Array) -> float:
    ranks = []
    for what, values in {"truth": truth, "the prediction": prediction}.items():
        if not np.ptp(values):
            raise MetricUndefined(f"{what} holds only the value {values[0]:g}, which orders nothing")
        level = np.unique(values, return_inverse=True)[1]
        mass = np.bincount(level, share)
        rank = (mass.cumsum() - mass / 2)[level]
        ranks.append(rank - share @ rank)
    a, b = ranks
    return float(share @ (a * b) / math.sqrt((share @ a**2) * (share @ b**2)))


def label_ranking(truth: Array, prediction: Array, weight: Array, by_label: bool) -> float:
    """Precision at each true label: the mean over rows (lrap) or over all labels alike (lwlrap)."""
    from sklearn.metrics import label_ranking_average_precision_score

    if truth.ndim == 1 or not np.isin(truth, (0, 1)).all():
        raise MetricUndefined("wants one column of 0 and 1 per label")
    weight = weight * truth.sum(axis=1) if by_label else weight
    kept = weight > 0
    if not kept.any():
        raise MetricUndefined("no label is set in truth")
    return float(
        label_ranking_average_precision_score(truth[kept], prediction[kept], sample_weight=weight[kept])
    )
