"""Mixup, cutmix and mosaics of four, on normalized batches on the device.

Partners follow from the position in the epoch's list: 0 with 1, 2 with 3; for a mosaic four by four. The list
is shuffled, so neighbors are random pairs, and as long as a micro-batch, or a process's share of it, holds
whole pairs, it does not matter how the batch of a step is split. What happens to an image is drawn from its
own seed.

Targets are mixed as losses: the loss against each target, weighted by its share. For cross-entropy and BCE
that equals the loss against the soft target, for squared errors it has the same gradient, and any other loss,
a custom one too, works without knowing about mixing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor
from torch.nn import functional as F

from comp.engine.config.schema import Config
from comp.engine.data.seeding import uniform
from comp.engine.errors import UserError
from comp.engine.run.device import to_device
from comp.engine.run.gpu_augment import Seeds
from comp.engine.tasks.kinds import Head
from comp.transforms import EpochAugment

Array = NDArray[np.float64]
MixPart = tuple[Tensor, Tensor]  # positions in the batch whose target counts, and its share: (batch,) each
Mix = Callable[[Tensor, Seeds | None], tuple[Tensor, list[MixPart]]]
MixedLoss = Callable[[Tensor, list[Tensor], Tensor, list[MixPart]], Tensor]
MOSAIC_MARGIN = 0.25  # the point where the four images meet is at least this share of the side from the edge


def validate(cfg: Config, heads: tuple[Head, ...], several_images: bool) -> None:
    """An error where a mixture of two images has no meaning, or partners would not be random."""
    on = [name for name in ("mixup", "cutmix", "mosaic") if getattr(cfg.augment, name)]
    if not on:
        return
    what, remedy = "", "set it to 0"
    if retrieval := [head.name for head in heads if head.task == "retrieval"]:
        what = f"target {retrieval[0]} is a retrieval target, and a mixed image has no nearest neighbours"
    elif several_images:
        what = "mixes single images, and samples here have several"
    elif cfg.model.metadata:
        what, remedy = "mixes images but not the metadata of model.metadata", "turn one of them off"
    elif cfg.sampling.m_per_class > 1:
        what = (
            "sampling.m_per_class puts images of a class side by side, so a class would be mixed with itself"
        )
        remedy = "turn one of them off"
    if what:
        raise UserError("knob-unused", key=f"augment.{on[0]}", what=what, remedy=remedy)


def epoch_mix(cfg: Config, augment: EpochAugment) -> Mix:
    """(images, seeds) -> images, and the parts of their targets; no parts where nothing is mixed."""
    knobs = cfg.augment
    if not augment.strong or not (knobs.mixup or knobs.cutmix or knobs.mosaic):
        return no_mix

    def mix(images: Tensor, seeds: Seeds | None) -> tuple[Tensor, list[MixPart]]:
        assert seeds is not None, "only augmented images are mixed"
        return mix_images(images, seeds, knobs.mixup, knobs.cutmix, knobs.mixup_prob, knobs.mosaic)

    return mix


def no_mix(images: Tensor, seeds: Seeds | None) -> tuple[Tensor, list[MixPart]]:
    return images, []


def mix_images(
    images: Tensor, seeds: Seeds, mixup: float, cutmix: float, share: float, mosaic: float
) -> tuple[Tensor, list[MixPart]]:
    """`mixup`, `cutmix`: alpha of the beta distribution; with both on, each gets half of the `share` of
    samples that are mixed. `mosaic`: share of samples."""
    count = len(images)
    u = uniform(seeds, 5, 7).astype(np.float64)  # (batch, 7)
    use_mosaic = u[:, 0] < mosaic
    use_pair = ~use_mosaic & (u[:, 1] < share) & bool(mixup or cutmix)
    use_cutmix = use_pair & bool(cutmix) & ((u[:, 2] < 0.5) | (not mixup))
    use_mixup = use_pair & ~use_cutmix
    places = np.arange(count)
    # shares[:, k]: of the image itself, of its partner, for mosaics of two more. partners[k]: their positions
    # in the batch.
    shares = np.zeros((count, 4))
    shares[:, 0] = 1
    # Micro-batches hold whole pairs and fours; only the last of an epoch may not.
    partners = [np.where(places ^ k < count, places ^ k, (places + k) % count) for k in range(4)]
    out = images
    if use_mixup.any():
        out = _mixup(images, partners[1], u, use_mixup, mixup, shares)
    if use_cutmix.any():
        out = _cutmix(images, out, partners[1], u, use_cutmix, cutmix, shares)
    if use_mosaic.any():
        out = out.clone() if out is images else out
        for i in np.flatnonzero(use_mosaic).tolist():
            _mosaic(images, out, partners, u, i, shares)
    parts = 4 if use_mosaic.any() else 2
    return out, [(_to(partners[k], images), _like(shares[:, k], images)) for k in range(parts)]


def _mixup(
    images: Tensor, partner: NDArray[np.int64], u: Array, use: NDArray[np.bool_], alpha: float, shares: Array
) -> Tensor:
    shares[use, 0] = betaincinv(alpha, alpha, np.clip(u[use, 3], 1e-6, 1 - 1e-6))
    shares[:, 1] = 1 - shares[:, 0]
    own = _like(shares[:, 0], images).view(-1, 1, 1, 1)
    return own * images + (1 - own) * images[_to(partner, images)]


def _cutmix(
    images: Tensor,
    out: Tensor,
    partner: NDArray[np.int64],
    u: Array,
    use: NDArray[np.bool_],
    alpha: float,
    shares: Array,
) -> Tensor:
    height, width = images.shape[2:]
    side = np.sqrt(1 - betaincinv(alpha, alpha, np.clip(u[:, 3], 1e-6, 1 - 1e-6)))
    # The rectangle is placed inside the image, not clipped at its edge: its share is the drawn one, rounded.
    rows, columns = np.rint(side * height), np.rint(side * width)
    top, left = np.floor(u[:, 4] * (height - rows + 1)), np.floor(u[:, 5] * (width - columns + 1))
    inside = (
        _between(top, rows, height, images)[:, :, None] & _between(left, columns, width, images)[:, None]
    )  # (batch, height, width)
    inside &= to_device(use, images.device)[:, None, None]
    area = rows * columns / (height * width)
    shares[use, 0], shares[use, 1] = 1 - area[use], area[use]
    return torch.where(inside[:, None], images[_to(partner, images)], out)


def _mosaic(
    images: Tensor, out: Tensor, partners: list[NDArray[np.int64]], u: Array, i: int, shares: Array
) -> None:
    """Write the mosaic of image i into `out`: four whole images, each shrunk into one quarter."""
    height, width = images.shape[2:]
    down, across = (
        max(1, min(side - 1, round(side * (MOSAIC_MARGIN + (1 - 2 * MOSAIC_MARGIN) * u[i, k]))))
        for side, k in ((height, 4), (width, 5))
    )
    corners = [(0, 0, down, across), (0, across, down, width - across),
               (down, 0, height - down, across), (down, across, height - down, width - across)]  # fmt: skip
    first = int(u[i, 6] * 4)  # corner of image i itself
    for k, (y, x, h, w) in enumerate(corners[first:] + corners[:first]):
        image = images[partners[k][i]][None]
        out[i, :, y : y + h, x : x + w] = F.interpolate(image, (h, w), mode="bilinear", antialias=True)[0]
        shares[i, k] = h * w / (height * width)


def mixed_loss(
    cfg: Config, heads: tuple[Head, ...], criterion: Callable[[Tensor, list[Tensor]], Tensor]
) -> MixedLoss:
    """(output, targets, weight, mix_parts) -> (batch,): loss times sample weight; of a mixture, the weighted
    sum over its parts.

    With loss.target_threshold the criterion gets the soft target instead: it makes every class whose share is
    large enough a positive.
    """

    def loss(output: Tensor, targets: list[Tensor], weight: Tensor, parts: list[MixPart]) -> Tensor:
        if not parts:
            return criterion(output, targets) * weight
        if cfg.loss.target_threshold is not None:
            pairs = zip(targets, (*heads, *heads), strict=False)  # with a teacher, a second target per head
            soft = [
                _weighted_sum([_soft_target(target, head)[places] for places, _ in parts], parts)
                for target, head in pairs
            ]
            return criterion(output, soft) * _weighted_sum([weight[places] for places, _ in parts], parts)
        part_losses = [
            weight[places] * criterion(output, [target[places] for target in targets]) for places, _ in parts
        ]
        return _weighted_sum(part_losses, parts)

    return loss


def _weighted_sum(values: list[Tensor], parts: list[MixPart]) -> Tensor:
    """(batch, ...) of each part -> (batch, ...), weighted by the shares of the parts."""
    shares = [
        share.view(-1, *[1] * (value.ndim - 1)) for value, (_, share) in zip(values, parts, strict=True)
    ]
    return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(0)


def _soft_target(target: Tensor, head: Head) -> Tensor:
    is_code = target.ndim == 1 and not target.is_floating_point()
    return F.one_hot(target, len(head.outputs)).float() if is_code else target


def _between(start: Array, length: Array, side: int, like: Tensor) -> Tensor:
    """(batch, side): True from start to start + length."""
    places = np.arange(side)[None]
    return to_device((places >= start[:, None]) & (places < (start + length)[:, None]), like.device)


def _to(places: NDArray[np.int64], like: Tensor) -> Tensor:
    return to_device(places, like.device)


def _like(values: Array, like: Tensor) -> Tensor:
    return to_device(values, like.device, like.dtype)
