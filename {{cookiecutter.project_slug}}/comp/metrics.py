"""metric(truth, prediction, rows) -> float. METRICS has one line per metric; their formulas are in
comp/engine/bank/metric_formulas.py.

truth       binary, regression, ordinal (n,); multiclass (n,) class codes or (n, classes) soft labels; multilabel
            (n, columns) of 0 and 1
prediction  probability: (n,) or (n, classes); label: codes (n,) or 0/1 (n, columns); value: (n,) or (n,
columns);
            ranking: (n, k) class codes, best first, padded with -1
rows        a DataFrame with one line per row, or None. The metrics here use its column "weight"; a metric of your own
            may use any column

A call returns a finite float or raises MetricUndefined with the reason; it never returns NaN.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from comp.engine.bank import metric_formulas
from comp.engine.bank.metric_formulas import Array, MetricUndefined
from comp.engine.errors import UserError

__all__ = ["METRICS", "Metric", "MetricUndefined", "better", "custom", "find", "nearest"]

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


_B, _C, _L, _T = ("binary",), ("multiclass",), ("multilabel",), ("retrieval",)
_R, _O = ("regression",), ("ordinal",)
_ANY_LABEL = _B + _C + _L + _O
_F = metric_formulas
# AUC by bands of true positive rate. ALASKA2 (steganalysis): double weight below 0.4. ISIC 2024 (skin
# lesions): only the area above 0.8, so 0 to 0.2. For other bands copy a line.
_LOW_TPR = partial(_F.banded_auc, edges=(0.0, 0.4, 1.0), weights=(2.0, 1.0), total=1.4)
_HIGH_TPR = partial(_F.banded_auc, edges=(0.0, 0.8, 1.0), weights=(0.0, 1.0), total=1.0)
_INF = math.inf

# fmt: off
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _F.exact_match, "max", "label", 0, 1, _ANY_LABEL, "row"),
        Metric("balanced_accuracy", _F.balanced_accuracy, "max", "label", 0, 1, _B + _C + _O, "weighted"),
        Metric("precision", partial(_F.precision_recall_f1, part="precision"), "max", "label", 0, 1, _B, "weighted"),
        Metric("recall", partial(_F.precision_recall_f1, part="recall"), "max", "label", 0, 1, _B, "weighted"),
        Metric("f1", partial(_F.precision_recall_f1, part="f1"), "max", "label", 0, 1, _B, "weighted"),
        Metric("f1_micro", _F.f1_micro, "max", "label", 0, 1, _ANY_LABEL, "weighted"),
        Metric("f1_macro", _F.f1_macro, "max", "label", 0, 1, _ANY_LABEL, "weighted"),
        Metric("f1_samples", partial(_F.fbeta_samples, beta=1.0), "max", "label", 0, 1, _L, "row"),
        Metric("f2_samples", partial(_F.fbeta_samples, beta=2.0), "max", "label", 0, 1, _L, "row"),
        Metric("mcc", _F.mcc, "max", "label", -1, 1, _B + _C + _O, "weighted"),
        Metric("qwk", _F.qwk, "max", "label", -1, 1, _O + _C + _B, "weighted"),
        Metric("probabilistic_f1", _F.probabilistic_f1, "max", "probability", 0, 1, _B, "weighted"),
        Metric("log_loss", _F.log_loss, "min", "probability", 0, _INF, _B + _C, "row"),
        Metric("log_loss_rescaled", _F.log_loss_rescaled, "min", "probability", 0, _INF, _B + _C, "row"),
        Metric("mean_column_log_loss", _F.log_loss_columns, "min", "probability", 0, _INF, _L + _B, "row"),
        Metric("kl", _F.kl, "min", "probability", 0, _INF, _B + _C, "row"),
        Metric("roc_auc", _F.roc_auc, "max", "probability", 0, 1, _B + _C + _L, "curve"),
        Metric("mean_column_auc", _F.roc_auc, "max", "probability", 0, 1, _B + _C + _L, "curve", skip_undefined=True),
        Metric("weighted_auc", _LOW_TPR, "max", "probability", 0, 1, _B + _C + _L, "curve"),
        Metric("partial_auc", _HIGH_TPR, "max", "probability", 0, 0.2, _B + _C + _L, "curve"),
        Metric("average_precision", _F.average_precision, "max", "probability", 0, 1, _B + _C + _L, "curve"),
        Metric("lrap", partial(_F.label_ranking, by_label=False), "max", "probability", 0, 1, _L, "weighted"),
        Metric("lwlrap", partial(_F.label_ranking, by_label=True), "max", "probability", 0, 1, _L, "weighted"),
        Metric("map@5", partial(_F.average_precision_at, k=5), "max", "ranking", 0, 1, _C + _L + _T, "row"),
        Metric("accuracy@5", partial(_F.top_k_accuracy, k=5), "max", "ranking", 0, 1, _C + _L + _T, "row"),
        Metric("rmse", _F.squared_error, "min", "value", 0, _INF, _R + _O, "row", np.sqrt),
        Metric("mae", _F.absolute_error, "min", "value", 0, _INF, _R + _O, "row"),
        Metric("rmsle", _F.squared_log_error, "min", "value", 0, _INF, _R + _O, "row", np.sqrt),
        Metric("r2", partial(_F.mean_over_columns, one=_F.r2), "max", "value", -_INF, 1, _R + _O, "weighted"),
        Metric("spearman", partial(_F.mean_over_columns, one=_F.spearman), "max", "value", -1, 1, _R + _O, "weighted"),
    )
}
# fmt: on
AT_K = {
    "map": _F.average_precision_at,
    "accuracy": _F.top_k_accuracy,
}  # map@k, accuracy@k for any k up to 1000

# Common names of the metrics above, used only to suggest the right name in an error.
OTHER_NAMES = {
    "auc": "roc_auc",
    "auroc": "roc_auc",
    "acc": "accuracy",
    "logloss": "log_loss",
    "cross_entropy": "log_loss",
    "quadratic_weighted_kappa": "qwk",
    "kappa": "qwk",
    "matthews_corrcoef": "mcc",
    "root_mean_squared_error": "rmse",
    "mean_absolute_error": "mae",
    "f1_score": "f1",
    "pf1": "probabilistic_f1",
    "pauc": "partial_auc",
    "map": "map@5",
    "top5": "accuracy@5",
    "kl_divergence": "kl",
    "mcrmse": "rmse",
}


def nearest(name: str, count: int = 3) -> list[str]:
    """The most similar metric names, best first."""
    close = difflib.get_close_matches(name.lower(), [*METRICS, *OTHER_NAMES], n=2 * count, cutoff=0.5)
    return list(dict.fromkeys(OTHER_NAMES.get(match, match) for match in close))[:count]


def find(name: str) -> Metric:
    """The metric of METRICS with this name; map@k and accuracy@k with any k."""
    stem, _, k = name.partition("@")
    if name in METRICS:
        return METRICS[name]
    if stem in AT_K and k.isdecimal() and 0 < int(k) <= 1000:
        tasks = METRICS[f"{stem}@5"].tasks
        return Metric(name, partial(AT_K[stem], k=int(k)), "max", "ranking", 0, 1, tasks, "row")
    candidates = " or ".join(nearest(name)) or "one of " + ", ".join(METRICS)
    raise UserError("metric-unknown", key=name, what="no such metric", remedy=f"nearest: {candidates}")


def custom(function: Callable[..., Any]) -> Metric:
    """The metric of comp/competition.py: a Metric, or a function with the attributes `direction` and
    `needs`."""
    if isinstance(function, Metric):
        return function
    attributes = {"direction": ("max", "min"), "needs": get_args(Needs)}
    values: dict[str, Any] = {name: getattr(function, name, None) for name in attributes}
    for name, allowed in attributes.items():
        if values[name] not in allowed:
            raise UserError(
                "metric-attribute",
                where="comp/competition.py",
                key=f"metric.{name}",
                what=f"is {values[name]!r}",
                remedy=f"set it to one of {', '.join(allowed)}",
            )
    return Metric(getattr(function, "__name__", "metric"), function, **values)


def better(metric: Metric, a: float, b: float) -> bool:
    """Whether score a is better than b. NaN is worse than any number and not better than NaN."""
    if math.isnan(a) or math.isnan(b):
        return not math.isnan(a) and math.isnan(b)
    return metric.sign * (a - b) > 0
