"""Normalizes images on the device: `data.normalize` and `data.whiten`.

Statistics of pixels are those of the training rows of a fold alone. They are buffers of the model, so they
are saved in its weights, and a kernel on Kaggle normalizes with the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comp.engine.config.schema import Config


@dataclass(frozen=True)
class Normalize:
    """Float images in gray levels, (batch, channels, height, width) -> the model's input."""

    mean: Tensor  # (channels, 1, 1)
    std: Tensor
    minmax: bool = False  # each image from its own minimum (0) to its maximum (1)
    whiten: tuple[Tensor, Tensor] | None = None  # mean (features,) and matrix (features, features)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def __call__(self, x: Tensor) -> Tensor:
        if self.minmax:
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            x = (x - low) / (high - low).clamp(min=1)
        else:
            x = _standardize(x, self.mean, self.std)
        if self.whiten is None:
            return x
        mean, matrix = self.whiten
        with torch.autocast(x.device.type, enabled=False):  # half precision would undo it
            return ((x.flatten(1) - mean) @ matrix).view_as(x)


def _standardize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std. Batches are channels-last, where broadcasting over three channels costs a CPU seven
    times what whole rows of pixels cost. The results are the same bits."""
    rows = x.permute(0, 2, 3, 1)
    if not rows.is_contiguous():
        return (x - mean) / std
    _, channels, _, width = x.shape
    mean, std = (each.flatten().expand(channels).repeat(width) for each in (mean, std))
    out = (rows.flatten(2) - mean).div_(std)
    return out.view(rows.shape).permute(0, 3, 1, 2)


def register(cfg: Config, module: nn.Module) -> None:
    """Adds the buffers, so that weights can be loaded into them. pixel_stats.fit_pixel_stats fills them."""
    channels = cfg.data.channels
    if cfg.data.normalize == "data":
        module.register_buffer("pixel_mean", torch.zeros(channels))
        module.register_buffer("pixel_std", torch.ones(channels))
    if cfg.data.whiten != "none":
        features = channels * cfg.data.size**2
        module.register_buffer("white_middle", torch.zeros(features))
        module.register_buffer("white", torch.zeros(features, features))


def build(cfg: Config, module: nn.Module, device: torch.device) -> Normalize:
    """In units of uint8. normalize=model: the mean and deviation of the pretrained weights."""
    channels = cfg.data.channels
    kind = cfg.data.normalize
    whiten = None
    if cfg.data.whiten != "none":
        whiten = module.get_buffer("white_middle").to(device), module.get_buffer("white").to(device)
    if kind == "data":
        mean, std = module.get_buffer("pixel_mean").to(device), module.get_buffer("pixel_std").to(device)
    elif kind == "model":
        pretrained = getattr(module, "pretrained_cfg", {})
        mean = 255 * torch.tensor(pretrained.get("mean", (0.5, 0.5, 0.5)), device=device)
        std = 255 * torch.tensor(pretrained.get("std", (0.5, 0.5, 0.5)), device=device)
        if channels != len(mean):  # gray, or more than RGB
            mean, std = (value.mean(0, keepdim=True).repeat(channels) for value in (mean, std))
    else:
        mean, std = torch.zeros(channels, device=device), torch.full((channels,), 255.0, device=device)
    return Normalize(mean[:, None, None], std[:, None, None], kind == "minmax", whiten)
