"""Augmentation of whole batches on the device: (pictures, seeds) -> pictures.

Pictures are float, 0 to 1, (batch, channels, height, width). Each sample's numbers come from its own seed, which is a
function of (seed, epoch, position), so it does not matter how batches are cut, loaded or resumed. On a GPU these cost next
to nothing; on a CPU they cost what they would have cost in the loader.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from comp.engine.data.seeding import uniform

Seeds = NDArray[np.int64]


@dataclass(frozen=True)
class BatchOp:
    """An op of a recipe that runs on the device, on a batch at a time."""

    name: str
    function: Callable[[Tensor, Seeds], Tensor]

    def __call__(self, images: Tensor, seeds: Seeds) -> Tensor:
        return self.function(images, seeds)


def to_device(values: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of a batch on their way to the device. Only asked like this, the processor does not wait until the GPU is
    through with all that came before."""
    return torch.from_numpy(values).to(device, dtype, non_blocking=True)


def _uniform(seeds: Seeds, salt: int, count: int, like: Tensor) -> Tensor:
    """(batch, count), uniform from -1 to 1."""
    return to_device(2 * uniform(seeds, salt, count) - 1, like.device, like.dtype)


# Rows: grey, and the two axes of colour (YIQ), where a turn changes the hue and a stretch the saturation.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_BACK = torch.linalg.inv(_YIQ)


def color_jitter(
    brightness: float = 0.2, contrast: float = 0.2, saturation: float = 0.2, hue: float = 0.02
) -> BatchOp:
    """Brightness, contrast, saturation (shares) and hue (share of the circle), one matrix a sample."""

    def apply(images: Tensor, seeds: Seeds) -> Tensor:
        bright, contr, satur, turn = _uniform(seeds, 1, 4, images).unbind(1)
        bright, contr = 1 + brightness * bright, 1 + contrast * contr
        mean = images.mean((1, 2, 3))
        shift = (mean * (1 - contr) * bright).view(-1, 1, 1)
        if images.shape[1] != 3:
            return (images * (bright * contr).view(-1, 1, 1, 1) + shift.unsqueeze(1)).clamp(0, 1)
        angle, stretch = 2 * math.pi * hue * turn, 1 + saturation * satur
        inner = torch.zeros(len(images), 3, 3, device=images.device, dtype=images.dtype)
        inner[:, 0, 0] = 1
        inner[:, 1, 1] = inner[:, 2, 2] = stretch * angle.cos()
        inner[:, 1, 2], inner[:, 2, 1] = -stretch * angle.sin(), stretch * angle.sin()
        yiq, back = (each.to(images, non_blocking=True) for each in (_YIQ, _BACK))
        matrix = back @ inner @ yiq * (bright * contr).view(-1, 1, 1)
        flat = torch.baddbmm(shift, matrix, images.flatten(2))
        return flat.clamp_(0, 1).view_as(images)

    return BatchOp(f"color_jitter({brightness}, {contrast}, {saturation}, {hue})", apply)


def random_affine(shift: float = 0.08, turn: float = 12.0, scale: float = 0.1) -> BatchOp:
    """Moved by a share of the side, turned by degrees, scaled by a share; what comes in from outside is black."""

    def apply(images: Tensor, seeds: Seeds) -> Tensor:
        x, y, angle, size = _uniform(seeds, 2, 4, images).unbind(1)
        angle, size = angle * math.radians(turn), 1 + scale * size
        cos, sin = angle.cos() / size, angle.sin() / size
        matrix = torch.stack([cos, -sin, 2 * shift * x, sin, cos, 2 * shift * y], 1).view(-1, 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    return BatchOp(f"random_affine({shift}, {turn}, {scale})", apply)


def horizontal_flip(p: float = 0.5) -> BatchOp:
    def apply(images: Tensor, seeds: Seeds) -> Tensor:
        turned = (_uniform(seeds, 3, 1, images) < 2 * p - 1).view(-1, 1, 1, 1)
        return torch.where(turned, images.flip(3), images)

    return BatchOp(f"horizontal_flip({p})", apply)


def random_erasing(
    p: float, area: tuple[float, float] = (0.02, 0.33), aspect: tuple[float, float] = (0.3, 3.3)
) -> BatchOp:
    """A rectangle of noise in a share p of the pictures, by share of their area; noise like normalised pixels, so it comes
    after normalising. Which pictures, and where, is known without asking the device, so nothing waits for it."""

    def apply(images: Tensor, seeds: Seeds) -> Tensor:
        drawn = uniform(seeds, 4, 5)
        height, width = images.shape[2:]
        out = images.clone()
        for i in np.flatnonzero(drawn[:, 0] < p).tolist():
            size = height * width * (area[0] + (area[1] - area[0]) * drawn[i, 1])
            ratio = math.exp(math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * drawn[i, 2])
            rows = max(1, min(height, round(math.sqrt(size * ratio))))
            columns = max(1, min(width, round(math.sqrt(size / ratio))))
            top, left = int(drawn[i, 3] * (height - rows + 1)), int(drawn[i, 4] * (width - columns + 1))
            own = torch.Generator(images.device).manual_seed(int(seeds[i]))
            part = out[i, :, top : top + rows, left : left + columns]
            part.normal_(generator=own)
        return out

    return BatchOp(f"random_erasing({p})", apply)
