"""Augmentation ops on a whole batch, on the device: (images, seeds) -> images.

Images are float, 0 to 1, (batch, channels, height, width). The random numbers of an image come from its own
seed, which is a function of (seed, epoch, position), so micro-batches, loading and resuming change nothing.
On a GPU these ops cost next to nothing; on a CPU they cost what they would cost in the loader.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from comp.engine.data.seeding import uniform
from comp.engine.run.device import to_device

Seeds = NDArray[np.int64]


@dataclass(frozen=True)
class BatchOp:
    """An op of a recipe that runs on a batch, with the name that is printed."""

    name: str
    function: Callable[[Tensor, Seeds], Tensor]

    def __str__(self) -> str:
        return self.name

    def __call__(self, images: Tensor, seeds: Seeds) -> Tensor:
        return self.function(images, seeds)


def _uniform(seeds: Seeds, salt: int, count: int, like: Tensor) -> Tensor:
    """(batch, count), uniform from -1 to 1."""
    return to_device(2 * uniform(seeds, salt, count) - 1, like.device, like.dtype)


# Rows: luma and two axes of chroma (YIQ), where a rotation changes the hue and a scaling the saturation.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB = torch.linalg.inv(_YIQ)


def color_jitter(
    brightness: float = 0.2, contrast: float = 0.2, saturation: float = 0.2, hue: float = 0.02
) -> BatchOp:
    """Brightness, contrast, saturation (shares) and hue (share of the circle) as one matrix an image."""

    def apply(images: Tensor, seeds: Seeds) -> Tensor:
        b, c, s, h = _uniform(seeds, 1, 4, images).unbind(1)
        bright, contr = 1 + brightness * b, 1 + contrast * c
        mean = images.mean((1, 2, 3))
        shift = (mean * (1 - contr) * bright).view(-1, 1, 1)
        if images.shape[1] != 3:
            return (images * (bright * contr).view(-1, 1, 1, 1) + shift.unsqueeze(1)).clamp(0, 1)
        angle, chroma_scale = 2 * math.pi * hue * h, 1 + saturation * s
        chroma = torch.zeros(len(images), 3, 3, device=images.device, dtype=images.dtype)
        chroma[:, 0, 0] = 1
        chroma[:, 1, 1] = chroma[:, 2, 2] = chroma_scale * angle.cos()
        chroma[:, 1, 2], chroma[:, 2, 1] = -chroma_scale * angle.sin(), chroma_scale * angle.sin()
        yiq, rgb = (each.to(images, non_blocking=True) for each in (_YIQ, _RGB))
        matrix = rgb @ chroma @ yiq * (bright * contr).view(-1, 1, 1)
        flat = torch.baddbmm(shift, matrix, images.flatten(2))
        return flat.clamp_(0, 1).view_as(images)

    return BatchOp(f"color_jitter({brightness}, {contrast}, {saturation}, {hue})", apply)


def random_affine(translate: float = 0.08, degrees: float = 12.0, scale: float = 0.1) -> BatchOp:
    """Translated by a share of the side, rotated, scaled by a share; the area outside of the image is
    black."""

    def apply(images: Tensor, seeds: Seeds) -> Tensor:
        x, y, angle, size = _uniform(seeds, 2, 4, images).unbind(1)
        angle, size = angle * math.radians(degrees), 1 + scale * size
        cos, sin = angle.cos() / size, angle.sin() / size
        matrix = torch.stack([cos, -sin, 2 * translate * x, sin, cos, 2 * translate * y], 1).view(-1, 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    return BatchOp(f"random_affine({translate}, {degrees}, {scale})", apply)


def horizontal_flip(p: float = 0.5) -> BatchOp:
    def apply(images: Tensor, seeds: Seeds) -> Tensor:
        flipped = (_uniform(seeds, 3, 1, images) < 2 * p - 1).view(-1, 1, 1, 1)
        return torch.where(flipped, images.flip(3), images)

    return BatchOp(f"horizontal_flip({p})", apply)


def random_erasing(
    p: float, scale: tuple[float, float] = (0.02, 0.33), ratio: tuple[float, float] = (0.3, 3.3)
) -> BatchOp:
    """A rectangle of normal noise in a share `p` of the images, `scale` of their area; the noise has the
    scale of normalized pixels, so it comes after normalizing. The rectangles are drawn on the CPU, so nothing
    waits for the device."""

    def apply(images: Tensor, seeds: Seeds) -> Tensor:
        draws = uniform(seeds, 4, 5)  # (batch, 5)
        height, width = images.shape[2:]
        out = images.clone()
        for i in np.flatnonzero(draws[:, 0] < p).tolist():
            area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[i, 1])
            aspect = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draws[i, 2])
            rows = max(1, min(height, round(math.sqrt(area * aspect))))
            columns = max(1, min(width, round(math.sqrt(area / aspect))))
            top, left = int(draws[i, 3] * (height - rows + 1)), int(draws[i, 4] * (width - columns + 1))
            generator = torch.Generator(images.device).manual_seed(int(seeds[i]))
            out[i, :, top : top + rows, left : left + columns].normal_(generator=generator)
        return out

    return BatchOp(f"random_erasing({p})", apply)
