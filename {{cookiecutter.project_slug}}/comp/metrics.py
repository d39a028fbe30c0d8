"""metric(truth, prediction, rows) -> number. METRICS has one line a metric; formulas.py has the arithmetic.

truth       binary, regression, ordinal (n,); multiclass (n,) codes or (n, classes) shares; multilabel (n, columns)
            of 0 and 1
prediction  probability: (n,) or (n, classes); label: codes (n,) or 0/1 (n, columns); value: (n,) or (n, columns);
            ranking: (n, k) codes, the best first, -1 where a list is shorter
rows        a table with one line a row, or None: ours read its column "weight", yours may read any other

Either a number comes back or MetricUndefined says why there is none. NaN never passes.
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
from comp.engine.errors import Refused

__all__ = ["METRICS", "Metric", "MetricUndefined", "better", "custom", "find", "nearest"]

Needs = Literal["probability", "label", "ranking", "value"]


def identity(mean: Any) -> Any:
    return mean


@dataclass(frozen=True)
class Metric:
    name: str
    function: Callable[..., Any]  # of (truth, prediction, rows), or of what its kind in formulas.py takes
    direction: Literal["max", "min"]
    needs: Needs
    low: float = -math.inf  # what a score can be
    high: float = math.inf
    tasks: tuple[str, ...] = ()  # that it fits; empty: any. The default of a task stands in tasks.py
    kind: Literal["custom", "row", "curve", "weighted"] = "custom"
    finish: Callable[[Any], Any] = (
        identity  # of kind row: after the mean over rows, before the mean over columns
    )
    skip_undefined: bool = False  # NaN in truth and columns of one class are left out instead of refused

    @property
    def sign(self) -> int:
        """sign * score grows when a model gets better."""
        return 1 if self.direction == "max" else -1

    def __call__(self, truth: Any, prediction: Any, rows: Any = None) -> float:
        try:
            truth, prediction = self.validate(truth, prediction)
            if rows is not None and len(rows) != len(truth):
                raise MetricUndefined(f"rows has {len(rows)} lines for {len(truth)} predictions")
            if self.kind == "custom":
                score = float(self.function(truth, prediction, rows))
            else:
                score = self.weighted(truth, prediction, sample_weights(rows, len(truth)))
            if not math.isfinite(score) or not self.low - 1e-9 <= score <= self.high + 1e-9:
                raise MetricUndefined(f"{score:g} is no score from {self.low:g} to {self.high:g}")
        except MetricUndefined as fault:
            raise MetricUndefined(f"{self.name}: {fault}") from None
        return score

    def weighted(self, truth: Array, prediction: Array, weight: Array) -> float:
        """Ours only, without the checks."""
        if self.kind == "row":
            return metric_formulas.weighted_mean(self.function(truth, prediction), weight, self.finish)
        if self.kind == "curve":
            parts = metric_formulas.binary_columns(truth, prediction)
            tallies = (
                metric_formulas.class_weights_by_score(target, score, weight[graded])
                for graded, target, score in parts
            )
            return metric_formulas.mean_curve(self.function, self.skip_undefined, tallies)
        assert self.kind == "weighted", "a metric of yours has rows, not weights"
        return float(self.function(truth, prediction, weight))

    def validate(self, truth: Any, prediction: Any) -> tuple[Array, Array]:
        """Both as float64, one column as (n,). What would end in NaN or score something else is refused."""
        truth, prediction = as_float_array(truth, "truth"), as_float_array(prediction, "prediction")
        truth = truth[:, 0] if truth.shape[1:] == (1,) else truth
        prediction = (
            prediction[:, 0] if prediction.shape[1:] == (1,) and self.needs != "ranking" else prediction
        )
        if len(truth) != len(prediction):
            raise MetricUndefined(f"{len(prediction)} predictions for {len(truth)} rows of truth")
        if not len(truth):
            raise MetricUndefined("no rows to score")
        validate_finite(np.where(np.isnan(truth), 0, truth) if self.skip_undefined else truth, "truth")
        validate_finite(prediction, "prediction")
        if self.needs in ("label", "ranking") and (prediction != np.rint(prediction)).any():
            odd = prediction[prediction != np.rint(prediction)][0]
            raise MetricUndefined(f"wants labels, not {odd:g}: turn the prediction into labels first")
        if self.kind != "custom":
            if self.needs == "label" and truth.ndim == 2 and prediction.ndim == 1:
                truth = truth.argmax(axis=1).astype(
                    np.float64
                )  # shares per class: the likeliest is the label
            if self.needs == "ranking":
                fits = prediction.ndim == 2
            else:
                classes = self.needs == "probability" and truth.ndim == 1 and prediction.ndim == 2
                fits = classes or truth.shape == prediction.shape
            if not fits:
                raise MetricUndefined(
                    f"a prediction of shape {prediction.shape} does not fit truth of {truth.shape}"
                )
        return truth, prediction


def as_float_array(values: Any, what: str) -> Array:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise MetricUndefined(f"{what} holds something that is not a number") from None
    if array.ndim not in (1, 2):
        raise MetricUndefined(f"{what} must have one or two dimensions, not {array.ndim}")
    return array


def validate_finite(values: Array, what: str) -> None:
    lines = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
    if len(lines):
        raise MetricUndefined(
            f"{what} is NaN or infinite in {len(lines)} of {len(values)} rows, first in row {lines[0]}"
        )


def sample_weights(rows: Any, count: int) -> Array:
    if rows is None or "weight" not in rows:
        return np.ones(count)
    weight = np.asarray(rows["weight"], dtype=np.float64)
    if not (np.isfinite(weight).all() and weight.min() >= 0 and weight.sum() > 0):
        raise MetricUndefined('the column "weight" must be finite, nowhere negative and not all zero')
    return weight


_B, _C, _L, _T = ("binary",), ("multiclass",), ("multilabel",), ("retrieval",)
_R, _O = ("regression",), ("ordinal",)
_ANY_LABEL = _B + _C + _L + _O
_F = metric_formulas
# Bands of true positive rate: twice the weight below 0.4 is the weighted AUC of steganalysis, the part above 0.8 the
# partial AUC of skin lesions (0 to 0.2). For other bands copy a line.
_LOW_FPR = partial(_F.banded_auc, edges=(0.0, 0.4, 1.0), weights=(2.0, 1.0), whole=1.4)
_HIGH_TPR = partial(_F.banded_auc, edges=(0.0, 0.8, 1.0), weights=(0.0, 1.0), whole=1.0)
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
        Metric("weighted_auc", _LOW_FPR, "max", "probability", 0, 1, _B + _C + _L, "curve"),
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
AT_K = {"map": _F.average_precision_at, "accuracy": _F.top_k_accuracy}  # map@5 and its like take any k

# Other people's names, so that a refusal names the right one; no second name is accepted.
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
    """Names that were probably meant, the likeliest first."""
    close = difflib.get_close_matches(name.lower(), [*METRICS, *OTHER_NAMES], n=2 * count, cutoff=0.5)
    return list(dict.fromkeys(OTHER_NAMES.get(each, each) for each in close))[:count]


def find(name: str) -> Metric:
    stem, _, k = name.partition("@")
    if name in METRICS:
        return METRICS[name]
    if stem in AT_K and k.isdecimal() and 0 < int(k) <= 1000:
        like = METRICS[f"{stem}@5"]
        return Metric(name, partial(AT_K[stem], k=int(k)), "max", "ranking", 0, 1, like.tasks, "row")
    hint = " or ".join(nearest(name)) or "one of " + ", ".join(METRICS)
    raise Refused(f'metric "{name}" is unknown; nearest: {hint}')


def custom(function: Callable[..., Any]) -> Metric:
    """The metric of competition.py: a Metric, or a function with what it cannot say for itself in its attributes."""
    if isinstance(function, Metric):
        return function
    direction: Any = getattr(function, "direction", None)
    needs: Any = getattr(function, "needs", None)
    if direction not in ("max", "min"):
        raise Refused(f'comp/competition.py: set metric.direction = "max" or "min", not {direction!r}')
    if needs not in get_args(Needs):
        raise Refused(
            f"comp/competition.py: set metric.needs to one of {', '.join(get_args(Needs))}, not {needs!r}"
        )
    return Metric(getattr(function, "__name__", "metric"), function, direction, needs)


def better(metric: Metric, a: float, b: float) -> bool:
    """a beats b. NaN beats nothing, and any number beats NaN."""
    if math.isnan(a) or math.isnan(b):
        return not math.isnan(a) and math.isnan(b)
    return metric.sign * (a - b) > 0
