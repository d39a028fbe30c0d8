"""What a run, a member or an ensemble says of every row, and the one place where several of them become one.

Arrays only, no files: comp/engine/bank/bank.py keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.data.folds import Folds
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import Refused
from comp.engine.tasks.kinds import Array, Head

Part = tuple[NDArray[Any], NDArray[Any], float]  # positions, values, weight


@dataclass(frozen=True)
class PredictionSet:
    """Rows never predicted are NaN, never 0. Stored as the task says: logits, or values."""

    row: NDArray[np.int32]
    fold: NDArray[np.int16] | None
    heads: Mapping[str, NDArray[Any]]  # (rows, outputs)
    meta: dict[str, Any]

    @property
    def predicted(self) -> NDArray[np.bool_]:
        return np.logical_and.reduce([~np.isnan(values).any(axis=1) for values in self.heads.values()])

    def probability(self, head: Head) -> Array:
        """(rows, outputs): what a metric or a submission takes. A value, where the task has no probability."""
        return head.row.probability(self.heads[head.name].astype(np.float64))


def build_meta(kind: str, samples: Samples, folds: Folds, facts: Mapping[str, Any]) -> dict[str, Any]:
    """facts: run, member, config (hash), and where there are any tta, weights {run/seed0/fold0: sha256}, score, marks."""
    heads = [
        {
            "name": h.name,
            "task": h.task,
            "outputs": list(h.outputs),
            "classes": list(h.classes),
            "space": h.row.space,
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
    """The rows of a whole set, in order: every row with a fold, or every test row."""
    return folds.oof_rows if kind == "oof" else samples.positions("test")


def average(
    parts: Sequence[NDArray[Any]], head: Head, space: str, weights: Sequence[float] | None = None
) -> Array:
    """The mean of several predictions of the same rows (views, folds, seeds, members), as stored, in float64."""
    everywhere = np.arange(len(parts[0]))
    weights = [1.0] * len(parts) if weights is None else weights
    return _mean(
        len(everywhere), [(everywhere, part, w) for part, w in zip(parts, weights, strict=True)], head, space
    )


def merge(
    sets: Sequence[PredictionSet],
    samples: Samples,
    folds: Folds,
    space: str,
    weights: Sequence[float] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> PredictionSet:
    """One whole set of several: each row is the mean of those that predicted it, NaN where none did.

    Folds of one seed share no OOF row and all test rows; seeds and members share all. What all agree on stays in the
    metadata, weights and marks add up, `facts` overrule.
    """
    kind = sets[0].meta["kind"]
    assert all(each.meta["kind"] == kind for each in sets)
    weights = [1.0] * len(sets) if weights is None else weights
    rows = rows_of(kind, samples, folds)
    heads = {}
    for head in samples.heads:
        parts = [(_places(rows, s.row), s.heads[head.name], w) for s, w in zip(sets, weights, strict=True)]
        heads[head.name] = _mean(len(rows), parts, head, space).astype(np.float32)
    fold = folds.assignment[0][rows].astype(np.int16) if kind == "oof" else None
    agreed = {
        key: value for key, value in sets[0].meta.items() if all(each.meta.get(key) == value for each in sets)
    }
    agreed["weights"] = {name: sha for each in sets for name, sha in each.meta["weights"].items()}
    agreed["marks"] = sorted({mark for each in sets for mark in each.meta["marks"]})
    return PredictionSet(
        rows.astype(np.int32), fold, heads, build_meta(kind, samples, folds, agreed | dict(facts or {}))
    )


def prior(head: Head, samples: Samples, folds: Folds) -> Array:
    """What is said of a picture that cannot be read: the mean of the training labels, as it would be stored. (1, outputs)"""
    columns = samples.targets(head)[
        folds.split("full")[0]
    ]  # all that teaches: never a row that is locked away
    if head.exclusive and columns.shape[1] == 1:
        columns = np.eye(len(head.outputs))[columns[:, 0].astype(np.int64)]
    return head.row.store(columns.mean(axis=0, keepdims=True))


def _mean(rows: int, parts: Iterable[Part], head: Head, space: str) -> Array:
    """Added up one part after the other, never along an array: a row alone gives the same bits as in a batch."""
    if space not in head.row.spaces:
        raise Refused(f"space {space}: {head.task} is averaged in {', '.join(head.row.spaces)}")
    there, back = head.row.spaces[space]
    out = np.full((rows, len(head.outputs)), np.nan)
    total, mass, voices = None, np.zeros(rows), np.zeros(rows, np.int64)
    for positions, values, weight in parts:
        values = np.asarray(values, np.float64)
        spoke = ~np.isnan(values).any(axis=1) & (weight != 0)
        at, values = positions[spoke], values[spoke]
        moved = weight * there(values)
        total = np.zeros((rows, *moved.shape[1:])) if total is None else total
        total[at] += moved
        mass[at] += weight
        voices[at] += 1
        out[at] = values  # a row with one voice keeps it to the last bit
    many = voices > 1
    if total is not None and many.any():
        out[many] = back(total[many] / mass[many].reshape(-1, *[1] * (total.ndim - 1)))
    return out


def _places(rows: Positions, wanted: NDArray[np.int32]) -> Positions:
    places = np.searchsorted(rows, wanted)
    assert len(np.unique(wanted)) == len(wanted), "a set holds a row twice"
    if not np.array_equal(rows[np.minimum(places, len(rows) - 1)], wanted):
        raise Refused("a prediction set holds rows that the folds do not score")
    return places


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "timm", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
