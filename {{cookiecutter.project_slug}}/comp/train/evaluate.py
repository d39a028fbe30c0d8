"""A forward pass over rows without gradients: what validation and inference share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from comp.config import Refused
from comp.samples import Positions, Samples
from comp.train import distributed
from comp.train.augment import Seen
from comp.train.data import Feed, plain_batches

View = Callable[[Tensor], Tensor]
HALF = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def plain(pictures: Tensor) -> Tensor:
    return pictures


@torch.inference_mode()
def outputs_of(
    module: nn.Module,
    feed: Feed,
    rows: Positions,
    batch_size: int,
    seen: Seen,
    amp: str,
    views: Sequence[View] = (plain,),
    on_batch: Callable[[int], object] = lambda count: None,
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """(views, rows, network outputs), and for each row whose picture is damaged the reason. Where all processes of a training
    ask for the same, each goes through its share of the rows, and all get all."""
    shared = distributed.sharing()
    mine = rows[distributed.rank() :: distributed.count()] if shared else rows
    device = seen.normal.device
    module.eval()
    fitting = Fitting(module, batch_size)
    damaged: dict[int, str] = {}
    out: list[Tensor] = []
    for batch in feed.batches(plain_batches(mine, batch_size)):
        damaged |= batch.damaged
        extras = feed.extras(batch)
        pictures = batch.pictures.to(device, non_blocking=True).permute(0, 3, 1, 2)
        with torch.autocast(device.type, HALF[amp], enabled=HALF[amp] is not None):
            # Decoded once: the views turn the uint8 batch.
            out.append(torch.stack([fitting(seen(view(pictures)), extras).float() for view in views]).cpu())
        on_batch(len(batch.samples))
    found = torch.cat(out, dim=1).numpy() if out else np.empty((len(views), 0, 0), np.float32)
    return _joined(len(rows), distributed.everybody((found, damaged))) if shared else (found, damaged)


def _joined(
    count: int, parts: list[tuple[NDArray[np.float32], dict[int, str]]]
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Every row once, in its place."""
    views, _, width = parts[0][0].shape
    whole = np.empty((views, count, width), np.float32)
    for rank, (part, _) in enumerate(parts):
        if part.size:
            whole[:, rank :: len(parts)] = part
    return whole, {row: reason for _, damaged in parts for row, reason in damaged.items()}


class Fitting:
    """A network in batches as large as fit: out of memory halves them for the rest of the pass, down to single pictures."""

    def __init__(self, module: nn.Module, size: int):
        self.module, self.size = module, size

    def __call__(self, pictures: Tensor, extras: Mapping[str, Tensor] | None = None) -> Tensor:
        if extras:  # several images of a sample, or metadata: they cannot be parted picture by picture
            out: Tensor = self.module(pictures, **extras)
            return out
        while True:
            try:
                return torch.cat([self.module(part) for part in pictures.split(self.size)])
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                self.size = (min(self.size, len(pictures)) + 1) // 2
            torch.cuda.empty_cache()


def refuse(damaged: Mapping[int, str], samples: Samples) -> None:
    """Half an image never teaches: training stops at the first damaged file and names it."""
    if damaged:
        ids = samples.frame["id"]
        raise Refused(
            *(
                f"sample {ids.iloc[i]}: {reason}; comp check lists every such file"
                for i, reason in damaged.items()
            )
        )
