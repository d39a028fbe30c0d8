"""A declared ensemble made real: parameters for apply.json, honest predictions of the OOF rows, and what it would look like
if it were scored on the rows that taught it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp import honest, score
from comp.config import Config
from comp.ensemble import after, average, latency, methods, search, worth
from comp.ensemble.declare import Blend
from comp.folds import Folds
from comp.metrics import Metric, MetricUndefined
from comp.predictions import PredictionSet
from comp.samples import Samples
from comp.tasks import Array, Head

Stored = dict[str, NDArray[np.float32]]
# Of a member that labels had a hand in: positions among the OOF rows -> what it says of them where only they taught it.
Refit = Callable[[NDArray[np.int64]], Stored]


@dataclass
class Made:
    recipe: dict[str, Any]
    honest: Stored  # OOF rows, each fold from parameters of the others
    in_sample: Stored | None  # None where nothing was fitted
    weights: list[float | None]  # of each declared member; None for stackers
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ground:
    """What every head stands on."""

    cfg: Config
    blend: Blend
    samples: Samples
    folds: Folds
    rows: NDArray[np.int64]  # predicted OOF rows
    fold: NDArray[np.int64]
    refits: Mapping[int, Refit]  # member -> asked with positions among `rows`

    @property
    def frame(self) -> Any:
        return self.samples.frame.iloc[self.rows]

    def metric(self, head: Head) -> Metric:
        return score.metric_of(self.cfg, head)

    def asked(self, head: Head, stored: Array) -> score.Asked:
        here = score.lines(self.samples, self.rows, self.fold)
        said = head.row.probability(np.asarray(stored, np.float64))
        return score.asked(self.cfg, head, said, self.samples, self.folds, here)


def make(
    cfg: Config,
    blend: Blend,
    samples: Samples,
    folds: Folds,
    oof: Sequence[PredictionSet],
    test: Sequence[PredictionSet],
    nested: Mapping[str, Any],
    refits: Mapping[str, Refit],
) -> Made:
    """nested and refits: address of a member that is an ensemble -> its apply.json, and its fit by some rows alone."""
    kept = oof[0].predicted
    assert oof[0].fold is not None
    rows, fold = oof[0].row[kept].astype(np.int64), oof[0].fold[kept].astype(np.int64)
    again = {i: _among(refits[a], kept) for i, a in enumerate(blend.members) if a in refits}
    ground = Ground(cfg, blend, samples, folds, rows, fold, again)
    budgets = search.Budgets(_budget(blend, samples), {})
    honest_, taught, params, steps, notes = {}, {}, {}, {}, []
    for head in samples.heads:
        parts = [np.asarray(each.heads[head.name])[kept] for each in oof]
        params[head.name], own, all_rows = _fitted(ground, head, parts, budgets)
        steps[head.name], own, all_rows, said = _after(ground, head, own, all_rows)
        notes += said
        honest_[head.name], taught[head.name] = _back(own, kept), _back(all_rows, kept)
    weights = _weights(params, len(oof))
    used = [i for i, weight in enumerate(weights) if weight != 0]
    for each in params.values():
        if each["kind"] == "weights":
            each["weights"] = [each["weights"][i] for i in used]
    shares = [1 / len(used) if weights[i] is None else float(weights[i] or 0.0) for i in used]
    recipe = average.recipe(
        samples,
        [blend.members[i] for i in used],
        [oof[i] for i in used],
        shares,
        blend.merged_in,
        nested,
        params,
        steps,
    )
    if blend.correct:
        recipe["correct"], said = _corrections(ground, recipe, honest_, kept, [test[i] for i in used])
        notes += said
    fitted_ = methods.fits_rows(blend) or any(steps.values())
    return Made(recipe, honest_, taught if fitted_ else None, weights, notes)


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
    return make(cfg, plain, samples, folds, few, (), {}, below).honest


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


def _fitted(
    ground: Ground, head: Head, parts: list[NDArray[Any]], budgets: search.Budgets
) -> tuple[dict[str, Any], Array, Array]:
    """Parameters fitted on all folds, honest predictions, and those of the rows that taught."""
    blend, space, frame = ground.blend, ground.blend.merged_in, ground.frame
    maps = [average.quantiles(part) for part in parts] if space == "rank" else None
    seen = parts if maps is None else [average.ranks(p, m) for p, m in zip(parts, maps, strict=True)]
    truth = ground.samples.truth(head, ground.rows)
    given = methods.Teaching(head, ground.metric(head), space, seen, truth, frame, ground.fold)

    def teaching(at: NDArray[np.int64]) -> methods.Teaching:
        few = given.at(at)
        if len(at) == len(ground.rows):
            return few  # nobody is scored by what everyone teaches
        alone = list(few.parts)
        for i, again in ground.refits.items():
            said = again(at)[head.name]
            alone[i] = said if maps is None else average.ranks(said, average.quantiles(said))
        return replace(few, parts=alone)

    def apply(params: dict[str, Any], at: NDArray[np.int64]) -> Array:
        here = [np.asarray(part[at], np.float64) for part in parts]
        return average.combined(params, here, maps, head, space, frame.iloc[at])

    everywhere = np.arange(len(ground.rows))
    if not methods.fits_rows(blend):
        params = methods.fit(blend, given)
        own = apply(params, everywhere)
        return params, own, own

    def fit(at: NDArray[np.int64]) -> dict[str, Any]:
        budget = budgets.of(at)
        params = methods.fit(blend, teaching(at), budget)
        budgets.left[at.tobytes()] = budget.after(methods.used(params, len(parts)))
        return params

    found = worth.nested(
        ground.samples,
        ground.folds,
        ground.rows,
        ground.fold,
        fit,
        apply,
        methods.even(blend, len(parts)),
    )
    return found.final, found.prediction, apply(found.final, everywhere)


def _budget(blend: Blend, samples: Samples) -> search.Budget:
    if blend.max_seconds is None:
        return search.free(len(blend.members))
    images = blend.images or len(samples.positions("test"))
    return search.Budget([images * latency.of(each) for each in blend.members], blend.max_seconds)


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


# --- after the blend -----------------------------------------------------------------------------------------------------


def _score(ground: Ground, head: Head, stored: Array) -> float:
    """sign * score of one head, higher is better."""
    ask = ground.asked(head, stored)
    return ask.metric.sign * ask.metric(ask.truth, ask.answer, ask.frame)


def _after(
    ground: Ground, head: Head, own: Array, taught: Array
) -> tuple[list[dict[str, Any]], Array, Array, list[str]]:
    steps: list[dict[str, Any]] = []
    notes = []
    truth, metric = ground.samples.truth(head, ground.rows), ground.metric(head)
    frame = score.scored(ground.samples, ground.rows)
    for name in ground.blend.after or ():
        if why := after.unfit(name, head, metric, truth):
            notes.append(f"{name}: has no effect, since {why}")
            continue
        base = own

        def fit(at: NDArray[np.int64], name: str = name, base: Array = base) -> dict[str, Any]:
            return after.fit(name, base[at], truth[at], head, metric, frame.iloc[at])

        def said(step: dict[str, Any], at: NDArray[np.int64], base: Array = base) -> Array:
            return after.apply(step, base[at], head)

        nothing = {"kind": "scaled", "slope": 1.0, "shift": [0.0] * len(head.outputs)}
        found = worth.nested(
            ground.samples,
            ground.folds,
            ground.rows,
            ground.fold,
            fit,
            said,
            nothing,
        )
        before, now = _score(ground, head, own), _score(ground, head, found.prediction)
        gain = (
            f"{metric.name} {before * metric.sign:.4f} before, {now * metric.sign:.4f} with it, both honest"
        )
        if now > before:
            steps.append(found.final)
            own, taught = found.prediction, after.apply(found.final, taught, head)
        notes.append(f"{name}: {'kept' if now > before else 'left out'}, {gain}")
    return steps, own, taught, notes


def _corrections(
    ground: Ground,
    recipe: Mapping[str, Any],
    oof: Stored,
    kept: NDArray[np.bool_],
    test: Sequence[PredictionSet],
) -> tuple[dict[str, Any], list[str]]:
    """Fitted on test predictions without labels. Each fold, treated as if it were the test set, must not lose by it beyond
    noise; whether test gains only the leaderboard can say."""
    kind, said, notes = ground.blend.correct, {}, []
    given = {a["address"]: each.heads for a, each in zip(recipe["members"], test, strict=True)}
    plain = average.apply(recipe, given, ground.samples.frame.iloc[test[0].row.astype(np.int64)])
    for head in ground.samples.heads:
        truth, own = ground.samples.truth(head, ground.rows), oof[head.name][kept].astype(np.float64)
        if kind == "prior" and head.row.space != "logit":
            notes.append(f"correct: prior is for classes, and {head.name} has values; take rank")
            continue
        if kind == "prior" and truth.ndim > 1:
            notes.append("correct: prior wants hard labels")
            continue

        def fit(
            rows: Array, others: NDArray[np.bool_], head: Head = head, truth: Any = truth, own: Any = own
        ) -> Any:
            if kind == "rank":
                return after.rank(rows, own[others], head)
            count = 2 if head.task == "binary" else len(head.outputs)
            shares = np.bincount(truth[others].astype(np.int64), minlength=count) + 0.5
            return after.prior(rows, shares / shares.sum(), head)

        tried = own.copy()
        for number in np.unique(ground.fold):
            mine = ground.fold == number
            tried[mine] = after.apply(fit(own[mine], ~mine), own[mine], head)
        now, before = ground.asked(head, tried), ground.asked(head, own)
        here = score.lines(ground.samples, ground.rows, ground.fold)
        try:
            pair = honest.paired(
                now.metric,
                now.truth,
                now.answer,
                before.answer,
                worth.groups_of(ground.samples, here.rows),
                worth.RESAMPLES,
                rows=now.frame,
            )
        except MetricUndefined as fault:
            notes.append(f"correct: {kind} left out: {fault}")
            continue
        there = ~np.isnan(plain[head.name]).any(axis=1)
        step = fit(plain[head.name][there].astype(np.float64), np.ones(len(own), bool))
        if pair.decided and pair.share < 0.5:
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
