"""Fits the method of an ensemble for one head on data rows. Reads no files.

Nested scores call `fit` once per fold with the rows of the other folds (fit.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import metric_formulas, score, thresholds
from comp.engine.bank.metric import Metric
from comp.engine.ensemble import fast_metrics, gradients, stack, weight_search
from comp.engine.ensemble.blend_config import Blend
from comp.engine.errors import UserError
from comp.engine.tasks.kinds import Array, Head, logit, softmax

Parts = Sequence[NDArray[Any]]


class RowSubset(Sequence[NDArray[Any]]):
    """Some rows of some members, copied only on access: a search reads one member at a time, and a copy of
    all would be as large as the predictions."""

    def __init__(self, parts: Parts, rows: NDArray[np.int64], members: Sequence[int] | None = None):
        self.parts, self.rows = parts, rows
        self.members = range(len(parts)) if members is None else members

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, place: Any) -> Any:
        return self.parts[int(self.members[place])][self.rows]


@dataclass(frozen=True)
class TrainingData:
    """The rows of one head on which a method is fitted."""

    head: Head
    metric: Metric
    space: str
    parts: Parts  # of each member: (rows, outputs) as stored; in rank space the ranks
    truth: NDArray[Any]
    frame: Any  # of the samples table
    fold: NDArray[np.int64]

    def at(self, rows: NDArray[np.int64]) -> TrainingData:
        parts = RowSubset(self.parts, rows)
        return TrainingData(
            self.head,
            self.metric,
            self.space,
            parts,
            self.truth[rows],
            self.frame.iloc[rows],
            self.fold[rows],
        )


def fit(blend: Blend, data: TrainingData, budget: weight_search.Budget | None = None) -> dict[str, Any]:
    """The parameters for apply.json; apply.predict uses them."""
    method, members = blend.method, len(data.parts)
    if method in stack.FITS:
        return stack.fit(
            method,
            data.head,
            data.parts,
            data.truth,
            data.frame,
            data.fold,
            space=data.space,
            strength=blend.strength,
            metadata=blend.metadata or (),
            encoded=blend.encoded or (),
        )
    if method in SEARCHES:
        budget = budget or weight_search.unlimited(members)
        weights = _per_class(blend, data, budget) if blend.per_class else _weights(blend, data, budget)
        return {"kind": "weights", "weights": weights.tolist()}
    if method in ("median", "trimmed", "power"):
        return {
            "kind": method,
            "power": blend.power or 2.0,
            "trim": 0.2 if blend.trim is None else blend.trim,
        }
    return {"kind": "weights", "weights": blend.normalized_weights}


def used_members(params: dict[str, Any], members: int) -> NDArray[np.bool_]:
    """(members,): those that have to predict. Methods without weights use all."""
    if params["kind"] != "weights":
        return np.ones(members, bool)
    return (np.asarray(params["weights"], np.float64).reshape(members, -1) != 0).any(axis=1)


def chosen_strength(blend: Blend, head: Head, params: dict[str, Any]) -> list[str]:
    """A line for the user if a stacker chose its strength."""
    if blend.method not in stack.FITS or blend.strength is not None:
        return []
    grid = ", ".join(f"{strength:g}" for strength in stack.STRENGTHS[blend.method])
    return [f"{head.name}: strength {params['strength']:g} of {grid}, by cross-validation"]


def equal_weights(blend: Blend, members: int) -> dict[str, Any]:
    """The plain mean: for a fold without training rows, the first one of a split by time."""
    return {"kind": "weights", "weights": [1 / members] * members}


def _weights(blend: Blend, data: TrainingData, budget: weight_search.Budget) -> Array:
    frame = score.without_weights(data.frame)

    def search(members: NDArray[np.int64], rows: NDArray[np.int64]) -> Array:
        whole = len(members) == len(data.parts) and np.array_equal(rows, np.arange(len(data.truth)))
        parts = data.parts if whole else RowSubset(data.parts, rows, members.tolist())
        own_budget = weight_search.Budget([budget.seconds[i] for i in members], budget.ceiling)
        truth = data.truth if whole else data.truth[rows]
        table = frame if whole else frame.iloc[rows]
        fold = data.fold if whole else data.fold[rows]
        subset = TrainingData(data.head, data.metric, data.space, parts, truth, table, fold)
        return SEARCHES[blend.method](blend, subset, own_budget)

    bags = blend.bags or 1
    weights = weight_search.bagged(search, len(data.parts), data.fold, bags, blend.bag_of or "members")
    seconds = np.asarray(budget.seconds)
    if seconds[weights != 0].sum() > budget.ceiling:
        # Bags differ in their members: keep those with the largest weights that fit into the budget together.
        fits = np.zeros(len(weights), bool)
        for i in np.argsort(-np.abs(weights), kind="stable"):
            fits[i] = weights[i] != 0 and seconds[fits].sum() + budget.seconds[i] <= budget.ceiling
        weights = np.where(fits, weights, 0.0)
    return weights / weights.sum()


def _scorer(blend: Blend, data: TrainingData) -> tuple[fast_metrics.FastScorer, list[NDArray[np.float32]]]:
    cuts = None
    if data.metric.needs == "label" and score.is_ordinal(data.head):
        mean = np.zeros(len(data.truth))
        for part in data.parts:
            mean += part[:, 0]
        mean /= len(data.parts)
        cuts = thresholds.fit_cuts(mean, data.truth, len(data.head.classes), data.metric, data.frame)
    scorer = fast_metrics.fast_scorer(
        data.metric, data.head, data.space, data.truth, data.frame, cuts, signed=bool(blend.negative)
    )
    return scorer, [scorer.extract(part) for part in data.parts]


def _greedy(blend: Blend, data: TrainingData, budget: weight_search.Budget) -> Array:
    scorer, extracted = _scorer(blend, data)
    return weight_search.greedy(scorer, extracted, blend.rounds or 50, budget)


def _hill(blend: Blend, data: TrainingData, budget: weight_search.Budget) -> Array:
    scorer, extracted = _scorer(blend, data)
    return weight_search.hill(scorer, extracted, blend.precision or 0.05, bool(blend.negative), budget)


def _slsqp(blend: Blend, data: TrainingData, budget: weight_search.Budget) -> Array:
    """Over the budget, members with the smallest weights are dropped one by one."""
    if data.space == "rank":
        raise UserError(
            "slsqp-ranks",
            key="space",
            what="method slsqp needs a differentiable loss, which ranks do not have",
            remedy="use space: probability or logit",
        )
    here = np.flatnonzero(budget.affordable(np.zeros(len(data.parts), bool)))
    seconds, weights = np.asarray(budget.seconds), np.zeros(len(data.parts))
    while len(here):
        loss = gradients.loss([data.parts[int(i)] for i in here], data.head, data.space, data.truth)
        found = weight_search.slsqp(loss, len(here), bool(blend.negative))
        if seconds[here[found != 0]].sum() <= budget.ceiling:
            weights[here] = found
            return weights
        costly = np.flatnonzero(seconds[here] > 0)
        here = np.delete(here, costly[np.argmin(np.abs(found[costly]))])
    raise weight_search.over_budget()


def _optuna(blend: Blend, data: TrainingData, budget: weight_search.Budget) -> Array:
    scorer, extracted = _scorer(blend, data)
    return weight_search.optuna(scorer, extracted, blend.trials or 200, bool(blend.negative), budget)


SEARCHES: dict[str, Callable[[Blend, TrainingData, weight_search.Budget], Array]] = {
    "greedy": _greedy,
    "hill": _hill,
    "slsqp": _slsqp,
    "optuna": _optuna,
}
# The loss of one class or label where its AUC is undefined; as in comp/metrics.py.
LOG_LOSS = Metric("log_loss", metric_formulas.log_loss, "min", "probability", 0, math.inf, kind="row")
COLUMNWISE = ("roc_auc", "mean_column_auc", "average_precision", "weighted_auc", "partial_auc")


def _per_class(blend: Blend, data: TrainingData, budget: weight_search.Budget) -> Array:
    """(members, outputs): each class one-vs-rest, or each label on the rows where it is known, by its AUC if
    the metric is one, else by log loss."""
    head = data.head
    if head.exclusive and (data.space != "probability" or data.truth.ndim > 1):
        raise _no_weights_per_class("weights per class need hard labels and space: probability")
    if head.task not in ("multiclass", "multilabel"):
        raise _no_weights_per_class(f"{head.name} is {head.task}, without classes or labels")
    if data.space == "rank":
        raise _no_weights_per_class("ranks have one weight per member", "use space: probability")
    columns = []
    for code, name in enumerate(head.outputs):
        one = _one_vs_rest(data, code, name)
        if len(one.truth):
            columns.append(_weights(blend, one, budget))
        else:  # a label that is never known: the first member within the budget
            columns.append(
                np.eye(len(data.parts))[budget.affordable(np.zeros(len(data.parts), bool)).argmax()]
            )
        budget = budget.remaining(columns[-1] != 0)
    return np.stack(columns, axis=1)


def _no_weights_per_class(what: str, remedy: str = "delete per_class") -> UserError:
    return UserError("per-class-undefined", key="per_class", what=what, remedy=remedy)


def _one_vs_rest(data: TrainingData, code: int, name: str) -> TrainingData:
    target = (data.truth == code).astype(np.float64) if data.head.exclusive else data.truth[:, code]
    known = np.flatnonzero(~np.isnan(target))
    both = bool(len(known)) and np.ptp(target[known]) > 0  # with one class alone, AUC is undefined
    metric = data.metric if both and data.metric.name in COLUMNWISE else LOG_LOSS

    def column(part: NDArray[Any]) -> NDArray[np.float32]:
        if not data.head.exclusive:
            return part[known, code : code + 1]
        p = softmax(np.asarray(part, np.float64))[:, code : code + 1]
        return logit(np.clip(p, 1e-15, 1 - 1e-15)).astype(np.float32)

    head = Head(name, "binary", (name,), (name,), ("0", "1"))
    frame = data.frame.iloc[known]
    return TrainingData(
        head, metric, data.space, [column(p) for p in data.parts], target[known], frame, data.fold[known]
    )


def uses_labels(blend: Blend) -> bool:
    """Whether a method is fitted on labels, so that its score has to be nested."""
    return blend.method in SEARCHES or blend.method in stack.FITS
