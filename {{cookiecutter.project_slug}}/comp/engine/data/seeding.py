"""Random numbers that are functions of (seed, epoch, position). There is no generator state for checkpoints
to save or loader workers to share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def derive_seed(*numbers: int, spread: NDArray[np.int64] | None = None) -> Any:
    """One 63-bit seed from several numbers (splitmix64, like jax.random.fold_in); neighboring numbers give
    unrelated seeds.

    `spread`: one more number per element, array in, array out.
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
    """(seeds, count) uniform numbers in [0, 1). Each depends only on its seed, the salt and its column."""
    places = np.stack([derive_seed(salt, number, spread=seeds) for number in range(count)], axis=1)
    return ((places >> 39).astype(np.float32) / np.float32(2**24)).astype(np.float32)
