"""A set of predictions as arrays, and the averaging of several sets. Files: comp/engine/bank/bank.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.data.folds import Folds
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import UserError
from comp.engine.tasks.kinds import Array, Head

Part = tuple[NDArray[Any], NDArray[Any], float]  # positions, values, weight


@dataclass(frozen=True)
class PredictionSet:
    """Logits or values, as the task stores them. Rows that were not predicted are NaN, never 0."""

    row: NDArray[np.int32]
    fold: NDArray[np.int16] | None
    heads: Mapping[str, NDArray[Any]]  # (rows, outputs)
    meta: dict[str, Any]

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """(rows,): whether every head has a prediction."""
        return np.logical_and.reduce([~np.isnan(values).any(axis=1) for values in self.heads.values()])

    def probability(self, head: Head) -> Array:
        """(rows, outputs), as a metric or a submission takes it: probabilities, or values if the task is
        regression."""
        return head.spec.to_probability(self.heads[head.name].astype(np.float64))


def build_meta(kind: str, samples: Samples, folds: Folds, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a set. facts: run, member, config (hash); optional tta, weights {run/seed0/fold0:
    sha256}, score, marks."""
    heads = [
        {
            "name": h.name,
            "task": h.task,
            "outputs": list(h.outputs),
            "classes": list(h.classes),
            "space": h.spec.space,
        }
        for h in samples.heads
    ]
    known = {
        "kind": kind,
        "samples": samples.hash,
        "folds": folds.hash,
        "heads": heads,
        "versions": _versions(),
    }
    return {"weights": {}, "marks": []} | dict(facts) | known


def rows_of(kind: str, samples: Samples, folds: Folds) -> Positions:
    """The rows of a complete set, in order: every row with a fold, or every test row."""
    return folds.oof_rows if kind == "oof" else samples.positions("test")


def average(
    parts: Sequence[NDArray[Any]], head: Head, space: str, weights: Sequence[float] | None = None
) -> Array:
    """The weighted mean of predictions of the same rows (views, folds, seeds, members), as stored, in
    float64."""
    rows = np.arange(len(parts[0]))
    weights = [1.0] * len(parts) if weights is None else weights
    return _mean(len(rows), [(rows, part, w) for part, w in zip(parts, weights, strict=True)], head, space)


def merge(
    sets: Sequence[PredictionSet],
    samples: Samples,
    folds: Folds,
    space: str,
    weights: Sequence[float] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> PredictionSet:
    """One complete set: each row is the mean of the sets that predict it, NaN if none does.

    Folds of one seed share no OOF row and all test rows; seeds and members share all rows. Metadata: entries
    that are equal in all sets, the union of weights and marks, then `facts`.
    """
    kind = sets[0].meta["kind"]
    assert all(other.meta["kind"] == kind for other in sets)
    weights = [1.0] * len(sets) if weights is None else weights
    rows = rows_of(kind, samples, folds)
    heads = {}
    for head in samples.heads:
        parts = [(_places(rows, s.row), s.heads[head.name], w) for s, w in zip(sets, weights, strict=True)]
        heads[head.name] = _mean(len(rows), parts, head, space).astype(np.float32)
    fold = folds.assignment[0][rows].astype(np.int16) if kind == "oof" else None
    common = {
        key: value
        for key, value in sets[0].meta.items()
        if all(other.meta.get(key) == value for other in sets)
    }
    common["weights"] = {name: sha for part in sets for name, sha in part.meta["weights"].items()}
    common["marks"] = sorted({mark for part in sets for mark in part.meta["marks"]})
    return PredictionSet(
        rows.astype(np.int32), fold, heads, build_meta(kind, samples, folds, common | dict(facts or {}))
    )


def prior(head: Head, samples: Samples, folds: Folds) -> Array:
    """The prediction for an image that cannot be read: the mean training label, as stored. (1, outputs)"""
    columns = samples.targets(head)[folds.split("full")[0]]  # all training rows; never the locked hold-out
    if head.exclusive and columns.shape[1] == 1:
        columns = np.eye(len(head.outputs))[columns[:, 0].astype(np.int64)]
    return head.spec.from_probability(columns.mean(axis=0, keepdims=True))


def _mean(rows: int, parts: Iterable[Part], head: Head, space: str) -> Array:
    """(rows, outputs). Summed part by part, never along an array, so that one row gives the same bits alone
    and in a batch."""
    if space not in head.spec.spaces:
        raise UserError(
            "space-unknown",
            key="space",
            what=f"{space} is not defined for the task {head.task}",
            remedy=f"use one of {', '.join(head.spec.spaces)}",
        )
    forward, inverse = head.spec.spaces[space]
    out = np.full((rows, len(head.outputs)), np.nan)
    total, mass, count = None, np.zeros(rows), np.zeros(rows, np.int64)
    for positions, values, weight in parts:
        values = np.asarray(values, np.float64)
        used = ~np.isnan(values).any(axis=1) & (weight != 0)
        at, values = positions[used], values[used]
        term = weight * forward(values)
        total = np.zeros((rows, *term.shape[1:])) if total is None else total
        total[at] += term
        mass[at] += weight
        count[at] += 1
        out[at] = values  # a row that only one set predicts keeps its exact bits
    several = count > 1
    if total is not None and several.any():
        out[several] = inverse(total[several] / mass[several].reshape(-1, *[1] * (total.ndim - 1)))
    return out


def _places(rows: Positions, wanted: NDArray[np.int32]) -> Positions:
    places = np.searchsorted(rows, wanted)
    assert len(np.unique(wanted)) == len(wanted), "a set contains a row twice"
    if not np.array_equal(rows[np.minimum(places, len(rows) - 1)], wanted):
        raise UserError(
            "predictions-differ", what="a prediction set contains rows that the folds do not score"
        )
    return places


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "timm", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
