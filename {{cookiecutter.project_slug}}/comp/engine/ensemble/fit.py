"""A declared ensemble made real: parameters for apply.json, honest predictions of the OOF rows, and what it would look like
if it were scored on the rows that taught it.

Honest means: all that is fitted, weights as well as the steps after them and whether these are kept, is for each fold what it
would be in a world without this fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from comp.engine.bank.predictions import PredictionSet
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
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
from comp.engine.ensemble.context import Context, Positions, Refit, Stored
from comp.engine.tasks.kinds import Array, Head


@dataclass
class FittedEnsemble:
    recipe: dict[str, Any]
    nested: Stored  # OOF rows, each fold from parameters of the others
    in_sample: Stored | None  # None where nothing was fitted
    weights: list[float | None]  # of each declared member; None for stackers
    notes: list[str] = field(default_factory=list)


def fit_ensemble(
    cfg: Config,
    blend: Blend,
    samples: Samples,
    folds: Folds,
    oof: Sequence[PredictionSet],
    test: Sequence[PredictionSet],
    nested: Mapping[str, Any],
    refits: Mapping[str, Refit],
    quiet: bool = False,
) -> FittedEnsemble:
    """nested and refits: address of a member that is an ensemble -> its apply.json, and its fit by some rows alone."""
    kept = oof[0].predicted
    assert oof[0].fold is not None
    rows, fold = oof[0].row[kept].astype(np.int64), oof[0].fold[kept].astype(np.int64)
    again = {i: _among(refits[a], kept) for i, a in enumerate(blend.members) if a in refits}
    context = Context(cfg, blend, samples, folds, rows, fold, again)
    budgets = weight_search.Budgets(_budget(blend, samples), {})
    honest_, taught, params, later, notes = {}, {}, {}, {}, []
    count = len(samples.heads) * _fits(blend, len(np.unique(fold)))
    with tqdm(
        total=count, desc=f"fitting {blend.method}", delay=2, disable=quiet or None, leave=False
    ) as bar:
        for head in samples.heads:
            parts = [np.asarray(each.heads[head.name]) for each in oof]
            parts = parts if kept.all() else [part[kept] for part in parts]
            found, own, all_rows = fit_head(context, head, parts, budgets, bar)
            params[head.name], later[head.name] = found.params, found.steps
            notes += [*methods.chosen_strength(blend, head, found.params), *found.notes]
            honest_[head.name], taught[head.name] = _back(own, kept), _back(all_rows, kept)
    weights = _weights(params, len(oof))
    used = [i for i, weight in enumerate(weights) if weight != 0]
    for each in params.values():
        if each["kind"] == "weights":
            each["weights"] = [each["weights"][i] for i in used]
    shares = [1 / len(used) if weights[i] is None else float(weights[i] or 0.0) for i in used]
    recipe = average.build_recipe(
        samples,
        [blend.members[i] for i in used],
        [oof[i] for i in used],
        shares,
        blend.merge_space,
        nested,
        params,
        later,
    )
    if blend.correct:
        recipe["correct"], said = label_shift.fit(context, recipe, honest_, kept, [test[i] for i in used])
        notes += said
    fitted_ = methods.uses_labels(blend) or bool(blend.after)
    return FittedEnsemble(recipe, honest_, taught if fitted_ else None, weights, notes)


def refit(
    cfg: Config,
    blend: Blend,
    samples: Samples,
    folds: Folds,
    oof: Sequence[PredictionSet],
    refits: Mapping[str, Refit],
    at: NDArray[np.int64],
) -> Stored:
    """The OOF predictions of an ensemble in a world that has no other rows than these: fold by fold from the rest of them.

    A second level must not learn from the first level's own OOF rows. Those of fold 1 come from weights that saw the labels of
    fold 0, so what is taught by fold 1 and scored on fold 0 would have heard of its answers. It costs K - 1 fits for each of K
    folds."""
    assert oof[0].fold is not None
    few = []
    for address, each in zip(blend.members, oof, strict=True):
        heads = refits[address](at) if address in refits else {n: v[at] for n, v in each.heads.items()}
        few.append(PredictionSet(each.row[at], oof[0].fold[at], heads, each.meta))
    below = {address: _inside(each, at) for address, each in refits.items()}
    plain = blend.model_copy(update={"correct": None})  # of test rows alone
    return fit_ensemble(cfg, plain, samples, folds, few, (), {}, below, quiet=True).nested


def _fits(blend: Blend, folds: int) -> int:
    """Of all rows, of all but each fold; for steps after the blend of all but each two."""
    if not methods.uses_labels(blend):
        return 1
    return 1 + folds + (folds * (folds - 1) // 2 if blend.after else 0)


def _inside(whole: Refit, at: NDArray[np.int64]) -> Refit:
    return lambda few: whole(at[few])


def _among(whole: Refit, kept: NDArray[np.bool_]) -> Refit:
    """Asked with positions among the predicted rows; each head asks for the same ones, so the answers are kept."""
    everywhere, known = np.flatnonzero(kept), dict[bytes, Stored]()

    def few(at: NDArray[np.int64]) -> Stored:
        key = np.packbits(np.isin(everywhere, everywhere[at])).tobytes()
        if key not in known:
            known[key] = whole(everywhere[at])
        return known[key]

    return few


def _back(values: Array, kept: NDArray[np.bool_]) -> NDArray[np.float32]:
    out = np.full((len(kept), values.shape[1]), np.nan, np.float32)
    out[kept] = values
    return out


class FittedHead(NamedTuple):
    """One head of a blend, by some rows alone."""

    params: dict[str, Any]
    steps: list[dict[str, Any]]
    notes: list[str]


def fit_head(
    context: Context, head: Head, parts: list[NDArray[Any]], budgets: weight_search.Budgets, bar: tqdm
) -> tuple[FittedHead, Array, Array]:
    """Fitted on all folds, honest predictions, and those of the rows that taught."""
    blend, space, frame = context.blend, context.blend.merge_space, context.frame
    maps = [average.quantiles(part) for part in parts] if space == "rank" else None
    seen = parts if maps is None else [_ranked(p, m) for p, m in zip(parts, maps, strict=True)]
    truth = context.samples.truth(head, context.rows)
    given = methods.TrainingData(head, context.metric(head), space, seen, truth, frame, context.fold)
    fits = methods.uses_labels(blend)
    known: dict[bytes, dict[str, Any]] = {}  # a world without folds 1 and 2 is asked for by both

    def teaching(at: Positions) -> methods.TrainingData:
        if len(at) == len(context.rows):
            return given  # nobody is scored by what everyone teaches
        few = given.at(at)
        if not context.refits:
            return few
        alone = list(few.parts)
        for i, again in context.refits.items():
            said = again(at)[head.name]
            alone[i] = said if maps is None else _ranked(said, average.quantiles(said))
        return replace(few, parts=alone)

    def params_of(at: Positions) -> dict[str, Any]:
        key = weight_search.rows_key(at)
        if key not in known:
            budget = budgets.for_rows(at)
            known[key] = methods.fit(blend, teaching(at) if fits else given, budget)
            budgets.left[key] = budget.remaining(methods.used_members(known[key], len(parts)))
            bar.update(int(fits))
        return known[key]

    def apply(params: dict[str, Any], at: Positions) -> Array:
        everyone = len(at) == len(context.rows)
        here = parts if everyone else [part[at] for part in parts]
        return average.combine(params, here, maps, head, space, frame if everyone else frame.iloc[at])

    def fit(at: Positions) -> FittedHead:
        params = params_of(at)
        if not blend.after:
            return FittedHead(params, [], [])
        own = apply(params, at)
        if fits:
            own = context.nested_predict(
                at,
                lambda few: params_of(at[few]),
                lambda params, few: apply(params, at[few]),
                methods.equal_weights(blend, len(parts)),
            ).prediction
        return FittedHead(params, *postprocess_selection.select(context, head, own, at))

    def said(found: FittedHead, at: Positions) -> Array:
        out = apply(found.params, at)
        for step in found.steps:
            out = calibration.apply(step, out, head)
        return out

    everywhere = context.all_rows
    if not fits and not blend.after:
        found = fit(everywhere)
        own = said(found, everywhere)
        return found, own, own
    first = FittedHead(methods.equal_weights(blend, len(parts)) if fits else params_of(everywhere), [], [])
    out = context.nested_predict(everywhere, fit, said, first)
    return out.final, out.prediction, said(out.final, everywhere)


def _ranked(part: NDArray[Any], maps: Any) -> NDArray[np.float32]:
    return average.ranks(part, maps).astype(
        np.float32
    )  # a search takes no more, and there are as many as members


def _budget(blend: Blend, samples: Samples) -> weight_search.Budget:
    if blend.max_seconds is None:
        return weight_search.unlimited(len(blend.members))
    images = blend.images or len(samples.positions("test"))
    return weight_search.Budget(
        [images * latency.seconds_per_image(each) for each in blend.members], blend.max_seconds
    )


def _weights(params: Mapping[str, Any], members: int) -> list[float | None]:
    """Of each member, the mean over heads and classes."""
    found = []
    for each in params.values():
        if each["kind"] != "weights":
            return (
                [None] * members
                if each["kind"] in ("linear", "network", "trees")
                else [1 / members] * members
            )
        found.append(np.asarray(each["weights"], np.float64).reshape(members, -1))
    table = np.concatenate(found, axis=1)
    mean = table.mean(axis=1)
    mean[(mean == 0) & (table != 0).any(axis=1)] = 1e-12  # heads that cancel out: it still speaks
    return [float(weight) for weight in mean]
