"""Conversions of stored predictions to the space in which members are averaged, and of an average to a
prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.tasks.kinds import Array, Head, sigmoid, softmax


def to_space(stored: NDArray[Any], head: Head, space: str) -> Array:
    """(rows, outputs). In rank space, `stored` must be ranks already."""
    values = np.asarray(stored, np.float64)
    if space == "rank" or head.spec.space == "value":
        return values
    if not head.exclusive:
        return INDEPENDENT[space][0](values)
    return softmax(values) if space == "probability" else values


def to_prediction(total: NDArray[Any], head: Head, space: str) -> Array:
    """A weighted mean in `space` -> (rows, outputs) for a metric: probabilities, values, or ranks if only
    order matters."""
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


# stored -> space, and space -> probability, of binary and multilabel outputs, which do not depend on each
# other
INDEPENDENT: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "probability": (sigmoid, _same),
    "logit": (_same, sigmoid),
    "geometric": (_log_sigmoid, _exp),
}
