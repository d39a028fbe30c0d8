"""From grey levels to what the network is given: `data.normalize` and `data.whiten`.

Numbers that come from pictures come from the training part of the fold alone, and lie among the buffers of the network. So
they are in its weights, and whoever reads those, here or on Kaggle, sees with the same eyes; nothing has to be kept beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comp.engine.config.schema import Config


@dataclass(frozen=True)
class Normalize:
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
    if cfg.data.normalize == "data":
        module.register_buffer("pixel_mean", torch.zeros(channels))
        module.register_buffer("pixel_std", torch.ones(channels))
    if cfg.data.whiten != "none":
        features = channels * cfg.data.size**2
        module.register_buffer("white_middle", torch.zeros(features))
        module.register_buffer("white", torch.zeros(features, features))


def build(cfg: Config, module: nn.Module, device: torch.device) -> Normalize:
    """In units of uint8. `model`: mean and deviation that the network was made for."""
    channels = cfg.data.channels
    kind = cfg.data.normalize
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
    return Normalize(mean[:, None, None], std[:, None, None], kind == "minmax", whiten)
