"""Selects the steps after the blend: those whose nested gain exceeds one standard error over the folds."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from comp.engine.bank import nested_cv, score
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.ensemble import calibration
from comp.engine.ensemble.context import Context, Positions
from comp.engine.tasks.kinds import Array, Head


class Gain(NamedTuple):
    before: float  # nested scores over all rows
    with_step: float
    improved: bool
    fold_gain: float  # mean over folds
    error: float  # standard error of that mean

    def __str__(self) -> str:
        return (
            f"{self.before:.4f} before, {self.with_step:.4f} with it, "
            f"{self.fold_gain:+.4f} ± {self.error:.4f} over folds (nested)"
        )


def select(
    context: Context, head: Head, values: Array, at: Positions
) -> tuple[list[dict[str, Any]], list[str]]:
    """(steps for apply.json, lines for the user). values: nested predictions of the rows `at`; no other row
    is used."""
    steps: list[dict[str, Any]] = []
    notes = []
    truth, metric = context.samples.truth(head, context.rows[at]), context.metric(head)
    frame = score.metric_frame(context.samples, context.rows[at])
    for name in context.blend.after or ():
        if reason := calibration.not_applicable(name, head, metric, truth):
            notes.append(f"{name}: has no effect: {reason}")
            continue
        base = values

        def fit(few: Positions, name: str = name, base: Array = base) -> dict[str, Any]:
            return calibration.fit(name, base[few], truth[few], head, metric, frame.iloc[few])

        def apply(step: dict[str, Any], few: Positions, base: Array = base) -> Array:
            return calibration.apply(step, base[few], head)

        found = context.nested_predict(at, fit, apply, calibration.no_change(head))
        try:
            gain = measure_gain(context, head, values, found.prediction, at)
        except MetricUndefined as error:
            notes.append(f"{name}: not used: {error}")
            continue
        if gain.improved:
            steps.append(found.final)
            values = found.prediction
        notes.append(f"{name}: {'used' if gain.improved else 'not used'}, {metric.name} {gain}")
    return steps, notes


def measure_gain(context: Context, head: Head, before: Array, after: Array, at: Positions) -> Gain:
    """improved: better over all rows, and by more than one standard error over the folds."""
    (old, scored), (new, _) = (context.metric_input(head, stored, at) for stored in (before, after))
    scores = [given.metric(given.truth, given.prediction, given.frame) for given in (old, new)]
    by_fold = [
        nested_cv.fold_table(g.metric, g.truth, g.prediction, scored.fold, g.frame).folds for g in (old, new)
    ]
    sign = new.metric.sign
    gains = [
        sign * (b - a) for (*_, a), (*_, b) in zip(*by_fold, strict=True) if a is not None and b is not None
    ]
    mean = float(np.mean(gains))
    error = float(np.std(gains, ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else 0.0
    improved = sign * (scores[1] - scores[0]) > 0 and mean > error
    return Gain(scores[0], scores[1], improved, mean, error)
