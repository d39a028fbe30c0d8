"""Fits an ensemble: the parameters of apply.json, nested predictions of the OOF rows, and in-sample
predictions.

Nested: weights, the steps after the blend, and the decision which of these steps to use are fitted for each
fold as if this fold did not exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from comp.engine.bank.predictions import PredictionSet
from comp.engine.ensemble import (
    average,
    calibration,
    label_shift,
    latency,
    methods,
    postprocess_selection,
    weight_search,
)
from comp.engine.ensemble.blend_config import Blend
from comp.engine.ensemble.context import Context, HeadValues, Positions, Refit, Setup
from comp.engine.tasks.kinds import Array, Head


@dataclass
class FittedEnsemble:
    recipe: dict[str, Any]  # content of apply.json
    nested: HeadValues  # OOF rows, each fold by parameters of the other folds
    in_sample: HeadValues | None  # OOF rows by parameters of all folds; None if nothing was fitted
    weights: list[float | None]  # of each member; None for stackers
    notes: list[str] = field(default_factory=list)  # lines for the user


def fit_ensemble(
    setup: Setup,
    blend: Blend,
    oof: Sequence[PredictionSet],
    test: Sequence[PredictionSet],
    recipes: Mapping[str, Any],
    refits: Mapping[str, Refit],
    quiet: bool = False,
) -> FittedEnsemble:
    """oof, test: of each member. recipes, refits: of the members that are ensembles, by address (see
    members.py)."""
    predicted = oof[0].predicted
    assert oof[0].fold is not None
    rows, fold = oof[0].row[predicted].astype(np.int64), oof[0].fold[predicted].astype(np.int64)
    member_refits = {i: _among(refits[a], predicted) for i, a in enumerate(blend.members) if a in refits}
    context = Context(setup.cfg, setup.samples, setup.folds, blend, rows, fold, member_refits)
    heads = setup.samples.heads
    budgets = weight_search.Budgets(_budget(blend, setup), {})
    nested, in_sample, fitted, notes = {}, {}, {}, []
    count = len(heads) * _number_of_fits(blend, len(np.unique(fold)))
    with tqdm(
        total=count, desc=f"fitting {blend.method}", delay=2, disable=quiet or None, leave=False
    ) as bar:
        for head in heads:
            parts = [np.asarray(member.heads[head.name]) for member in oof]
            parts = parts if predicted.all() else [part[predicted] for part in parts]
            found, own, all_rows = fit_head(context, head, parts, budgets, bar)
            fitted[head.name] = found
            notes += [*methods.chosen_strength(blend, head, found.params), *found.notes]
            nested[head.name], in_sample[head.name] = (
                _all_rows(own, predicted),
                _all_rows(all_rows, predicted),
            )
    weights = _member_weights([found.params for found in fitted.values()], len(oof))
    used = [i for i, weight in enumerate(weights) if weight != 0]
    recipe = _recipe(setup, blend, oof, weights, used, recipes, fitted)
    if blend.correct:
        recipe["correct"], lines = label_shift.fit(
            context, recipe, nested, predicted, [test[i] for i in used]
        )
        notes += lines
    uses_labels = methods.uses_labels(blend) or bool(blend.after)
    return FittedEnsemble(recipe, nested, in_sample if uses_labels else None, weights, notes)


def refit(
    setup: Setup,
    blend: Blend,
    oof: Sequence[PredictionSet],
    refits: Mapping[str, Refit],
    at: NDArray[np.int64],
) -> HeadValues:
    """Nested OOF predictions of an ensemble fitted on the rows `at` alone.

    A second level must not be fitted on the first level's own OOF predictions: those of fold 1 come from
    parameters that were fitted on the labels of fold 0, so parameters fitted on fold 1 and scored on fold 0
    would be biased by them. The cost is K - 1 fits for each of K folds.
    """
    assert oof[0].fold is not None
    sets = []
    for address, part in zip(blend.members, oof, strict=True):
        heads = refits[address](at) if address in refits else {n: v[at] for n, v in part.heads.items()}
        sets.append(PredictionSet(part.row[at], oof[0].fold[at], heads, part.meta))
    inner = {address: _within(member_refit, at) for address, member_refit in refits.items()}
    uncorrected = blend.model_copy(update={"correct": None})  # the correction is of test rows alone
    return fit_ensemble(setup, uncorrected, sets, (), {}, inner, quiet=True).nested


def _recipe(
    setup: Setup,
    blend: Blend,
    oof: Sequence[PredictionSet],
    weights: Sequence[float | None],
    used: Sequence[int],
    recipes: Mapping[str, Any],
    fitted: Mapping[str, FittedHead],
) -> dict[str, Any]:
    """apply.json with the members that have a weight."""
    for found in fitted.values():
        if found.params["kind"] == "weights":
            found.params["weights"] = [found.params["weights"][i] for i in used]
    return average.build_recipe(
        setup.samples,
        [blend.members[i] for i in used],
        [oof[i] for i in used],
        [1 / len(used) if weights[i] is None else float(weights[i] or 0.0) for i in used],
        blend.merge_space,
        recipes,
        {name: found.params for name, found in fitted.items()},
        {name: found.steps for name, found in fitted.items()},
    )


def _number_of_fits(blend: Blend, folds: int) -> int:
    """On all rows, and without each fold; with steps after the blend also without each pair of folds."""
    if not methods.uses_labels(blend):
        return 1
    return 1 + folds + (folds * (folds - 1) // 2 if blend.after else 0)


def _within(member_refit: Refit, at: NDArray[np.int64]) -> Refit:
    return lambda few: member_refit(at[few])


def _among(member_refit: Refit, predicted: NDArray[np.bool_]) -> Refit:
    """The refit for positions among the predicted rows. Cached, since every head needs the same subsets."""
    positions, known = np.flatnonzero(predicted), dict[bytes, HeadValues]()

    def cached(at: NDArray[np.int64]) -> HeadValues:
        key = np.packbits(np.isin(positions, positions[at])).tobytes()
        if key not in known:
            known[key] = member_refit(positions[at])
        return known[key]

    return cached


def _all_rows(values: Array, predicted: NDArray[np.bool_]) -> NDArray[np.float32]:
    """NaN in the rows that were not predicted."""
    out = np.full((len(predicted), values.shape[1]), np.nan, np.float32)
    out[predicted] = values
    return out


# --- one head -----------------------------------------------------------------------------------------------


class FittedHead(NamedTuple):
    """One head of an ensemble, fitted on some rows."""

    params: dict[str, Any]  # of the method
    steps: list[dict[str, Any]]  # after the blend
    notes: list[str]


def fit_head(
    context: Context, head: Head, parts: list[NDArray[Any]], budgets: weight_search.Budgets, bar: tqdm
) -> tuple[FittedHead, Array, Array]:
    """(fitted on all rows, nested predictions, in-sample predictions). parts: of each member, as stored."""
    fits = _HeadFits(context, head, parts, budgets, bar)
    rows = context.all_rows
    if not fits.uses_labels and not context.blend.after:
        fitted = fits.fit(rows)
        values = fits.predict(fitted, rows)
        return fitted, values, values
    params = methods.equal_weights(context.blend, len(parts)) if fits.uses_labels else fits.params(rows)
    out = context.nested_predict(rows, fits.fit, fits.predict, FittedHead(params, [], []))
    return out.final, out.prediction, fits.predict(out.final, rows)


class _HeadFits:
    """Fits of one head on subsets of the rows (`at`: positions among context.rows)."""

    def __init__(
        self,
        context: Context,
        head: Head,
        parts: list[NDArray[Any]],
        budgets: weight_search.Budgets,
        bar: tqdm,
    ):
        self.context, self.head, self.parts, self.budgets, self.bar = context, head, parts, budgets, bar
        self.blend, self.space, self.frame = context.blend, context.blend.merge_space, context.frame
        self.uses_labels = methods.uses_labels(self.blend)
        self.maps = [average.quantiles(part) for part in parts] if self.space == "rank" else None
        inputs = parts if self.maps is None else [_ranks(p, m) for p, m in zip(parts, self.maps, strict=True)]
        truth = context.samples.truth(head, context.rows)
        self.data = methods.TrainingData(
            head, context.metric(head), self.space, inputs, truth, self.frame, context.fold
        )
        self.known: dict[bytes, dict[str, Any]] = {}  # the fit without folds 1 and 2 is needed for both

    def training_data(self, at: Positions) -> methods.TrainingData:
        if len(at) == len(self.context.rows):
            return self.data  # a fit on all rows is never scored, so members need no refit
        data = self.data.at(at)
        if not self.context.refits:
            return data
        parts = list(data.parts)
        for i, member_refit in self.context.refits.items():
            values = member_refit(at)[self.head.name]
            parts[i] = values if self.maps is None else _ranks(values, average.quantiles(values))
        return replace(data, parts=parts)

    def params(self, at: Positions) -> dict[str, Any]:
        key = weight_search.rows_key(at)
        if key not in self.known:
            budget = self.budgets.for_rows(at)
            data = self.training_data(at) if self.uses_labels else self.data
            self.known[key] = methods.fit(self.blend, data, budget)
            self.budgets.left[key] = budget.remaining(methods.used_members(self.known[key], len(self.parts)))
            self.bar.update(int(self.uses_labels))
        return self.known[key]

    def combine(self, params: dict[str, Any], at: Positions) -> Array:
        every_row = len(at) == len(self.context.rows)
        parts = self.parts if every_row else [part[at] for part in self.parts]
        frame = self.frame if every_row else self.frame.iloc[at]
        return average.combine(params, parts, self.maps, self.head, self.space, frame)

    def fit(self, at: Positions) -> FittedHead:
        params = self.params(at)
        if not self.blend.after:
            return FittedHead(params, [], [])
        values = self.combine(params, at)
        if self.uses_labels:
            values = self.context.nested_predict(
                at,
                lambda few: self.params(at[few]),
                lambda params, few: self.combine(params, at[few]),
                methods.equal_weights(self.blend, len(self.parts)),
            ).prediction
        return FittedHead(params, *postprocess_selection.select(self.context, self.head, values, at))

    def predict(self, fitted: FittedHead, at: Positions) -> Array:
        out = self.combine(fitted.params, at)
        for step in fitted.steps:
            out = calibration.apply(step, out, self.head)
        return out


def _ranks(part: NDArray[Any], maps: Any) -> NDArray[np.float32]:
    """float32: enough for a search, and there is one such array per member."""
    return average.ranks(part, maps).astype(np.float32)


def _budget(blend: Blend, setup: Setup) -> weight_search.Budget:
    if blend.max_seconds is None:
        return weight_search.unlimited(len(blend.members))
    images = blend.images or len(setup.samples.positions("test"))
    seconds = [images * latency.seconds_per_image(member) for member in blend.members]
    return weight_search.Budget(seconds, blend.max_seconds)


def _member_weights(params: Sequence[Mapping[str, Any]], members: int) -> list[float | None]:
    """Of each member, the mean over heads and classes."""
    tables = []
    for of_head in params:
        if of_head["kind"] in ("linear", "network", "trees"):
            return [None] * members
        if of_head["kind"] != "weights":
            return [1 / members] * members
        tables.append(np.asarray(of_head["weights"], np.float64).reshape(members, -1))
    table = np.concatenate(tables, axis=1)
    mean = table.mean(axis=1)
    mean[(mean == 0) & (table != 0).any(axis=1)] = 1e-12  # heads cancel out, but the member is needed
    return [float(weight) for weight in mean]
