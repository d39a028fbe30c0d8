"""Geometry straight on OpenCV: (picture, random) -> picture, of the same kind: uint8, or what data.depth says.

What runs here releases Python's lock, so that threads of one process do it over the cache, without loader processes and
without copying batches between them. A recipe made of these alone is loaded by threads; see train/data.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import cv2
import numpy as np

from comp.engine.readers.arrays import Pixels

Op = Callable[[Pixels, Random], Pixels]


def random_resized_crop(
    size: int, scale: tuple[float, float] = (0.5, 1.0), ratio: tuple[float, float] = (0.8, 1.25)
) -> Op:
    """A random part of the picture, by share of its area and by aspect, resized to a square."""
    low, high = math.log(ratio[0]), math.log(ratio[1])

    def crop(image: Pixels, random: Random) -> Pixels:
        rows, columns = image.shape[:2]
        area, aspect = rows * columns * random.uniform(*scale), math.exp(random.uniform(low, high))
        height = max(1, min(rows, round(math.sqrt(area / aspect))))
        width = max(1, min(columns, round(math.sqrt(area * aspect))))
        top, left = random.randint(0, rows - height), random.randint(0, columns - width)
        part = image[top : top + height, left : left + width]
        # Area averaging costs five times as much, and shows only where a pixel stands for several.
        far = height > 2 * size or width > 2 * size
        made = cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA if far else cv2.INTER_LINEAR)
        return made.astype(image.dtype, copy=False)

    return crop


def horizontal_flip(p: float = 0.5) -> Op:
    """Left and right change sides."""

    def mirror(image: Pixels, random: Random) -> Pixels:
        return cv2.flip(image, 1).astype(image.dtype, copy=False) if random.random() < p else image

    return mirror


def random_rotate90() -> Op:
    """Any of the four orientations: for pictures without an up, as from microscopes and satellites."""

    def quarter_turns(image: Pixels, random: Random) -> Pixels:
        return np.ascontiguousarray(np.rot90(image, random.randrange(4)))

    return quarter_turns
