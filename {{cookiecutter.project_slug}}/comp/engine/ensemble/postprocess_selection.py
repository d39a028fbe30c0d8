"""Which steps after the blend are kept: those whose gain on folds that did not fit them is more than it may be by luck."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from comp.engine.bank import nested_cv, score
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.ensemble import calibration
from comp.engine.ensemble.context import Ground, Positions
from comp.engine.tasks.kinds import Array, Head


class Gain(NamedTuple):
    before: float
    now: float
    kept: bool
    fold_gain: float
    error: float  # of the mean over folds

    def __str__(self) -> str:
        return f"{self.before:.4f} before, {self.now:.4f} with it, {self.fold_gain:+.4f} ± {self.error:.4f} over folds, all honest"


def fit(ground: Ground, head: Head, own: Array, at: Positions) -> tuple[list[dict[str, Any]], list[str]]:
    """(what goes into apply.json, what is told). own: honest predictions of the rows `at`; nothing else is looked at."""
    steps: list[dict[str, Any]] = []
    notes = []
    truth, metric = ground.samples.truth(head, ground.rows[at]), ground.metric(head)
    frame = score.scored(ground.samples, ground.rows[at])
    for name in ground.blend.after or ():
        if why := calibration.unfit(name, head, metric, truth):
            notes.append(f"{name}: has no effect, since {why}")
            continue
        base = own

        def taught(few: Positions, name: str = name, base: Array = base) -> dict[str, Any]:
            return calibration.fit(name, base[few], truth[few], head, metric, frame.iloc[few])

        def said(step: dict[str, Any], few: Positions, base: Array = base) -> Array:
            return calibration.apply(step, base[few], head)

        nothing = {"kind": "scaled", "slope": 1.0, "shift": [0.0] * len(head.outputs)}
        found = ground.nested(at, taught, said, nothing)
        try:
            gain = gained(ground, head, own, found.prediction, at)
        except MetricUndefined as fault:
            notes.append(f"{name}: left out: {fault}")
            continue
        if gain.kept:
            steps.append(found.final)
            own = found.prediction
        notes.append(f"{name}: {'kept' if gain.kept else 'left out'}, {metric.name} {gain}")
    return steps, notes


def gained(ground: Ground, head: Head, before: Array, now: Array, at: Positions) -> Gain:
    """More over all rows, and by more than one standard error over the folds."""
    (old, here), (new, _) = (ground.asked(head, stored, at) for stored in (before, now))
    whole = [ask.metric(ask.truth, ask.answer, ask.frame) for ask in (old, new)]
    by_fold = [
        nested_cv.fold_table(a.metric, a.truth, a.answer, here.fold, a.frame).folds for a in (old, new)
    ]
    gains = [
        new.metric.sign * (b - a)
        for (*_, a), (*_, b) in zip(*by_fold, strict=True)
        if a is not None and b is not None
    ]
    mean, error = float(np.mean(gains)), float(np.std(gains, ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else 0.0  # fmt: skip
    return Gain(whole[0], whole[1], new.metric.sign * (whole[1] - whole[0]) > 0 and mean > error, mean, error)
