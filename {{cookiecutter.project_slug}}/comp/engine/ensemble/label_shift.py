"""Corrections of test predictions where test differs from train: fitted on them without labels, tried on folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import nested_cv, score
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.bank.predictions import PredictionSet
from comp.engine.ensemble import average, calibration, report
from comp.engine.ensemble.context import Context, Stored
from comp.engine.tasks.kinds import Array, Head


def fit(
    context: Context,
    recipe: Mapping[str, Any],
    oof: Stored,
    kept: NDArray[np.bool_],
    test: Sequence[PredictionSet],
) -> tuple[dict[str, Any], list[str]]:
    """Fitted on test predictions without labels. Each fold, treated as if it were the test set, must not lose by it beyond
    noise; whether test gains only the leaderboard can say."""
    kind, said, notes = context.blend.correct, {}, []
    given = {a["address"]: each.heads for a, each in zip(recipe["members"], test, strict=True)}
    plain = average.apply(recipe, given, context.samples.frame.iloc[test[0].row.astype(np.int64)])
    for head in context.samples.heads:
        truth, own = context.samples.truth(head, context.rows), oof[head.name][kept].astype(np.float64)
        if kind == "prior" and head.spec.space != "logit":
            notes.append(f"correct: prior is for classes, and {head.name} has values; take rank")
            continue
        if kind == "prior" and truth.ndim > 1:
            notes.append("correct: prior wants hard labels")
            continue

        def corrected(
            rows: Array, others: NDArray[np.bool_], head: Head = head, truth: Any = truth, own: Any = own
        ) -> Any:
            if kind == "rank":
                return calibration.rank(rows, own[others], head)
            count = 2 if head.task == "binary" else len(head.outputs)
            shares = np.bincount(truth[others].astype(np.int64), minlength=count) + 0.5
            return calibration.prior(rows, shares / shares.sum(), head)

        tried = own.copy()
        for number in np.unique(context.fold):
            mine = context.fold == number
            tried[mine] = calibration.apply(corrected(own[mine], ~mine), own[mine], head)
        (now, here), (before, _) = (
            context.metric_input(head, each, context.all_rows) for each in (tried, own)
        )
        try:
            pair = nested_cv.paired(
                now.metric,
                now.truth,
                now.prediction,
                before.prediction,
                score.groups_of(context.samples, here.rows),
                report.RESAMPLES,
                rows=now.frame,
            )
        except MetricUndefined as fault:
            notes.append(f"correct: {kind} left out: {fault}")
            continue
        there = ~np.isnan(plain[head.name]).any(axis=1)
        step = corrected(plain[head.name][there].astype(np.float64), np.ones(len(own), bool))
        if pair.significant and pair.share < 0.5:
            notes.append(f"correct: {kind} left out: on folds treated as test it is {pair}")
            continue
        said[head.name] = step
        notes.append(f"correct: {kind} in force for test rows; on folds treated as test it is {pair}")
        if kind == "prior":
            names = head.classes or ("0", "1")
            pairs = zip(names, step["shares_before"], step["shares"], strict=True)
            notes.append(
                "  shares in train and, by EM, in test: "
                + ", ".join(f"{n} {a:.3f} {b:.3f}" for n, a, b in pairs)
            )
    return said, notes
