"""Steps after a blend: calibration, thresholds per class, and corrections where test differs from train.

A step is fitted on nested OOF predictions and used only if it improves the nested score
(postprocess_selection.py). Its numbers go into apply.json. A step maps stored predictions to stored
predictions, so labels, submissions and further ensembles need not know about it. Cut points of ordinal
targets are in score.json instead (bank/score.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import thresholds
from comp.engine.bank.metric import Metric
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.tasks.kinds import Array, Head, log_softmax, logit, sigmoid, softmax

Fit = Callable[[Array, NDArray[Any], Head, Metric, Any], dict[str, Any]]
KNOTS = 512  # of an interpolated map
CLIP = 1e-6  # probabilities are clipped to CLIP .. 1 - CLIP


def apply(step: Mapping[str, Any], stored: Array, head: Head) -> Array:
    return APPLY[step["kind"]](step, np.asarray(stored, np.float64), head)


# --- temperature, Platt: a slope and a shift of the logits --------------------------------------------------


def _scaled(step: Mapping[str, Any], stored: Array, head: Head) -> Array:
    out = stored * step["slope"] + np.asarray(step["shift"])
    return log_softmax(out) if head.exclusive else out


def _temperature(stored: Array, truth: NDArray[Any], head: Head, metric: Metric, rows: Any) -> dict[str, Any]:
    return _fit_slope_and_shift(stored, truth, head, shifted=False)


def _platt(stored: Array, truth: NDArray[Any], head: Head, metric: Metric, rows: Any) -> dict[str, Any]:
    return _fit_slope_and_shift(stored, truth, head, shifted=True)


def _fit_slope_and_shift(stored: Array, truth: NDArray[Any], head: Head, shifted: bool) -> dict[str, Any]:
    """The slope, and if `shifted` the shifts, that minimise the log loss (a convex problem). Unknown labels
    (NaN) are ignored."""
    from scipy.optimize import minimize

    width, exclusive = len(head.outputs), head.exclusive
    one_hot = exclusive and truth.ndim == 1
    target = np.eye(width)[truth.astype(np.int64)] if one_hot else truth.reshape(len(truth), -1)
    known = ~np.isnan(target)
    target = np.where(known, target, 0.0)

    def loss(x: Array) -> tuple[float, Array]:
        """(mean loss, gradient) of x: slope, shifts."""
        shift = x[1:] if shifted else np.zeros(width)
        z = stored * x[0] + shift
        p = softmax(z) if exclusive else sigmoid(z)
        value = (
            -(target * log_softmax(z)).sum()
            if exclusive
            else ((np.logaddexp(0.0, z) - target * z) * known).sum()
        )
        residual = (p * (target.sum(axis=1, keepdims=True) if exclusive else 1.0) - target) * known
        gradient = np.append((residual * stored).sum(), residual.sum(axis=0) if shifted else [])
        return float(value) / len(target), gradient / len(target)

    start = np.append(1.0, np.zeros(width if shifted else 0))
    solution = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=[(0.01, 20.0)] + [(-20, 20)] * (len(start) - 1)
    ).x
    shift = (solution[1:] - (solution[1:].mean() if exclusive else 0)).tolist() if shifted else [0.0] * width
    return {"kind": "scaled", "slope": float(solution[0]), "shift": shift}


# --- isotonic -----------------------------------------------------------------------------------------------


def _isotonic(stored: Array, truth: NDArray[Any], head: Head, metric: Metric, rows: Any) -> dict[str, Any]:
    """Isotonic regression from probability to probability, one per output, on the rows whose label is
    known."""
    from sklearn.isotonic import IsotonicRegression

    p, maps = head.spec.to_probability(stored), []
    wide = np.eye(len(head.outputs))[truth.astype(np.int64)] if head.exclusive else truth.reshape(len(p), -1)
    for code, target in enumerate(wide.T):
        known = ~np.isnan(target)
        if not known.any():
            maps.append({"x": [CLIP, 1 - CLIP], "y": [CLIP, 1 - CLIP]})
            continue
        model = IsotonicRegression(y_min=CLIP, y_max=1 - CLIP, out_of_bounds="clip")
        model.fit(p[known, code], target[known])
        knots = np.unique(np.linspace(0, len(model.X_thresholds_) - 1, KNOTS).round().astype(int))
        maps.append({"x": model.X_thresholds_[knots].tolist(), "y": model.y_thresholds_[knots].tolist()})
    return {"kind": "isotonic", "maps": maps}


def _interpolated(step: Mapping[str, Any], stored: Array, head: Head) -> Array:
    p = head.spec.to_probability(stored)
    out = np.stack([np.interp(p[:, i], m["x"], m["y"]) for i, m in enumerate(step["maps"])], axis=1)
    return log_softmax(np.log(out)) if head.exclusive else logit(out)


# --- thresholds ---------------------------------------------------------------------------------------------


def _thresholds(stored: Array, truth: NDArray[Any], head: Head, metric: Metric, rows: Any) -> dict[str, Any]:
    """Thresholds as shifts of the logits, so that 0.5, or the most likely class, gives the label."""
    if head.task == "binary":
        cut = thresholds.fit_threshold(truth, head.spec.to_probability(stored)[:, 0], metric, rows)
        return {
            "kind": "scaled",
            "slope": 1.0,
            "shift": [-float(logit(np.clip(np.array(cut), CLIP, 1 - CLIP)))],
        }
    shift = np.zeros(len(head.outputs))
    reached = metric.sign * metric(truth, stored.argmax(axis=1), rows)
    for width in (1.0, 0.3, 0.1):  # coordinate descent over the classes, on finer and finer grids
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


def not_applicable(name: str, head: Head, metric: Metric, truth: NDArray[Any]) -> str:
    """The reason why a step has no effect on this head; empty if it has one."""
    if head.spec.space != "logit":
        return f"{name} is for classes, {head.name} has values"
    if name == "thresholds" and (metric.needs != "label" or metric.name in ("precision", "recall")):
        return f"{metric.name} needs no threshold for labels"
    if name == "thresholds" and head.task == "multilabel":
        return "thresholds of labels are fitted with every score"
    if name in ("isotonic", "thresholds") and truth.ndim > 1 and head.exclusive:
        return f"{name} needs hard labels"
    return ""


def fit(
    name: str, stored: Array, truth: NDArray[Any], head: Head, metric: Metric, rows: Any
) -> dict[str, Any]:
    """The fitted step, or no_change if the metric is undefined for every setting."""
    try:
        return FITS[name](stored, truth, head, metric, rows)
    except MetricUndefined:
        return no_change(head)


def no_change(head: Head) -> dict[str, Any]:
    return {"kind": "scaled", "slope": 1.0, "shift": [0.0] * len(head.outputs)}


# --- where test differs from train --------------------------------------------------------------------------


def prior(stored: Array, train_shares: Array, head: Head, rounds: int = 200) -> dict[str, Any]:
    """A shift of the logits to the class shares of unlabeled rows, estimated by EM (Saerens et al. 2002).
    Assumes calibrated probabilities, and that within a class test is distributed as train."""
    p = head.spec.to_probability(stored)
    p = np.hstack([1 - p, p]) if head.task == "binary" else p
    shares = train_shares
    for _ in range(rounds):
        weighted = p * (shares / train_shares)
        shares = (weighted / weighted.sum(axis=1, keepdims=True)).mean(axis=0)
        shares = np.maximum(shares, 1e-6)
        shares = shares / shares.sum()
    ratio = np.log(shares / train_shares)
    shift = [float(ratio[1] - ratio[0])] if head.task == "binary" else (ratio - ratio.mean()).tolist()
    return {
        "kind": "scaled",
        "slope": 1.0,
        "shift": shift,
        "shares": shares.tolist(),
        "shares_before": train_shares.tolist(),
    }


def rank(stored: Array, like: Array, head: Head) -> dict[str, Any]:
    """Maps each output of unlabeled rows to the distribution of the OOF rows `like` (quantile matching); the
    order stays."""
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


APPLY: dict[str, Callable[[Mapping[str, Any], Array, Head], Array]] = {
    "scaled": _scaled,
    "isotonic": _interpolated,
    "mapped": _mapped,
}
