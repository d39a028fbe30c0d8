"""Random numbers as a function of where they are used: no state, so nothing to save and nothing that workers could share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def fold_in(*numbers: int, spread: NDArray[np.int64] | None = None) -> Any:
    """Well-mixed 63-bit numbers from small ones (splitmix64), so that neighbouring seeds have nothing in common.

    `spread` mixes in one more number each: an array in, an array out.
    """
    state = np.zeros(1, np.uint64)
    parts = [np.array(number % 2**64, np.uint64) for number in numbers]
    for part in parts if spread is None else [*parts, spread.astype(np.uint64)]:
        state = (state ^ part) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    state >>= np.uint64(1)
    return int(state[0]) if spread is None else state.astype(np.int64)


def uniform(seeds: NDArray[np.int64], salt: int, count: int) -> NDArray[np.float32]:
    """(seeds, count) numbers from 0 to 1, each a function of its seed, the salt and its place alone."""
    places = np.stack([fold_in(salt, number, spread=seeds) for number in range(count)], axis=1)
    return ((places >> 39).astype(np.float32) / np.float32(2**24)).astype(np.float32)
