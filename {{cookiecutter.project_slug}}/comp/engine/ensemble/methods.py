"""From a declared method to its parameters, for one head and the rows that may teach it. No file is read here.

Whoever scores a method asks `fit` once a fold, with the rows of the other folds (worth.py): what is fitted here never sees the
rows it is scored on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp import metrics
from comp.engine.bank import score, thresholds
from comp.engine.ensemble import fast_metrics, gradients, spaces, stack, weight_search
from comp.engine.ensemble.blend_config import Blend
from comp.engine.errors import Refused
from comp.engine.tasks.kinds import Array, Head, logit, softmax
from comp.metrics import Metric

Parts = Sequence[NDArray[Any]]


class RowSubset(Sequence[NDArray[Any]]):
    """Some rows of some members, cut out when they are asked for: a search takes from one member at a time, and all of them
    together would be as large as the predictions."""

    def __init__(self, parts: Parts, rows: NDArray[np.int64], members: Sequence[int] | None = None):
        self.parts, self.rows = parts, rows
        self.members = range(len(parts)) if members is None else members

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, place: Any) -> Any:
        return self.parts[int(self.members[place])][self.rows]


@dataclass(frozen=True)
class TrainingData:
    """One head's rows, line by line: members as stored (in rank space: as ranks), truth, the samples table, folds."""

    head: Head
    metric: Metric
    space: str
    parts: Parts
    truth: NDArray[Any]
    frame: Any
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


def fit(blend: Blend, given: TrainingData, budget: weight_search.Budget | None = None) -> dict[str, Any]:
    """Parameters as apply.json keeps them; fitted.predict reads them."""
    method, members = blend.method, len(given.parts)
    if method in stack.FITS:
        return stack.fit(
            method, given.head, given.parts, given.truth, given.frame, given.fold, space=given.space,
            strength=blend.strength, metadata=blend.metadata or (), encoded=blend.encoded or (),
        )  # fmt: skip
    if method in SEARCHES:
        budget = budget or weight_search.unlimited(members)
        weights = _per_class(blend, given, budget) if blend.per_class else _weights(blend, given, budget)
        return {"kind": "weights", "weights": weights.tolist()}
    if method in ("median", "trimmed", "power"):
        return {
            "kind": method,
            "power": blend.power or 2.0,
            "trim": 0.2 if blend.trim is None else blend.trim,
        }
    return {"kind": "weights", "weights": blend.shares}


def used_members(params: dict[str, Any], members: int) -> NDArray[np.bool_]:
    """Members that have to predict, for any class; of what has no weights all of them."""
    if params["kind"] != "weights":
        return np.ones(members, bool)
    return (np.asarray(params["weights"], np.float64).reshape(members, -1) != 0).any(axis=1)


def chosen_strength(blend: Blend, head: Head, params: dict[str, Any]) -> list[str]:
    """What a stacker's fit chose by itself."""
    if blend.method not in stack.FITS or blend.strength is not None:
        return []
    tried = ", ".join(f"{each:g}" for each in stack.STRENGTHS[blend.method])
    return [f"{head.name}: strength {params['strength']:g} of {tried}, by parts of the rows that teach"]


def equal_weights(blend: Blend, members: int) -> dict[str, Any]:
    """For a fold that no other may teach, the first of a split by time: the plain mean."""
    return {"kind": "weights", "weights": [1 / members] * members}


def _weights(blend: Blend, given: TrainingData, budget: weight_search.Budget) -> Array:
    frame = score.without_weights(given.frame)

    def searched(members: NDArray[np.int64], rows: NDArray[np.int64]) -> Array:
        whole = len(members) == len(given.parts) and np.array_equal(rows, np.arange(len(given.truth)))
        parts = given.parts if whole else RowSubset(given.parts, rows, members.tolist())
        inner = weight_search.Budget([budget.seconds[i] for i in members], budget.ceiling)
        truth = given.truth if whole else given.truth[rows]
        table = frame if whole else frame.iloc[rows]
        fold = given.fold if whole else given.fold[rows]
        here = TrainingData(given.head, given.metric, given.space, parts, truth, table, fold)
        return SEARCHES[blend.method](blend, here, inner)

    bags = blend.bags or 1
    found = weight_search.bagged(searched, len(given.parts), given.fold, bags, blend.bag_of or "members")
    spent = np.asarray(budget.seconds)[found != 0].sum()
    if spent > budget.ceiling:  # bags differ in their members: the heaviest that fit together stay
        kept = np.zeros(len(found), bool)
        for i in np.argsort(-np.abs(found), kind="stable"):
            kept[i] = (
                found[i] != 0 and np.asarray(budget.seconds)[kept].sum() + budget.seconds[i] <= budget.ceiling
            )
        found = np.where(kept, found, 0.0)
    return found / found.sum()


