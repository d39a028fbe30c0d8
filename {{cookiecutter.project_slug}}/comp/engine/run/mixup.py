"""What pairs samples: mixup, cutmix and mosaics of four, on normalised batches on the device.

Who is paired follows from the place in the epoch's list: 0 with 1, 2 with 3, for a mosaic four by four. The list is
shuffled, so neighbours are as random as any pair; and as long as a micro-batch, or the share of a process, holds whole
pairs, it does not matter how the batch of a step is cut. What happens to a picture is drawn from its own seed.

Targets are mixed as losses: share by share, the loss against each target. For cross-entropy and BCE that is the loss
against the soft target, for squared errors it has the same gradient, and any other loss, yours too, need not know of it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.nn import functional as F

from comp.engine.config.schema import Config
from comp.engine.data.seeding import uniform
from comp.engine.errors import Refused
from comp.engine.run.gpu_augment import Seeds, to_device
from comp.engine.tasks.kinds import Head
from comp.transforms import EpochAugment

MixPart = tuple[Tensor, Tensor]  # whose target, by place in the batch, and with which share: (batch,) each
Mix = Callable[[Tensor, Seeds | None], tuple[Tensor, list[MixPart]]]
EDGE = (
    0.25  # the corner where the four pictures of a mosaic meet stays this share of the side away from the rim
)


def epoch_mix(cfg: Config, day: EpochAugment) -> Mix:
    """(pictures, seeds) -> pictures, and the parts of their targets; no parts where nothing is mixed."""
    knobs = cfg.augment
    if not day.strong or not (knobs.mixup or knobs.cutmix or knobs.mosaic):
        return no_mix

    def mix(images: Tensor, seeds: Seeds | None) -> tuple[Tensor, list[MixPart]]:
        assert seeds is not None, "only what is augmented is mixed"
        return mix_images(images, seeds, knobs.mixup, knobs.cutmix, knobs.mixup_prob, knobs.mosaic)

    return mix


def validate(cfg: Config, heads: tuple[Head, ...], several: bool) -> None:
    """Where a mixture of two pictures has no meaning, or the pictures would not find each other."""
    on = [name for name in ("mixup", "cutmix", "mosaic") if getattr(cfg.augment, name)]
    if not on:
        return
    for head in heads:
        if head.task == "retrieval":
            raise Refused(
                f"augment.{on[0]}: {head.name} is found by likeness, and nothing is like a mixture; set it to 0"
            )
    if several:
        raise Refused(f"augment.{on[0]}: pairs single pictures, and samples here have several; set it to 0")
    if cfg.model.metadata:
        raise Refused(
            f"augment.{on[0]}: mixes pictures, not what model.metadata puts beside them; turn one of them off"
        )
    if cfg.sampling.m_per_class > 1:
        raise Refused(
            f"augment.{on[0]}: sampling.m_per_class puts a class side by side, so it would be mixed with itself; turn one of them off"
        )


def no_mix(images: Tensor, seeds: Seeds | None) -> tuple[Tensor, list[MixPart]]:
    return images, []


def mix_images(
    images: Tensor, seeds: Seeds, mixup: float, cutmix: float, share: float, mosaic: float
) -> tuple[Tensor, list[MixPart]]:
    """mixup and cutmix are alphas; with both on, each has half of the `share` of samples that one of them changes."""
    count, height, width = len(images), *images.shape[2:]
    u = uniform(seeds, 5, 7).astype(np.float64)
    four = u[:, 0] < mosaic
    pair = ~four & (u[:, 1] < share) & bool(mixup or cutmix)
    cut = pair & bool(cutmix) & ((u[:, 2] < 0.5) | (not mixup))
    blend = pair & ~cut
    places = np.arange(count)
    # shares[:, k]: of the own picture, then of its mate, and for mosaics of two more; mates[k]: who they are
    shares = np.zeros((count, 4))
    shares[:, 0] = 1
    # Batches, and the passes they are cut into, hold whole pairs and fours; only the very last of an epoch may not.
    mates = [np.where(places ^ k < count, places ^ k, (places + k) % count) for k in range(4)]
    out = images

    if blend.any():
        shares[blend, 0] = betaincinv(mixup, mixup, np.clip(u[blend, 3], 1e-6, 1 - 1e-6))
        shares[:, 1] = 1 - shares[:, 0]
        own = _like(shares[:, 0], images).view(-1, 1, 1, 1)
        out = own * images + (1 - own) * images[_at(mates[1], images)]
    if cut.any():
        alpha = cutmix
        side = np.sqrt(1 - betaincinv(alpha, alpha, np.clip(u[:, 3], 1e-6, 1 - 1e-6)))
        # The rectangle keeps its size at the rim, so that the share is what was drawn, up to rounding.
        rows, columns = np.rint(side * height), np.rint(side * width)
        top, left = np.floor(u[:, 4] * (height - rows + 1)), np.floor(u[:, 5] * (width - columns + 1))
        inside = (
            _between(top, rows, height, images)[:, :, None] & _between(left, columns, width, images)[:, None]
        )
        inside &= to_device(cut, images.device)[:, None, None]
        out = torch.where(inside[:, None], images[_at(mates[1], images)], out)
        area = rows * columns / (height * width)
        shares[cut, 0], shares[cut, 1] = 1 - area[cut], area[cut]
    if four.any():
        out = out.clone() if out is images else out
        for i in np.flatnonzero(four).tolist():
            down, across = (
                max(1, min(side - 1, round(side * (EDGE + (1 - 2 * EDGE) * u[i, k]))))
                for side, k in ((height, 4), (width, 5))
            )
            corners = [(0, 0, down, across), (0, across, down, width - across),
                       (down, 0, height - down, across), (down, across, height - down, width - across)]  # fmt: skip
            turn = int(u[i, 6] * 4)  # which corner is the own picture's
            for k, (y, x, h, w) in enumerate(corners[turn:] + corners[:turn]):
                whole = images[mates[k][i]][None]
                out[i, :, y : y + h, x : x + w] = F.interpolate(
                    whole, (h, w), mode="bilinear", antialias=True
                )[0]
                shares[i, k] = h * w / (height * width)
    kinds = 4 if four.any() else 2
    return out, [(_at(mates[k], images), _like(shares[:, k], images)) for k in range(kinds)]


def mixed_loss(
    cfg: Config, heads: tuple[Head, ...], criterion: Callable[[Tensor, list[Tensor]], Tensor]
) -> Callable[[Tensor, list[Tensor], Tensor, list[MixPart]], Tensor]:
    """(output, truth, weight, parts) -> (batch,): each sample's loss times its weight; of a mixture, the sum over its parts.

    Only loss.target_threshold must see the soft target itself: it turns every class of a mixture that is large enough into a yes.
    """

    def mixture(output: Tensor, truth: list[Tensor], weight: Tensor, parts: list[MixPart]) -> Tensor:
        if not parts:
            return criterion(output, truth) * weight
        if cfg.loss.target_threshold is not None:
            both = zip(truth, (*heads, *heads), strict=False)  # of a teacher's there is one more each
            soft = [_mean([_shares(target, head)[who] for who, _ in parts], parts) for target, head in both]
            return criterion(output, soft) * _mean([weight[who] for who, _ in parts], parts)
        each = [weight[who] * criterion(output, [target[who] for target in truth]) for who, _ in parts]
        return _mean(each, parts)

    return mixture


def _mean(each: list[Tensor], parts: list[MixPart]) -> Tensor:
    """(batch, ...), by the shares of the parts."""
    shares = [share.view(-1, *[1] * (value.ndim - 1)) for value, (_, share) in zip(each, parts, strict=True)]
    return torch.stack([share * value for share, value in zip(shares, each, strict=True)]).sum(0)


def _shares(target: Tensor, head: Head) -> Tensor:
    whole = target.ndim == 1 and not target.is_floating_point()
    return F.one_hot(target, len(head.outputs)).float() if whole else target


def _between(start: np.ndarray, length: np.ndarray, side: int, like: Tensor) -> Tensor:
    """(batch, side): from start, so many."""
    places = np.arange(side)[None]
    return to_device((places >= start[:, None]) & (places < (start + length)[:, None]), like.device)


def _at(places: np.ndarray, like: Tensor) -> Tensor:
    return to_device(places, like.device)


def _like(values: np.ndarray, like: Tensor) -> Tensor:
    return to_device(values, like.device, like.dtype)
