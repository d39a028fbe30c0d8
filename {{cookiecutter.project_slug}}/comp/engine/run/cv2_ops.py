"""Augmentation ops on a sample by OpenCV alone: (image, random) -> image of the same dtype; resizing and
cropping without randomness.

They release Python's lock (GIL), so threads of one process run them over the cache: no loader processes, and
no copies of batches between processes. A recipe whose ops on samples are all from here is loaded by threads;
see run/data_loader.py.
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
    """A random part of the image, by share of its area and by aspect ratio, resized to a square."""
    low, high = math.log(ratio[0]), math.log(ratio[1])

    def apply(image: Pixels, random: Random) -> Pixels:
        rows, columns = image.shape[:2]
        area, aspect = rows * columns * random.uniform(*scale), math.exp(random.uniform(low, high))
        height = max(1, min(rows, round(math.sqrt(area / aspect))))
        width = max(1, min(columns, round(math.sqrt(area * aspect))))
        top, left = random.randint(0, rows - height), random.randint(0, columns - width)
        part = image[top : top + height, left : left + width]
        # Area averaging costs five times as much, and shows only when a pixel stands for several.
        shrinks = height > 2 * size or width > 2 * size
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return cv2.resize(part, (size, size), interpolation=interpolation).astype(image.dtype, copy=False)

    return apply


def horizontal_flip(p: float = 0.5) -> Op:
    def apply(image: Pixels, random: Random) -> Pixels:
        return cv2.flip(image, 1).astype(image.dtype, copy=False) if random.random() < p else image

    return apply


def random_rotate90() -> Op:
    """Rotated by 0, 90, 180 or 270 degrees: for images without an up, as from microscopes and satellites."""

    def apply(image: Pixels, random: Random) -> Pixels:
        return np.ascontiguousarray(np.rot90(image, random.randrange(4)))

    return apply


def center_crop(image: Pixels, size: int) -> Pixels:
    """For validation and inference: the shorter side resized to `size`, then the middle square."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    if scale != 1:
        image = resize(image, max(size, round(height * scale)), max(size, round(width * scale)))
        height, width = image.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size].reshape(size, size, -1)


def resize(image: Pixels, height: int, width: int) -> Pixels:
    interpolation = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
    flat = image.reshape(*image.shape[:2], -1)
    parts = [
        cv2.resize(flat[:, :, at : at + 4], (width, height), interpolation=interpolation).reshape(
            height, width, -1
        )
        for at in range(0, flat.shape[2], 4)  # OpenCV takes four channels at most
    ]
    return np.concatenate(parts, 2).astype(image.dtype, copy=False)
