"""Perceptual hashing: near-duplicate images among hundreds of thousands, without comparing all with all.

1. An image of 32 x 32 gray levels becomes 64 bits: which of its low DCT frequencies are above their median.
   Brightness, size and encoding change few of them.
2. Two hashes that differ in at most 11 bits have at least one quarter of 16 bits with at most 2 differences.
   So each quarter is a table of 65,536 buckets, and a hash is compared with the 137 buckets within 2 bits of
   its own.
3. Candidates are compared by the correlation of their pixels, also under small crops of either image: the
   hash alone is not enough, since line drawings share their low frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIDE = 32  # px of the compared images
FAR = 11  # bits of 64 that may differ: 4 quarters with at most 2 each, and 3 more
QUARTERS, BITS = 4, 16
MASKS = [
    sum(1 << bit for bit in bits) for n in range(FAR // QUARTERS + 1) for bits in combinations(range(BITS), n)
]
PAIRS_AT_ONCE = 2**22  # pairs of hashes in memory
CHUNK = 2048  # pairs of images in memory
# The threshold is the correlation that EXPECTED pairs of different images of this set reach, clipped to LEAST
# and MOST. Of 1,797 handwritten digits 358 pairs are above 0.97 and none above 0.995, where 269 of 270
# planted duplicates are. The distribution is measured on all pairs of DRAWN images, at quantiles that
# duplicates among them do not move.
LEAST, MOST, EXPECTED, DRAWN = 0.90, 0.995, 0.01, 256
MEDIAN, HIGH = 0.5, 0.99
CHANCE_FACTOR = 2.0  # up to this many times the expected number of pairs cannot be told from chance
CROP = 0.97  # side of a crop, as a share of the image's
FLAT = (
    2.0  # standard deviation of gray levels, below which an image is of one color and matches any such image
)

Grey = NDArray[np.float32]  # (images, SIDE, SIDE)
Pairs = NDArray[np.int64]  # (pairs, 2), the smaller index first


def hashes(grey: Grey) -> NDArray[np.uint64]:
    """(images,): the bits of 8 x 8 low frequencies above their median."""
    at = np.arange(SIDE)
    waves = np.cos(np.pi / SIDE * np.outer(np.arange(8), at + 0.5)).astype(np.float32)  # (frequency, pixel)
    low = np.einsum("fy,nyx,gx->nfg", waves, grey, waves, optimize=True).reshape(len(grey), 64)
    above = low > np.median(low[:, 1:], axis=1)[:, None]
    above[:, 0] = False  # the mean, which is brightness
    return np.packbits(above, axis=1).view(">u8").ravel().astype(np.uint64)


def similar_pairs(hashed: NDArray[np.uint64], far: int = FAR) -> Pairs:
    """Every pair of hashes that differ in at most `far` bits, once."""
    found = [part for quarter in range(QUARTERS) for part in _in_quarter(hashed, quarter, far)]
    both = np.unique(np.concatenate([np.zeros(0, np.int64), *found]))
    return np.column_stack(np.divmod(both, len(hashed)))


def _in_quarter(hashed: NDArray[np.uint64], quarter: int, far: int) -> Iterator[NDArray[np.int64]]:
    """Pairs that are near in one quarter, each as one integer: first * number of hashes + second."""
    key = ((hashed >> np.uint64(BITS * quarter)) & np.uint64(2**BITS - 1)).astype(np.int64)
    order = np.argsort(key, kind="stable")
    start = np.searchsorted(key[order], np.arange(2**BITS + 1))
    for mask in MASKS:
        bucket = key ^ mask
        first, count = start[bucket], start[bucket + 1] - start[bucket]
        # Cut into parts, so that a bucket with half of all images costs time but not memory.
        cuts = np.flatnonzero(np.diff(np.cumsum(count) // PAIRS_AT_ONCE)) + 1
        for part in np.split(np.arange(len(key)), cuts):
            one = np.repeat(part, count[part])
            place = np.arange(len(one)) - np.repeat(np.cumsum(count[part]) - count[part], count[part])
            other = order[np.repeat(first[part], count[part]) + place]
            ordered = one < other
            one, other = one[ordered], other[ordered]
            close = np.bitwise_count(hashed[one] ^ hashed[other]) <= far
            yield one[close] * len(key) + other[close]


def correlation(grey: Grey, pairs: Pairs) -> NDArray[np.float32]:
    """(pairs,): the highest correlation of the pixels of two images, unchanged or with one of them
    cropped."""
    best = np.zeros(len(pairs), np.float32)
    for start in range(0, len(pairs), CHUNK):
        part = slice(start, start + CHUNK)
        names, (one, other) = np.unique(pairs[part].T, return_inverse=True)
        whole, crops = _normalized(grey[names]), [_normalized(crop) for crop in _crops(grey[names])]
        both = [(whole, whole), *((whole, crop) for crop in crops), *((crop, whole) for crop in crops)]
        best[part] = np.max([np.einsum("ij,ij->i", a[one], b[other]) for a, b in both], axis=0)
    return best


def _crops(grey: Grey) -> list[Grey]:
    """Nine crops with CROP of the side, resized to the full side by a small matrix for rows and one for
    columns."""
    at = np.arange(SIDE)
    matrices = []
    for offset in (0.0, 0.5, 1.0):
        place = np.clip(offset * (1 - CROP) * SIDE + CROP * (at + 0.5) - 0.5, 0, SIDE - 1)
        linear = np.maximum(0, 1 - np.abs(place[:, None] - at)).astype(np.float32)  # (new, old)
        matrices.append(linear)
    return [down @ grey @ across.T for down in matrices for across in matrices]


def _normalized(grey: Grey) -> NDArray[np.float32]:
    """(images, pixels) of mean 0 and length 1."""
    flat = grey.reshape(len(grey), SIDE * SIDE) - grey.mean((1, 2))[:, None]
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


class Threshold(NamedTuple):
    correlation: float  # from which a pair of this set counts as duplicates
    expected: float  # pairs of different images that reach it by chance


def find_duplicates(grey: Grey) -> tuple[Pairs, NDArray[np.float32], Threshold]:
    """Pairs of duplicates, the correlation of each, and the threshold."""
    not_flat = np.flatnonzero(grey.std((1, 2)) >= FLAT)
    pairs = not_flat[similar_pairs(hashes(grey[not_flat]))]
    threshold = chance_threshold(grey[not_flat])
    similarity = correlation(grey, pairs)
    duplicate = similarity >= threshold.correlation
    return pairs[duplicate], similarity[duplicate], threshold


def chance_threshold(grey: Grey) -> Threshold:
    """Sets the threshold by the correlation of different images of the set: digits correlate more than
    photographs, and the maximum grows with the number of pairs. Assumes that Fisher's z =
    arctanh(correlation) is normal."""
    some = np.random.Generator(np.random.PCG64(0)).permutation(len(grey))[:DRAWN]
    if len(some) < 3:
        return Threshold(MOST, 0.0)
    whole = _normalized(grey[some])
    best = np.max([whole @ whole.T, *(whole @ _normalized(crop).T for crop in _crops(grey[some]))], axis=0)
    drawn = np.maximum(best, best.T)[np.triu_indices(len(some), 1)]
    median, high = np.arctanh(np.clip(np.quantile(drawn, (MEDIAN, HIGH)), -0.999999, 0.999999))
    deviation = max(float(high - median), 1e-6) / NormalDist().inv_cdf(HIGH)
    count = len(grey) * (len(grey) - 1) / 2
    z = median - deviation * NormalDist().inv_cdf(min(0.5, EXPECTED / count))
    level = float(np.clip(np.tanh(z), LEAST, MOST))
    return Threshold(level, count * math.erfc((math.atanh(level) - median) / deviation / math.sqrt(2)) / 2)
