"""Pictures that are nearly the same, among hundreds of thousands, without comparing all with all.

A picture of 32 x 32 grey levels becomes 64 bits: which of its low frequencies are above their median. Brightness, size and
encoding move few of them. Two pictures whose bits differ in at most 11 places have at least one quarter of 16 bits with at most
2 differences, so each quarter is a table of 65,536 buckets, and a picture looks into the 137 that are so near to its own. What is
found like that is then compared pixel by pixel, under small crops of either, since line drawings share their low frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIDE = 32  # px of what is compared
FAR = 11  # bits of 64 that may differ: 4 quarters with at most 2 each, and one to spare
QUARTERS, BITS = 4, 16
MASKS = [
    sum(1 << bit for bit in bits) for n in range(FAR // QUARTERS + 1) for bits in combinations(range(BITS), n)
]
AT_ONCE = 2**22  # pairs of hashes in memory
CHUNK = 2048  # pairs of pictures in memory
# Correlation of pixels from which two pictures are copies: what RARE pairs of this set reach by chance, within limits. Of 1,797
# digits, which look alike, 358 pairs are above 0.97 and none above 0.995, where 269 of 270 planted copies are. Chance is measured on
# the pairs of DRAWN pictures; copies among them must not count, so at quantiles that a copy of every picture would not move.
LEAST, MOST, RARE, DRAWN = 0.90, 0.995, 0.01, 256
MIDDLE, HIGH = 0.5, 0.99
BEYOND = 2.0  # times as many pairs as by chance: fewer cannot be told from it
CUT = 0.97  # side of a cropped copy
FLAT = 2.0  # grey levels of standard deviation: less is no picture, and looks like any other of its kind

Grey = NDArray[np.float32]  # (pictures, SIDE, SIDE)
Pairs = NDArray[np.int64]  # (pairs, 2), the smaller number first


def hashes(grey: Grey) -> NDArray[np.uint64]:
    """(pictures,) the sign of 8 x 8 low frequencies against their median."""
    at = np.arange(SIDE)
    waves = np.cos(np.pi / SIDE * np.outer(np.arange(8), at + 0.5)).astype(np.float32)  # (frequency, pixel)
    low = np.einsum("fy,nyx,gx->nfg", waves, grey, waves, optimize=True).reshape(len(grey), 64)
    above = low > np.median(low[:, 1:], axis=1)[:, None]
    above[:, 0] = False  # the mean: how bright it is
    return np.packbits(above, axis=1).view(">u8").ravel().astype(np.uint64)


def similar_pairs(hashed: NDArray[np.uint64], far: int = FAR) -> Pairs:
    """Every pair of hashes that differ in at most `far` bits, once."""
    found = [part for quarter in range(QUARTERS) for part in _in_quarter(hashed, quarter, far)]
    both = np.unique(np.concatenate([np.zeros(0, np.int64), *found]))
    return np.column_stack(np.divmod(both, len(hashed)))


def _in_quarter(hashed: NDArray[np.uint64], quarter: int, far: int) -> Iterator[NDArray[np.int64]]:
    """Both numbers of a pair in one."""
    key = ((hashed >> np.uint64(BITS * quarter)) & np.uint64(2**BITS - 1)).astype(np.int64)
    order = np.argsort(key, kind="stable")
    start = np.searchsorted(key[order], np.arange(2**BITS + 1))
    for mask in MASKS:
        near = key ^ mask
        first, count = start[near], start[near + 1] - start[near]
        # Cut so that a bucket with half of all pictures in it costs time, not memory.
        cuts = np.flatnonzero(np.diff(np.cumsum(count) // AT_ONCE)) + 1
        for mine in np.split(np.arange(len(key)), cuts):
            one = np.repeat(mine, count[mine])
            place = np.arange(len(one)) - np.repeat(np.cumsum(count[mine]) - count[mine], count[mine])
            other = order[np.repeat(first[mine], count[mine]) + place]
            once = one < other
            one, other = one[once], other[once]
            close = np.bitwise_count(hashed[one] ^ hashed[other]) <= far
            yield one[close] * len(key) + other[close]


def correlation(grey: Grey, pairs: Pairs) -> NDArray[np.float32]:
    """Of pixels, as the best of: as they are, and either one against crops of the other."""
    best = np.zeros(len(pairs), np.float32)
    for start in range(0, len(pairs), CHUNK):
        part = slice(start, start + CHUNK)
        names, (one, other) = np.unique(pairs[part].T, return_inverse=True)
        whole, crops = _normal(grey[names]), [_normal(crop) for crop in _crops(grey[names])]
        both = [(whole, whole), *((whole, crop) for crop in crops), *((crop, whole) for crop in crops)]
        best[part] = np.max([np.einsum("ij,ij->i", a[one], b[other]) for a, b in both], axis=0)
    return best


def _crops(grey: Grey) -> list[Grey]:
    """Nine crops of CUT of both sides, brought back to size: rows and columns are resampled by a small matrix each."""
    at = np.arange(SIDE)
    matrices = []
    for offset in (0.0, 0.5, 1.0):
        place = np.clip(offset * (1 - CUT) * SIDE + CUT * (at + 0.5) - 0.5, 0, SIDE - 1)
        matrices.append(
            np.maximum(0, 1 - np.abs(place[:, None] - at)).astype(np.float32)
        )  # (new, old), linear
    return [down @ grey @ across.T for down in matrices for across in matrices]


def _normal(grey: Grey) -> NDArray[np.float32]:
    """(pictures, pixels) of mean 0 and length 1."""
    flat = grey.reshape(len(grey), SIDE * SIDE) - grey.mean((1, 2))[:, None]
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


class Threshold(NamedTuple):
    """From where on pictures of a set are copies, and how many pairs of it reach that by chance."""

    correlation: float
    chance: float


def find_duplicates(grey: Grey) -> tuple[Pairs, NDArray[np.float32], Threshold]:
    """Pairs that are copies of each other, how alike they are, and from where on that counts in this set."""
    real = np.flatnonzero(grey.std((1, 2)) >= FLAT)
    pairs = real[similar_pairs(hashes(grey[real]))]
    level = threshold(grey[real])
    how = correlation(grey, pairs)
    return pairs[how >= level.correlation], how[how >= level.correlation], level


def threshold(grey: Grey) -> Threshold:
    """The level, and how many pairs reach it by chance: digits look more alike than photographs, and of many pictures two look more
    alike than of few. Fisher's z = arctanh(correlation) of pairs is taken as normal."""
    some = np.random.Generator(np.random.PCG64(0)).permutation(len(grey))[:DRAWN]
    if len(some) < 3:
        return Threshold(MOST, 0.0)
    whole = _normal(grey[some])
    best = np.max([whole @ whole.T, *(whole @ _normal(crop).T for crop in _crops(grey[some]))], axis=0)
    drawn = np.maximum(best, best.T)[np.triu_indices(len(some), 1)]
    middle, high = np.arctanh(np.clip(np.quantile(drawn, (MIDDLE, HIGH)), -0.999999, 0.999999))
    width = max(float(high - middle), 1e-6) / NormalDist().inv_cdf(HIGH)
    count = len(grey) * (len(grey) - 1) / 2
    wanted = middle - width * NormalDist().inv_cdf(min(0.5, RARE / count))
    level = float(np.clip(np.tanh(wanted), LEAST, MOST))
    return Threshold(level, count * math.erfc((math.atanh(level) - middle) / width / math.sqrt(2)) / 2)
