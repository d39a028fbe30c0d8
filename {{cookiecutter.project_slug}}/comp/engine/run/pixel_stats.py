"""Mean, deviation and whitening of the pixels of a fold's training part, into the buffers that normal.register made."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from comp.data import sequential_batches
from comp.engine.config.schema import Config
from comp.engine.data.samples import Positions
from comp.engine.run.data_loader import Loader
from comp.engine.run.normalize import build

PICTURES = 20_000  # at most so many are looked at; a mean does not get better with more


@torch.no_grad()
def fit_pixel_stats(cfg: Config, module: nn.Module, loader: Loader, taught: Positions) -> None:
    """Fill the places from the training part, each picture once and not augmented."""
    rows = np.unique(taught)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), PICTURES)).astype(np.int64)]
    if cfg.data.normalize == "data":
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for x in _pictures(cfg, loader, rows, "mean of pixels"):
            x = (x / 255).transpose(0, 1).flatten(1).double()  # (channels, pixels)
            count, total, squares = count + x.shape[1], total + x.sum(1), squares + (x * x).sum(1)
        mean = total / count
        deviation = (squares / count - mean**2).clamp(min=0).sqrt()
        module.get_buffer("pixel_mean").copy_(255 * mean)
        module.get_buffer("pixel_std").copy_(torch.where(deviation > 1e-4, 255 * deviation, 255.0))
    if cfg.data.whiten != "none":
        before = build(cfg.model_copy(update={"data": cfg.data.model_copy(update={"whiten": "none"})}), module,
                    torch.device("cpu"))  # fmt: skip
        # Two passes, since one would subtract large numbers from each other.
        seen = [
            (before(x).flatten(1).double().sum(0), len(x))
            for x in _pictures(cfg, loader, rows, "middle of pixels")
        ]
        middle, count = torch.stack([total for total, _ in seen]).sum(0), sum(n for _, n in seen)
        middle /= count
        covariance = torch.zeros(len(middle), len(middle), dtype=torch.float64)
        for x in _pictures(cfg, loader, rows, "covariance of pixels"):
            flat = before(x).flatten(1) - middle.float()
            covariance += flat.T @ flat
        module.get_buffer("white_middle").copy_(middle)
        module.get_buffer("white").copy_(_whitening(covariance / count, cfg.data.whiten, cfg.data.whiten_eps))


def _whitening(covariance: Tensor, kind: str, eps: float) -> Tensor:
    """What makes the covariance the identity, but for eps. zca turns back, and stays as near to the picture as it can."""
    variance, axes = torch.linalg.eigh(covariance)
    matrix = axes / (variance.clamp(min=0) + eps).sqrt()
    return matrix @ axes.T if kind == "zca" else matrix.flip(1)  # largest first


def _pictures(cfg: Config, loader: Loader, rows: Positions, doing: str) -> Iterator[Tensor]:
    size = cfg.predict.batch_size
    quiet = None if cfg.machine.progress else True
    plan = tqdm(
        list(sequential_batches(rows, size)), desc=doing, unit="batch", leave=False, disable=quiet, delay=2
    )
    for batch in loader.batches(plan):
        yield batch.images.cpu().permute(0, 3, 1, 2).float()
