"""Corrections of test predictions for test data that differ from train: fitted without labels, validated on
folds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import nested_cv, score
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.bank.predictions import PredictionSet
from comp.engine.ensemble import average, calibration, comparison
from comp.engine.ensemble.context import Context, HeadValues
from comp.engine.tasks.kinds import Array, Head

# (predictions to correct, mask of the labeled rows) -> the step for calibration.apply
Fit = Callable[[Array, NDArray[np.bool_]], dict[str, Any]]


def fit(
    context: Context,
    recipe: Mapping[str, Any],
    oof: HeadValues,
    predicted: NDArray[np.bool_],
    test: Sequence[PredictionSet],
) -> tuple[dict[str, Any], list[str]]:
    """(head -> step, lines for the user). A step is fitted on the test predictions; it is used unless it
    makes the folds, each treated as if it were the test set, significantly worse. Only the leaderboard can
    show a gain on test."""
    kind, steps, notes = context.blend.correct, {}, []
    values = {m["address"]: part.heads for m, part in zip(recipe["members"], test, strict=True)}
    uncorrected = average.apply(recipe, values, context.samples.frame.iloc[test[0].row.astype(np.int64)])
    for head in context.samples.heads:
        truth = context.samples.truth(head, context.rows)
        own = oof[head.name][predicted].astype(np.float64)
        if kind == "prior" and head.spec.space != "logit":
            notes.append(f"correct: prior is for classes, {head.name} has values; use rank")
            continue
        if kind == "prior" and truth.ndim > 1:
            notes.append("correct: prior needs hard labels")
            continue
        fit_step = _fit_step(str(kind), head, truth, own)
        try:
            pair = _validate(context, head, own, fit_step)
        except MetricUndefined as error:
            notes.append(f"correct: {kind} not used: {error}")
            continue
        at = ~np.isnan(uncorrected[head.name]).any(axis=1)
        step = fit_step(uncorrected[head.name][at].astype(np.float64), np.ones(len(own), bool))
        if pair.significant and pair.share < 0.5:
            notes.append(f"correct: {kind} not used; on folds treated as test it is {pair}")
            continue
        steps[head.name] = step
        notes.append(f"correct: {kind} used for test rows; on folds treated as test it is {pair}")
        if kind == "prior":
            names = head.classes or ("0", "1")
            shares = zip(names, step["shares_before"], step["shares"], strict=True)
            listed = ", ".join(f"{name} {train:.3f} {test_:.3f}" for name, train, test_ in shares)
            notes.append(f"  class shares in train and, by EM, in test: {listed}")
    return steps, notes


def _fit_step(kind: str, head: Head, truth: NDArray[Any], own: Array) -> Fit:
    """own: the OOF predictions."""

    def fit_step(rows: Array, labelled: NDArray[np.bool_]) -> dict[str, Any]:
        if kind == "rank":
            return calibration.rank(rows, own[labelled], head)
        count = 2 if head.task == "binary" else len(head.outputs)
        shares = np.bincount(truth[labelled].astype(np.int64), minlength=count) + 0.5
        return calibration.prior(rows, shares / shares.sum(), head)

    return fit_step


def _validate(context: Context, head: Head, own: Array, fit_step: Fit) -> nested_cv.Paired:
    """Corrected against uncorrected OOF predictions, each fold corrected as if it were the test set."""
    corrected = own.copy()
    for k in np.unique(context.fold):
        in_fold = context.fold == k
        corrected[in_fold] = calibration.apply(fit_step(own[in_fold], ~in_fold), own[in_fold], head)
    now, scored = context.metric_input(head, corrected, context.all_rows)
    before, _ = context.metric_input(head, own, context.all_rows)
    return nested_cv.paired(
        now.metric,
        now.truth,
        now.prediction,
        before.prediction,
        score.groups_of(context.samples, scored.rows),
        comparison.RESAMPLES,
        rows=now.frame,
    )
