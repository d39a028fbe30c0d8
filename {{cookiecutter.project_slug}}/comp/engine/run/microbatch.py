"""The forward passes of a step, in pieces as large as memory holds: out of memory halves the pieces and begins the step anew,
with the same pictures and the same augmentation. So a pass may see fewer pictures, and a step sees all of them.

What is not the same: dropout draws, and batch norm, which normalises over a piece. Its statistics are put back first.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from comp.data import Batch


class MicroBatches:
    """`size` is how many samples go through the network at once; it belongs to the state of a run that is to go on alike. `whole` of them
    belong together."""

    def __init__(self, module: nn.Module, size: int, whole: int = 1):
        self.module, self.size, self.whole = module, size, whole
        norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self.buffers = [buffer for layer in norms for buffer in layer.buffers()]
        self.kept = [buffer.clone() for buffer in self.buffers]
        self.step: list[Batch] = []
        self.seed = 0
        self.to_do: deque[Batch] = deque()

    def begin(self, batches: Iterable[Batch], seed: int) -> None:
        self.step, self.seed = list(batches), seed
        if self.buffers:
            torch._foreach_copy_(self.kept, self.buffers)
        self._lay_out()

    def _lay_out(self) -> None:
        torch.manual_seed(self.seed)  # dropout and whatever else draws on the device
        self.to_do = deque(piece for batch in self.step for piece in batch.split(self.size))

    @contextmanager
    def fits(self, again: Callable[[], None]) -> Iterator[None]:
        """Around forward and backward of one piece. `again` forgets what this step has gathered elsewhere."""
        try:
            yield
        except torch.OutOfMemoryError:
            largest = max(len(batch.samples) for batch in self.step)
            if min(self.size, largest) <= self.whole:
                raise
            self._halve(largest)
            again()

    def _halve(self, largest: int) -> None:
        before = min(self.size, largest)
        self.size = max(self.whole, (before + 1) // 2 // self.whole * self.whole)
        self.module.zero_grad()
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.kept)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._lay_out()
        norm = active_batch_norm(self.module)
        print(
            f"out of memory: passes of {before} become passes of {self.size}, as many pictures a step as before"
            + (f"; batch norm ({norm}) sees {self.size} at a time from here on" if norm else ""),
            file=sys.stderr,
            flush=True,
        )


def active_batch_norm(module: nn.Module) -> str:
    """The first layer that normalises over the pictures of a pass; empty where there is none, or all are frozen."""
    found = (
        name
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats
    )
    return next(found, "")
