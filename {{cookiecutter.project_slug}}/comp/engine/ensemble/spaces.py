"""Weighted sums of members, as a search sees them: what is summed of each member, and what a sum says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.tasks.kinds import Array, Head, sigmoid, softmax

Sum = NDArray[Any]


@dataclass(frozen=True)
class FastScorer:
    extract: Callable[[NDArray[Any]], NDArray[np.float32]]  # stored (rows, outputs) -> what is summed
    approximate: Callable[[Sum], float]  # of a sum whose weights add up to 1
    exact: Callable[[Sum], float]
    is_approximate: bool  # approximate may order two close sums differently from exact


def to_space(stored: NDArray[Any], head: Head, space: str) -> Array:
    """(rows, outputs), where sums are taken. Ranks come as ranks already."""
    values = np.asarray(stored, np.float64)
    if space == "rank" or head.spec.space == "value":
        return values
    if not head.exclusive:
        return INDEPENDENT[space][0](values)
    return softmax(values) if space == "probability" else values


def to_prediction(total: Sum, head: Head, space: str) -> Array:
    """A sum as the metric takes it: a probability, a value, or a rank where only order counts."""
    if space == "rank" or head.spec.space == "value":
        return np.asarray(total, np.float64)
    if not head.exclusive:
        return np.clip(INDEPENDENT[space][1](np.asarray(total, np.float64)), 0.0, 1.0)
    if space != "probability":
        return softmax(np.asarray(total, np.float64))
    floor = np.maximum(np.asarray(total, np.float64), 1e-30)
    return floor / floor.sum(axis=1, keepdims=True)


def _same(x: Array) -> Array:
    return x


def _log_sigmoid(x: Array) -> Array:
    return -np.logaddexp(0.0, -x)


def _exp(x: Array) -> Array:
    return np.asarray(np.exp(x))


# stored -> what is summed, and a sum -> probability; each column tells both sides of its own label
INDEPENDENT: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "probability": (sigmoid, _same),
    "logit": (_same, sigmoid),
    "geometric": (_log_sigmoid, _exp),
}
