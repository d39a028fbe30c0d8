"""From grey levels to what the network is given: `data.normalise` and `data.whiten`.

Numbers that come from pictures come from the training part of the fold alone, and lie among the buffers of the network. So
they are in its weights, and whoever reads those, here or on Kaggle, sees with the same eyes; nothing has to be kept beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from comp.config import Config
from comp.samples import Positions

if TYPE_CHECKING:
    from comp.train.data import Feed

PICTURES = 20_000  # at most so many are looked at; a mean does not get better with more


@dataclass(frozen=True)
class Normal:
    """Pictures in grey levels, float (batch, channels, height, width), as the network wants them."""

    mean: Tensor  # (channels, 1, 1)
    std: Tensor
    stretch: bool = False  # minmax: each picture's darkest value is 0 and its brightest 1
    whiten: tuple[Tensor, Tensor] | None = None  # (features,) and (features, features)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def __call__(self, x: Tensor) -> Tensor:
        if self.stretch:
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            x = (x - low) / (high - low).clamp(min=1)
        else:
            x = _standard(x, self.mean, self.std)
        if self.whiten is None:
            return x
        middle, matrix = self.whiten
        with torch.autocast(x.device.type, enabled=False):  # half the digits would undo it
            return ((x.flatten(1) - middle) @ matrix).view_as(x)


def _standard(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std. Batches come with their channels innermost, and a loop over three of them costs a CPU seven times what
    a loop over a row of pixels does; the numbers are the same."""
    rows = x.permute(0, 2, 3, 1)
    if not rows.is_contiguous():
        return (x - mean) / std
    _, channels, _, width = x.shape
    mean, std = (each.flatten().expand(channels).repeat(width) for each in (mean, std))
    made = (rows.flatten(2) - mean).div_(std)
    return made.view(rows.shape).permute(0, 3, 1, 2)


def register(cfg: Config, module: nn.Module) -> None:
    """Places for the numbers, so that weights can be loaded into them."""
    channels = cfg.data.channels
    if cfg.data.normalise == "data":
        module.register_buffer("pixel_mean", torch.zeros(channels))
        module.register_buffer("pixel_std", torch.ones(channels))
    if cfg.data.whiten != "none":
        features = channels * cfg.data.size**2
        module.register_buffer("white_middle", torch.zeros(features))
        module.register_buffer("white", torch.zeros(features, features))


def of(cfg: Config, module: nn.Module, device: torch.device) -> Normal:
    """In units of uint8. `model`: mean and deviation that the network was made for."""
    channels = cfg.data.channels
    kind = cfg.data.normalise
    whiten = None
    if cfg.data.whiten != "none":
        whiten = module.get_buffer("white_middle").to(device), module.get_buffer("white").to(device)
    if kind == "data":
        mean, std = module.get_buffer("pixel_mean").to(device), module.get_buffer("pixel_std").to(device)
    elif kind == "model":
        made_for = getattr(module, "pretrained_cfg", {})
        mean = 255 * torch.tensor(made_for.get("mean", (0.5, 0.5, 0.5)), device=device)
        std = 255 * torch.tensor(made_for.get("std", (0.5, 0.5, 0.5)), device=device)
        if channels != len(mean):  # grey, or more than a camera has
            mean, std = (value.mean(0, keepdim=True).repeat(channels) for value in (mean, std))
    else:
        mean, std = torch.zeros(channels, device=device), torch.full((channels,), 255.0, device=device)
    return Normal(mean[:, None, None], std[:, None, None], kind == "minmax", whiten)


@torch.no_grad()
def fit(cfg: Config, module: nn.Module, feed: Feed, taught: Positions) -> None:
    """Fill the places from the training part, each picture once and not augmented."""
    rows = np.unique(taught)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), PICTURES)).astype(np.int64)]
    if cfg.data.normalise == "data":
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for x in _pictures(cfg, feed, rows, "mean of pixels"):
            x = (x / 255).transpose(0, 1).flatten(1).double()  # (channels, pixels)
            count, total, squares = count + x.shape[1], total + x.sum(1), squares + (x * x).sum(1)
        mean = total / count
        deviation = (squares / count - mean**2).clamp(min=0).sqrt()
        module.get_buffer("pixel_mean").copy_(255 * mean)
        module.get_buffer("pixel_std").copy_(torch.where(deviation > 1e-4, 255 * deviation, 255.0))
    if cfg.data.whiten != "none":
        before = of(cfg.model_copy(update={"data": cfg.data.model_copy(update={"whiten": "none"})}), module,
                    torch.device("cpu"))  # fmt: skip
        # Two passes, since one would subtract large numbers from each other.
        seen = [
            (before(x).flatten(1).double().sum(0), len(x))
            for x in _pictures(cfg, feed, rows, "middle of pixels")
        ]
        middle, count = torch.stack([total for total, _ in seen]).sum(0), sum(n for _, n in seen)
        middle /= count
        covariance = torch.zeros(len(middle), len(middle), dtype=torch.float64)
        for x in _pictures(cfg, feed, rows, "covariance of pixels"):
            flat = before(x).flatten(1) - middle.float()
            covariance += flat.T @ flat
        module.get_buffer("white_middle").copy_(middle)
        module.get_buffer("white").copy_(_whitening(covariance / count, cfg.data.whiten, cfg.data.whiten_eps))


def _whitening(covariance: Tensor, kind: str, eps: float) -> Tensor:
    """What makes the covariance the identity, but for eps. zca turns back, and stays as near to the picture as it can."""
    variance, axes = torch.linalg.eigh(covariance)
    matrix = axes / (variance.clamp(min=0) + eps).sqrt()
    return matrix @ axes.T if kind == "zca" else matrix.flip(1)  # largest first


def _pictures(cfg: Config, feed: Feed, rows: Positions, doing: str) -> Iterator[Tensor]:
    from comp.train.data import plain_batches

    size = cfg.predict.batch_size
    quiet = None if cfg.machine.progress else True
    plan = tqdm(
        list(plain_batches(rows, size)), desc=doing, unit="batch", leave=False, disable=quiet, delay=2
    )
    for batch in feed.batches(plan):
        yield batch.pictures.cpu().permute(0, 3, 1, 2).float()
