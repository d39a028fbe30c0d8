"""A metric with its direction, range and needs, and how it is called; comp/metrics.py lists them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from comp.engine.bank import metric_formulas
from comp.engine.bank.metric_formulas import Array, MetricUndefined

Needs = Literal["probability", "label", "ranking", "value"]


def identity(mean: Any) -> Any:
    return mean


@dataclass(frozen=True)
class Metric:
    name: str
    function: Callable[..., Any]  # (truth, prediction, rows), or as its kind in metric_formulas.py takes
    direction: Literal["max", "min"]
    needs: Needs
    low: float = -math.inf  # range of the score
    high: float = math.inf
    tasks: tuple[str, ...] = ()  # tasks it is defined for; empty: any
    kind: Literal["custom", "row", "curve", "weighted"] = "custom"
    finish: Callable[[Any], Any] = identity  # kind "row": between the mean over rows and over columns
    skip_undefined: bool = False  # leaves out NaN in truth and columns of one class instead of raising

    @property
    def sign(self) -> int:
        """1 or -1, so that a higher sign * score is better."""
        return 1 if self.direction == "max" else -1

    def __call__(self, truth: Any, prediction: Any, rows: Any = None) -> float:
        try:
            truth, prediction = self.validate(truth, prediction)
            if rows is not None and len(rows) != len(truth):
                raise MetricUndefined(f"rows has {len(rows)} lines, truth has {len(truth)}")
            if self.kind == "custom":
                score = float(self.function(truth, prediction, rows))
            else:
                score = self.weighted_score(truth, prediction, sample_weights(rows, len(truth)))
            if not math.isfinite(score) or not self.low - 1e-9 <= score <= self.high + 1e-9:
                raise MetricUndefined(f"score {score:g} is outside {self.low:g} to {self.high:g}")
        except MetricUndefined as error:
            raise MetricUndefined(error.what, metric=self.name) from None
        return score

    def weighted_score(self, truth: Array, prediction: Array, weight: Array) -> float:
        """The score of validated arrays, for every kind but "custom"."""
        if self.kind == "row":
            return metric_formulas.weighted_mean(self.function(truth, prediction), weight, self.finish)
        if self.kind == "curve":
            columns = (
                metric_formulas.class_weights_by_score(target, score, weight[known])
                for known, target, score in metric_formulas.binary_columns(truth, prediction)
            )
            return metric_formulas.mean_curve(self.function, self.skip_undefined, columns)
        assert self.kind == "weighted", "a custom metric takes rows, not weights"
        return float(self.function(truth, prediction, weight))

    def validate(self, truth: Any, prediction: Any) -> tuple[Array, Array]:
        """Both as float64, a single column as (n,). Raises where the score would be NaN or of something
        else."""
        truth, prediction = as_float_array(truth, "truth"), as_float_array(prediction, "prediction")
        truth = truth[:, 0] if truth.shape[1:] == (1,) else truth
        if prediction.shape[1:] == (1,) and self.needs != "ranking":
            prediction = prediction[:, 0]
        if len(truth) != len(prediction):
            raise MetricUndefined(f"prediction has {len(prediction)} rows, truth has {len(truth)}")
        if not len(truth):
            raise MetricUndefined("there are no rows")
        validate_finite(np.where(np.isnan(truth), 0, truth) if self.skip_undefined else truth, "truth")
        validate_finite(prediction, "prediction")
        if self.needs in ("label", "ranking") and (prediction != np.rint(prediction)).any():
            example = prediction[prediction != np.rint(prediction)][0]
            raise MetricUndefined(
                f"expected integer labels, got {example:g}; convert the prediction to labels first"
            )
        if self.kind == "custom":
            return truth, prediction
        if self.needs == "label" and truth.ndim == 2 and prediction.ndim == 1:
            truth = truth.argmax(axis=1).astype(np.float64)  # soft labels: the most likely class is the label
        if self.needs == "ranking":
            fits = prediction.ndim == 2
        else:
            class_probabilities = self.needs == "probability" and truth.ndim == 1 and prediction.ndim == 2
            fits = class_probabilities or truth.shape == prediction.shape
        if not fits:
            raise MetricUndefined(
                f"prediction of shape {prediction.shape} does not match truth of {truth.shape}"
            )
        return truth, prediction


def as_float_array(values: Any, what: str) -> Array:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise MetricUndefined(f"{what} contains a value that is not a number") from None
    if array.ndim not in (1, 2):
        raise MetricUndefined(f"{what} has {array.ndim} dimensions, expected 1 or 2")
    return array


def validate_finite(values: Array, what: str) -> None:
    lines = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
    if len(lines):
        raise MetricUndefined(
            f"{what} is NaN or infinite in {len(lines)} of {len(values)} rows, first in row {lines[0]}"
        )


def sample_weights(rows: Any, count: int) -> Array:
    """The column "weight" of rows, or ones."""
    if rows is None or "weight" not in rows:
        return np.ones(count)
    weight = np.asarray(rows["weight"], dtype=np.float64)
    if not (np.isfinite(weight).all() and weight.min() >= 0 and weight.sum() > 0):
        raise MetricUndefined('column "weight" has values that are NaN, infinite or negative, or only zeros')
    return weight
