"""Areas under the ROC curve of sums: of one column, or the mean over the columns of several classes or labels.

`rough` counts 16,384 bins a column, `exact` sorts. A column stands with its positive rows first, so that neither needs the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine.ensemble.spaces import FastScorer, Sum, to_space
from comp.engine.tasks.kinds import Head
from comp.metrics import Metric

BINS = 16_384
ENDS = {"probability": (0.0, 1.0), "geometric": (None, 0.0)}  # beyond them, rows are equal
AUC_METRICS = ("roc_auc", "mean_column_auc")


class Column(NamedTuple):
    place: int  # among the outputs
    rows: NDArray[np.int64]  # where the label is known, the positive ones first
    positive: int


def auc_scorer(
    metric: Metric, head: Head, space: str, truth: NDArray[Any], signed: bool
) -> FastScorer | None:
    """None where the metric has no number, whatever is said, or labels are soft."""
    columns = _columns(head, truth)
    if columns is None:
        return None
    fit = [column for column in columns if 0 < column.positive < len(column.rows)]
    if not fit or (len(fit) < len(columns) and not metric.skip_undefined):
        return None
    if head.exclusive and (signed or space in ("logit", "geometric")):
        return _together(head, space, fit, np.argsort(truth, kind="stable"), truth)
    found = _one(head, space, fit[0]) if len(columns) == 1 else _apart(head, space, fit)
    return _within(found, *ENDS[space]) if signed and space in ENDS else found


def _columns(head: Head, truth: NDArray[Any]) -> list[Column] | None:
    if head.exclusive:
        if truth.ndim > 1 or np.isnan(truth).any():
            return None
        targets = [(code, truth == code) for code in range(len(head.outputs))]
    else:
        wide = truth.reshape(len(truth), -1)
        targets = [(at, wide[:, at]) for at in (head.scored_indices if wide.shape[1] > 1 else [0])]
    found = []
    for at, target in targets:
        known = np.flatnonzero(~np.isnan(target))
        if not np.isin(target[known], (0, 1)).all():
            return None
        found.append(
            Column(
                at, known[np.argsort(-target[known].astype(float), kind="stable")], int(target[known].sum())
            )
        )
    return found


def _within(found: FastScorer, low: float | None, high: float) -> FastScorer:
    return replace(
        found,
        approximate=lambda total: found.approximate(np.clip(total, low, high)),
        exact=lambda total: found.exact(np.clip(total, low, high)),
    )


def _one(head: Head, space: str, column: Column) -> FastScorer:
    def take(stored: NDArray[Any]) -> NDArray[np.float32]:
        return to_space(stored[:, :1], head, space)[column.rows, 0].astype(np.float32)

    pairs = column.positive * (len(column.rows) - column.positive)

    def rough(total: Sum) -> float:
        return _rough(total, slice(0, column.positive), pairs)

    return FastScorer(take, rough, partial(exact_auc, positive=column.positive), True)


def _apart(head: Head, space: str, columns: Sequence[Column]) -> FastScorer:
    """Columns whose sums do not depend on each other, one behind the other, each with its own order of rows."""
    edge = np.append(0, np.cumsum([len(column.rows) for column in columns]))
    parts = [
        (slice(a, b), column.positive, column.positive * (b - a - column.positive))
        for a, b, column in zip(edge[:-1].tolist(), edge[1:].tolist(), columns, strict=True)
    ]

    def take(stored: NDArray[Any]) -> NDArray[np.float32]:
        values = to_space(stored, head, space)
        out = np.empty(int(edge[-1]), np.float32)
        for (where, *_), column in zip(parts, columns, strict=True):
            out[where] = values[column.rows, column.place]
        return out

    def rough(total: Sum) -> float:
        return float(np.mean([_rough(total[where], slice(0, own), pairs) for where, own, pairs in parts]))

    def exact(total: Sum) -> float:
        return float(np.mean([exact_auc(total[where], own) for where, own, _ in parts]))

    return FastScorer(take, rough, exact, True)


def _together(
    head: Head, space: str, columns: Sequence[Column], order: NDArray[np.int64], truth: NDArray[Any]
) -> FastScorer:
    """Classes whose probabilities follow from all sums of a row: rows of a class side by side, (classes, rows)."""
    low = np.searchsorted(truth[order], [column.place for column in columns])
    parts = [
        (column.place, slice(a, a + column.positive), column.positive * (len(order) - column.positive))
        for a, column in zip(low.tolist(), columns, strict=True)
    ]

    def take(stored: NDArray[Any]) -> NDArray[np.float32]:
        return np.ascontiguousarray(to_space(stored, head, space)[order].T, np.float32)

    def shares(total: Sum) -> Sum:
        if space == "probability":
            floor = np.maximum(total, 1e-30)
            return floor / floor.sum(axis=0)
        out = np.exp(total - total.max(axis=0))
        out /= out.sum(axis=0)
        return out

    def rough(total: Sum) -> float:
        p = shares(total)
        return float(np.mean([_rough(p[at], mine, pairs) for at, mine, pairs in parts]))

    def exact(total: Sum) -> float:
        p, found = shares(np.asarray(total, np.float64)), []
        for at, mine, _ in parts:
            first = np.concatenate([p[at][mine], p[at][: mine.start], p[at][mine.stop :]])
            found.append(exact_auc(first, mine.stop - mine.start))
        return float(np.mean(found))

    return FastScorer(take, rough, exact, True)


def _rough(values: Sum, mine: slice, pairs: int) -> float:
    """mine: where the positive rows stand."""
    low, high = values.min(), values.max()
    if not high > low:
        return 0.5
    place = ((values - low) * ((BINS - 1) / (high - low))).astype(np.intp)
    above = np.bincount(place[mine], minlength=BINS)
    below = np.bincount(place, minlength=BINS) - above
    return float(above @ (below.cumsum() - below / 2) / pairs)


def exact_auc(total: Sum, positive: int) -> float:
    """Rows with the positive ones first. Sorted as integers with the label in the lowest bit, which is many times as fast as
    sorting places."""
    bits = np.asarray(total, np.float64).view(np.int64).copy()
    bits = np.where(bits < 0, bits ^ np.int64(0x7FFFFFFFFFFFFFFF), bits)  # now they order as the numbers do
    bits &= ~np.int64(1)
    bits[:positive] |= 1
    bits.sort()
    label, level = bits & 1, bits >> 1
    below = (1 - label).cumsum()
    wins = float(below[label == 1].sum())
    tied = level[1:] == level[:-1]
    if tied.any():  # in a level the positives stand last, and half of what they beat there they only equal
        start = np.append(True, ~tied).nonzero()[0]
        hits = np.add.reduceat(label, start)
        wins -= float(hits @ (np.diff(np.append(start, len(bits))) - hits)) / 2
    return wins / (positive * (len(bits) - positive))
