"""Mean, deviation and whitening of the pixels of a fold's training rows, written to the buffers of
normalize.register."""

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

MAX_IMAGES = 20_000  # more do not make the mean any better


@torch.no_grad()
def fit_pixel_stats(cfg: Config, module: nn.Module, loader: Loader, train_rows: Positions) -> None:
    """Fills the buffers. Each image counts once, not augmented."""
    rows = np.unique(train_rows)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_IMAGES)).astype(np.int64)]
    if cfg.data.normalize == "data":
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for x in _images(cfg, loader, rows, "mean of pixels"):
            x = (x / 255).transpose(0, 1).flatten(1).double()  # (channels, pixels)
            count, total, squares = count + x.shape[1], total + x.sum(1), squares + (x * x).sum(1)
        mean = total / count
        deviation = (squares / count - mean**2).clamp(min=0).sqrt()
        module.get_buffer("pixel_mean").copy_(255 * mean)
        module.get_buffer("pixel_std").copy_(torch.where(deviation > 1e-4, 255 * deviation, 255.0))
    if cfg.data.whiten != "none":
        data = cfg.data.model_copy(update={"whiten": "none"})
        normalize = build(cfg.model_copy(update={"data": data}), module, torch.device("cpu"))
        # Two passes: one pass would subtract large numbers from each other.
        sums = [
            (normalize(x).flatten(1).double().sum(0), len(x))
            for x in _images(cfg, loader, rows, "mean of pixels")
        ]
        mean, count = torch.stack([total for total, _ in sums]).sum(0), sum(n for _, n in sums)
        mean /= count
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for x in _images(cfg, loader, rows, "covariance of pixels"):
            flat = normalize(x).flatten(1) - mean.float()
            covariance += flat.T @ flat
        module.get_buffer("white_middle").copy_(mean)
        module.get_buffer("white").copy_(_whitening(covariance / count, cfg.data.whiten, cfg.data.whiten_eps))


def _whitening(covariance: Tensor, kind: str, eps: float) -> Tensor:
    """The matrix that makes the covariance the identity, but for eps. zca rotates back, which stays closest
    to the image."""
    variance, axes = torch.linalg.eigh(covariance)
    matrix = axes / (variance.clamp(min=0) + eps).sqrt()
    return matrix @ axes.T if kind == "zca" else matrix.flip(1)  # largest first


def _images(cfg: Config, loader: Loader, rows: Positions, description: str) -> Iterator[Tensor]:
    size = cfg.predict.batch_size
    quiet = None if cfg.machine.progress else True
    sampler = tqdm(
        list(sequential_batches(rows, size)),
        desc=description,
        unit="batch",
        leave=False,
        disable=quiet,
        delay=2,
    )
    for batch in loader.batches(sampler):
        yield batch.images.cpu().permute(0, 3, 1, 2).float()
