"""What may follow a blend: calibration, thresholds per class, and corrections where test differs from train.

A step is fitted on the honest OOF predictions of other folds, and kept only where that gains on the metric. What is kept goes into
apply.json as numbers; steps change what is stored, so that everything behind them (labels, submission, other ensembles)
needs to know nothing of it. Cut points of grades stand in score.json, by the same rule (comp/engine/bank/score.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import thresholds
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.tasks.kinds import Array, Head, log_softmax, logit, sigmoid, softmax
from comp.metrics import Metric

Fit = Callable[[Array, NDArray[Any], Head, Metric, Any], dict[str, Any]]
KNOTS = 512
SURE = 1e-6


def apply(step: Mapping[str, Any], stored: Array, head: Head) -> Array:
    return APPLY[step["kind"]](step, np.asarray(stored, np.float64), head)


# --- temperature, Platt: a slope and a shift of the logits ---------------------------------------------------------------


def _scaled(step: Mapping[str, Any], stored: Array, head: Head) -> Array:
    out = stored * step["slope"] + np.asarray(step["shift"])
    return log_softmax(out) if head.exclusive else out


def _temperature(stored: Array, truth: NDArray[Any], head: Head, metric: Metric, rows: Any) -> dict[str, Any]:
    return _minimal(stored, truth, head, shifted=False)


def _platt(stored: Array, truth: NDArray[Any], head: Head, metric: Metric, rows: Any) -> dict[str, Any]:
    return _minimal(stored, truth, head, shifted=True)


def _minimal(stored: Array, truth: NDArray[Any], head: Head, shifted: bool) -> dict[str, Any]:
    """The slope, and where wanted the shifts, with the least log loss: convex, so there is one. A label that nobody gave has no
    say."""
    from scipy.optimize import minimize

    width, several = len(head.outputs), head.exclusive
    target = (
        np.eye(width)[truth.astype(np.int64)]
        if several and truth.ndim == 1
        else truth.reshape(len(truth), -1)
    )

    known = ~np.isnan(target)
    target = np.where(known, target, 0.0)

    def loss(x: Array) -> tuple[float, Array]:
        shift = x[1:] if shifted else np.zeros(width)
        z = stored * x[0] + shift
        p = softmax(z) if several else sigmoid(z)
        value = (
            -(target * log_softmax(z)).sum()
            if several
            else ((np.logaddexp(0.0, z) - target * z) * known).sum()
        )
        off = (p * (target.sum(axis=1, keepdims=True) if several else 1.0) - target) * known
        slope = np.append((off * stored).sum(), off.sum(axis=0) if shifted else [])
        return float(value) / len(target), slope / len(target)

    start = np.append(1.0, np.zeros(width if shifted else 0))
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=[(0.01, 20.0)] + [(-20, 20)] * (len(start) - 1)
    ).x
    shift = (found[1:] - (found[1:].mean() if several else 0)).tolist() if shifted else [0.0] * width
    return {"kind": "scaled", "slope": float(found[0]), "shift": shift}


# --- isotonic ------------------------------------------------------------------------------------------------------------


def _isotonic(stored: Array, truth: NDArray[Any], head: Head, metric: Metric, rows: Any) -> dict[str, Any]:
    """A rising staircase from probability to probability, one for each output, by the rows whose label is known."""
    from sklearn.isotonic import IsotonicRegression

    p, maps = head.spec.to_probability(stored), []
    wide = np.eye(len(head.outputs))[truth.astype(np.int64)] if head.exclusive else truth.reshape(len(p), -1)
    for code, target in enumerate(wide.T):
        known = ~np.isnan(target)
        if not known.any():
            maps.append({"x": [SURE, 1 - SURE], "y": [SURE, 1 - SURE]})
            continue
        model = IsotonicRegression(y_min=SURE, y_max=1 - SURE, out_of_bounds="clip")
        model.fit(p[known, code], target[known])
        kept = np.unique(np.linspace(0, len(model.X_thresholds_) - 1, KNOTS).round().astype(int))
        maps.append({"x": model.X_thresholds_[kept].tolist(), "y": model.y_thresholds_[kept].tolist()})
    return {"kind": "stairs", "maps": maps}


def _stairs(step: Mapping[str, Any], stored: Array, head: Head) -> Array:
    p = head.spec.to_probability(stored)
    out = np.stack([np.interp(p[:, i], m["x"], m["y"]) for i, m in enumerate(step["maps"])], axis=1)
    return log_softmax(np.log(out)) if head.exclusive else logit(out)


# --- thresholds ----------------------------------------------------------------------------------------------------------


def _thresholds(stored: Array, truth: NDArray[Any], head: Head, metric: Metric, rows: Any) -> dict[str, Any]:
    """As shifts of the logits, so that one half, or the likeliest class, is where the label turns."""
    if head.task == "binary":
        cut = thresholds.fit_threshold(truth, head.spec.to_probability(stored)[:, 0], metric, rows)
        return {
            "kind": "scaled",
            "slope": 1.0,
            "shift": [-float(logit(np.clip(np.array(cut), SURE, 1 - SURE)))],
        }
    shift = np.zeros(len(head.outputs))
    reached = metric.sign * metric(truth, stored.argmax(axis=1), rows)
    for width in (1.0, 0.3, 0.1):  # one class after the other, in ever finer steps
        for code in range(len(shift)):
            for step in np.linspace(-3, 3, 13) * width:
                tried = shift.copy()
                tried[code] += step
                score = metric.sign * metric(truth, (stored + tried).argmax(axis=1), rows)
                if score > reached + 1e-12:
                    reached, shift = score, tried
    return {"kind": "scaled", "slope": 1.0, "shift": shift.tolist()}


FITS: dict[str, Fit] = {
    "temperature": _temperature,
    "platt": _platt,
    "isotonic": _isotonic,
    "thresholds": _thresholds,
}
APPLY: dict[str, Callable[[Mapping[str, Any], Array, Head], Array]] = {}


def not_applicable(name: str, head: Head, metric: Metric, truth: NDArray[Any]) -> str:
    """Why a step has nothing to do here; empty when it has."""
    if head.spec.space != "logit":
        return f"{name} is for classes, and {head.name} has values"
    if name == "thresholds" and (metric.needs != "label" or metric.name in ("precision", "recall")):
        return f"thresholds make labels, and {metric.name} does not score labels by one"
    if name == "thresholds" and head.task == "multilabel":
        return "those of labels are fitted with every score, by the same rule"
    if name in ("isotonic", "thresholds") and truth.ndim > 1 and head.exclusive:
        return f"{name} wants hard labels"
    return ""


def fit(
    name: str, stored: Array, truth: NDArray[Any], head: Head, metric: Metric, rows: Any
) -> dict[str, Any]:
    """Where the metric has no number for any setting, the step that changes nothing."""
    try:
        return FITS[name](stored, truth, head, metric, rows)
    except MetricUndefined:
        return {"kind": "scaled", "slope": 1.0, "shift": [0.0] * len(head.outputs)}


# --- where test differs from train ---------------------------------------------------------------------------------------


def prior(stored: Array, truth_shares: Array, head: Head, rounds: int = 200) -> dict[str, Any]:
    """Shares of the classes among rows without labels, by EM (Saerens and others 2002), as a shift of the logits. It needs
    calibrated probabilities, and that within a class test looks like train."""
    p = head.spec.to_probability(stored)
    p = np.hstack([1 - p, p]) if head.task == "binary" else p
    here = truth_shares
    for _ in range(rounds):
        weighted = p * (here / truth_shares)
        here = (weighted / weighted.sum(axis=1, keepdims=True)).mean(axis=0)
        here = np.maximum(here, 1e-6)
        here = here / here.sum()
    ratio = np.log(here / truth_shares)
    shift = [float(ratio[1] - ratio[0])] if head.task == "binary" else (ratio - ratio.mean()).tolist()
    return {
        "kind": "scaled",
        "slope": 1.0,
        "shift": shift,
        "shares": here.tolist(),
        "shares_before": truth_shares.tolist(),
    }


def rank(stored: Array, like: Array, head: Head) -> dict[str, Any]:
    """Each output of rows without labels mapped so that it is spread as in the OOF rows: the order stays."""
    grid = (np.arange(KNOTS) + 0.5) / KNOTS
    maps = []
    for code in range(stored.shape[1]):
        x, at = np.unique(np.quantile(stored[:, code].astype(np.float64), grid), return_index=True)
        maps.append({"x": x.tolist(), "y": np.quantile(like[:, code].astype(np.float64), grid)[at].tolist()})
    return {"kind": "mapped", "maps": maps}


def _mapped(step: Mapping[str, Any], stored: Array, head: Head) -> Array:
    out = np.empty_like(stored)
    for i, m in enumerate(step["maps"]):
        x, y = np.asarray(m["x"]), np.asarray(m["y"])
        out[:, i] = np.interp(stored[:, i], x, y)
        out[:, i] += np.minimum(stored[:, i] - x[0], 0) + np.maximum(stored[:, i] - x[-1], 0)
    return log_softmax(out) if head.exclusive else out


APPLY |= {"scaled": _scaled, "stairs": _stairs, "mapped": _mapped}
