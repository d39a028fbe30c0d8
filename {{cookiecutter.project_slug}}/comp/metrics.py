"""metric(truth, prediction, rows) -> float. METRICS has one line per metric; their formulas are in
comp/engine/bank/metric_formulas.py.

truth       binary, regression, ordinal (n,); multiclass (n,) class codes or (n, classes) soft labels;
            multilabel (n, columns) of 0 and 1
prediction  probability: (n,) or (n, classes); label: codes (n,) or 0/1 (n, columns); value: (n,) or
            (n, columns); ranking: (n, k) class codes, best first, padded with -1
rows        a DataFrame with one line per row, or None. The metrics here use its column "weight"; a metric of
            your own may use any column

A call returns a finite float or raises MetricUndefined with the reason; it never returns NaN.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np

from comp.engine import pages
from comp.engine.bank import metric_formulas
from comp.engine.bank.metric import Metric, Needs
from comp.engine.errors import UserError

_B, _C, _L, _T = ("binary",), ("multiclass",), ("multilabel",), ("retrieval",)
_R, _O = ("regression",), ("ordinal",)
_ANY_LABEL = _B + _C + _L + _O
_F = metric_formulas
# AUC by bands of true positive rate. ALASKA2 (steganalysis): double weight below 0.4. ISIC 2024 (skin
# lesions): only the area above 0.8, so 0 to 0.2. For other bands copy a line.
_LOW_TPR = partial(_F.banded_auc, edges=(0.0, 0.4, 1.0), weights=(2.0, 1.0), total=1.4)
_HIGH_TPR = partial(_F.banded_auc, edges=(0.0, 0.8, 1.0), weights=(0.0, 1.0), total=1.0)
_INF = math.inf

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
}  # fmt: skip
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
    """The metric of METRICS with this name; map@k and accuracy@k with any k; `metric`: the function of this
    name in comp/competition.py."""
    if name == "metric":
        function = pages.get("metric")
        if function is None:
            raise UserError(
                "metric-missing",
                key=name,
                what="comp/competition.py defines no function named metric",
                remedy="define it, or name a metric of comp/metrics.py",
            )
        return custom(function)
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