def _scorer(blend: Blend, given: TrainingData) -> tuple[spaces.FastScorer, list[NDArray[np.float32]]]:
    cuts = None
    if given.metric.needs == "label" and score.is_ordinal(given.head):
        mean = np.zeros(len(given.truth))
        for part in given.parts:
            mean += part[:, 0]
        mean /= len(given.parts)
        cuts = thresholds.fit_cuts(mean, given.truth, len(given.head.classes), given.metric, given.frame)
    scorer = fast_metrics.fast_scorer(
        given.metric, given.head, given.space, given.truth, given.frame, cuts, signed=bool(blend.negative)
    )
    return scorer, [scorer.extract(part) for part in given.parts]


def _greedy(blend: Blend, given: TrainingData, budget: weight_search.Budget) -> Array:
    scorer, taken = _scorer(blend, given)
    return weight_search.greedy(scorer, taken, blend.rounds or 50, budget)


def _hill(blend: Blend, given: TrainingData, budget: weight_search.Budget) -> Array:
    scorer, taken = _scorer(blend, given)
    return weight_search.hill(scorer, taken, blend.precision or 0.05, bool(blend.negative), budget)


def _slsqp(blend: Blend, given: TrainingData, budget: weight_search.Budget) -> Array:
    """A ceiling on time is kept by leaving out the lightest members one by one."""
    if given.space == "rank":
        raise Refused(
            "method: slsqp wants a loss with a slope, and ranks have none; take space: probability or logit"
        )
    here = np.flatnonzero(budget.affordable(np.zeros(len(given.parts), bool)))
    seconds, weights = np.asarray(budget.seconds), np.zeros(len(given.parts))
    while len(here):
        loss = gradients.loss([given.parts[int(i)] for i in here], given.head, given.space, given.truth)
        found = weight_search.slsqp(loss, len(here), bool(blend.negative))
        if seconds[here[found != 0]].sum() <= budget.ceiling:
            weights[here] = found
            return weights
        costly = np.flatnonzero(seconds[here] > 0)
        here = np.delete(here, costly[np.argmin(np.abs(found[costly]))])
    raise Refused("max_seconds: not even one member fits under this ceiling")


def _optuna(blend: Blend, given: TrainingData, budget: weight_search.Budget) -> Array:
    scorer, taken = _scorer(blend, given)
    return weight_search.optuna(scorer, taken, blend.trials or 200, bool(blend.negative), budget)


SEARCHES: dict[str, Callable[[Blend, TrainingData, weight_search.Budget], Array]] = {
    "greedy": _greedy,
    "hill": _hill,
    "slsqp": _slsqp,
    "optuna": _optuna,
}
COLUMNWISE = ("roc_auc", "mean_column_auc", "average_precision", "weighted_auc", "partial_auc")


def _per_class(blend: Blend, given: TrainingData, budget: weight_search.Budget) -> Array:
    """(members, outputs): each class against the rest, or each label by the rows where it is known, by its own AUC where the
    metric is one, else by log loss."""
    head = given.head
    if head.exclusive and (given.space != "probability" or given.truth.ndim > 1):
        raise Refused("per_class: weights per class want hard labels, in space: probability")
    if head.task not in ("multiclass", "multilabel"):
        raise Refused(f"per_class: {head.name} is {head.task}, and has no classes or labels to tell apart")
    if given.space == "rank":
        raise Refused("per_class: ranks have one weight a member; take space: probability")
    columns = []
    for code, name in enumerate(head.outputs):
        one = _one_vs_rest(given, code, name)
        if len(one.truth):
            columns.append(_weights(blend, one, budget))
        else:  # a label that nobody gave: the first member that there is time for
            columns.append(
                np.eye(len(given.parts))[budget.affordable(np.zeros(len(given.parts), bool)).argmax()]
            )
        budget = budget.remaining(columns[-1] != 0)
    return np.stack(columns, axis=1)


def _one_vs_rest(given: TrainingData, code: int, name: str) -> TrainingData:
    target = (given.truth == code).astype(np.float64) if given.head.exclusive else given.truth[:, code]
    known = np.flatnonzero(~np.isnan(target))
    told = bool(len(known)) and np.ptp(target[known]) > 0  # a label that all rows have, or none, has no area
    metric = given.metric if told and given.metric.name in COLUMNWISE else metrics.find("log_loss")

    def column(part: NDArray[Any]) -> NDArray[np.float32]:
        if not given.head.exclusive:
            return part[known, code : code + 1]
        p = softmax(np.asarray(part, np.float64))[:, code : code + 1]
        return logit(np.clip(p, 1e-15, 1 - 1e-15)).astype(np.float32)

    head = Head(name, "binary", (name,), (name,), ("0", "1"))
    few = given.frame.iloc[known]
    return TrainingData(
        head, metric, given.space, [column(p) for p in given.parts], target[known], few, given.fold[known]
    )


def uses_labels(blend: Blend) -> bool:
    """Whether a method learns from labels, so that its score has to be nested."""
    return blend.method in SEARCHES or blend.method in stack.FITS
