"""Several samples of one scored row become one line: their mean, or their maximum. The one place that knows how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.tasks.kinds import Array


def unique_rows(keys: NDArray[Any]) -> list[str]:
    """Every row once, in the order of its first sample."""
    return list(dict.fromkeys(keys.tolist()))


def aggregate_rows(keys: NDArray[Any], values: Array, order: Sequence[str], how: str) -> Array:
    """(samples, outputs) -> (rows of `order`, outputs); a row of one sample keeps its bits."""
    if len(order) == len(keys) and keys.tolist() == list(order):
        return values
    place = {each: i for i, each in enumerate(order)}
    at = np.array([place[key] for key in keys.tolist()])
    if how == "max":
        out = np.full((len(order), values.shape[1]), -np.inf)
        np.maximum.at(out, at, values)
        return out
    total = np.zeros((len(order), values.shape[1]))
    np.add.at(total, at, values)
    return total / np.bincount(at, minlength=len(order))[:, None]
