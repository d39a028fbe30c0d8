"""Which steps after the blend are kept: those whose gain on folds that did not fit them is more than it may be by luck."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from comp.engine.bank import nested_cv, score
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.ensemble import calibration
from comp.engine.ensemble.context import Context, Positions
from comp.engine.tasks.kinds import Array, Head


class Gain(NamedTuple):
    before: float
    with_step: float
    improved: bool
    fold_gain: float
    error: float  # of the mean over folds

    def __str__(self) -> str:
        return f"{self.before:.4f} before, {self.with_step:.4f} with it, {self.fold_gain:+.4f} ± {self.error:.4f} over folds, all honest"


def select(context: Context, head: Head, own: Array, at: Positions) -> tuple[list[dict[str, Any]], list[str]]:
    """(what goes into apply.json, what is told). own: honest predictions of the rows `at`; nothing else is looked at."""
    steps: list[dict[str, Any]] = []
    notes = []
    truth, metric = context.samples.truth(head, context.rows[at]), context.metric(head)
    frame = score.metric_frame(context.samples, context.rows[at])
    for name in context.blend.after or ():
        if why := calibration.not_applicable(name, head, metric, truth):
            notes.append(f"{name}: has no effect, since {why}")
            continue
        base = own

        def taught(few: Positions, name: str = name, base: Array = base) -> dict[str, Any]:
            return calibration.fit(name, base[few], truth[few], head, metric, frame.iloc[few])

        def said(step: dict[str, Any], few: Positions, base: Array = base) -> Array:
            return calibration.apply(step, base[few], head)

        nothing = {"kind": "scaled", "slope": 1.0, "shift": [0.0] * len(head.outputs)}
        found = context.nested_predict(at, taught, said, nothing)
        try:
            gain = measure_gain(context, head, own, found.prediction, at)
        except MetricUndefined as fault:
            notes.append(f"{name}: left out: {fault}")
            continue
        if gain.improved:
            steps.append(found.final)
            own = found.prediction
        notes.append(f"{name}: {'kept' if gain.improved else 'left out'}, {metric.name} {gain}")
    return steps, notes


def measure_gain(context: Context, head: Head, before: Array, now: Array, at: Positions) -> Gain:
    """More over all rows, and by more than one standard error over the folds."""
    (old, here), (new, _) = (context.metric_input(head, stored, at) for stored in (before, now))
    whole = [ask.metric(ask.truth, ask.prediction, ask.frame) for ask in (old, new)]
    by_fold = [
        nested_cv.fold_table(a.metric, a.truth, a.prediction, here.fold, a.frame).folds for a in (old, new)
    ]
    gains = [
        new.metric.sign * (b - a)
        for (*_, a), (*_, b) in zip(*by_fold, strict=True)
        if a is not None and b is not None
    ]
    mean, error = float(np.mean(gains)), float(np.std(gains, ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else 0.0  # fmt: skip
    return Gain(whole[0], whole[1], new.metric.sign * (whole[1] - whole[0]) > 0 and mean > error, mean, error)
