"""The loss of a weighted mean of members with its gradient, for SLSQP: log loss for classes, squared error
for values.

Computed in blocks of rows, so that only one block is float64 at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.ensemble.spaces import to_space
from comp.engine.tasks.kinds import Array, Head, sigmoid, softmax

BLOCK = 16_384
FLOOR = 1e-15  # probabilities are clipped here; below it the gradient is 0
Part = Callable[[Array, slice], tuple[float, Array]]  # weights, rows -> sum of losses, its gradient


def loss(
    parts: Sequence[NDArray[Any]], head: Head, space: str, truth: NDArray[Any]
) -> Callable[[Array], tuple[float, Array]]:
    """weights -> (mean loss, gradient). parts: of each member (rows, outputs), as stored."""
    kind = _values if head.spec.space == "value" else _probability if space == "probability" else _logit
    part = kind(parts, head, space, _targets(truth, head))
    rows = len(truth)
    count = rows * (1 if head.exclusive else len(head.outputs))

    def mean_loss(weights: Array) -> tuple[float, Array]:
        total, slope = 0.0, np.zeros(len(parts))
        for low in range(0, rows, BLOCK):
            value, gradient = part(weights, slice(low, min(low + BLOCK, rows)))
            total += value
            slope += gradient
        return total / count, slope / count

    return mean_loss


def _targets(truth: NDArray[Any], head: Head) -> Array:
    """(rows, outputs): one-hot labels; soft labels and values unchanged."""
    if head.exclusive and truth.ndim == 1:
        return np.eye(len(head.outputs))[truth.astype(np.int64)]
    return truth.reshape(len(truth), -1).astype(np.float64)


def _block(parts: Sequence[NDArray[Any]], rows: slice, head: Head, space: str) -> Array:
    return np.stack([to_space(part[rows], head, space) for part in parts])  # (members, rows, outputs)


def _values(parts: Sequence[NDArray[Any]], head: Head, space: str, truth: Array) -> Part:
    def part(weights: Array, rows: slice) -> tuple[float, Array]:
        block = _block(parts, rows, head, space)
        residual = np.tensordot(weights, block, 1) - truth[rows]
        return float((residual**2).sum()), 2 * (block * residual).sum(axis=(1, 2))

    return part


def _probability(parts: Sequence[NDArray[Any]], head: Head, space: str, truth: Array) -> Part:
    """Log loss of the weighted probability. As weights sum to 1, so do the probabilities of a row, and only
    that of the true class matters; a label counts as two classes. Unknown labels (NaN) cost nothing."""

    def part(weights: Array, rows: slice) -> tuple[float, Array]:
        block, share = _block(parts, rows, head, space), truth[rows]
        if not head.exclusive:
            block, share = np.concatenate([block, 1 - block], axis=2), np.hstack([share, 1 - share])
            share = np.nan_to_num(share)
        p = np.tensordot(weights, block, 1)
        inside = p > FLOOR
        p = np.maximum(p, FLOOR)
        return -float((share * np.log(p)).sum()), -(block * (share * inside / p)).sum(axis=(1, 2))

    return part


def _logit(parts: Sequence[NDArray[Any]], head: Head, space: str, truth: Array) -> Part:
    def part(weights: Array, rows: slice) -> tuple[float, Array]:
        block, share = _block(parts, rows, head, "logit"), truth[rows]
        z = np.tensordot(weights, block, 1)
        if not head.exclusive:
            value, residual = np.logaddexp(0.0, z) - share * z, sigmoid(z) - share
            return float(np.nansum(value)), (block * np.nan_to_num(residual)).sum(axis=(1, 2))
        top = z.max(axis=1, keepdims=True)
        spread = np.log(np.exp(z - top).sum(axis=1, keepdims=True)) + top
        value = (share * (spread - z)).sum()
        mass = share.sum(axis=1, keepdims=True)
        return float(value), (block * (softmax(z) * mass - share)).sum(axis=(1, 2))

    return part
