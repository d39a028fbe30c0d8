"""A step computed in micro-batches as large as memory allows.

A step has grad_accum_steps batches. A micro-batch is a batch, or a part of one once memory ran out: then its
size is halved and the step computed again, with the same images and the same augmentation. The batch size of
the optimizer step does not change. Two things do: dropout masks, and batch norm, which normalizes over a
micro-batch; its running statistics are restored before the step is repeated.
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
    """`size`: most samples in a forward pass; part of the training state, so that a resumed run gives the
    same numbers. `group_size`: neighboring samples that stay in one micro-batch (views, mixup pairs,
    mosaics)."""

    def __init__(self, module: nn.Module, size: int, group_size: int = 1):
        self.module, self.size, self.group_size = module, size, group_size
        layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self.bn_buffers = [buffer for layer in layers for buffer in layer.buffers()]
        self.saved_buffers = [buffer.clone() for buffer in self.bn_buffers]
        self.batches: list[Batch] = []  # of the current step
        self.seed = 0
        self.pending: deque[Batch] = deque()  # micro-batches of the current step still to be computed

    def start_step(self, batches: Iterable[Batch], seed: int) -> None:
        self.batches, self.seed = list(batches), seed
        if self.bn_buffers:
            torch._foreach_copy_(self.saved_buffers, self.bn_buffers)
        self._split()

    def _split(self) -> None:
        torch.manual_seed(self.seed)  # dropout and other draws on the device
        self.pending = deque(piece for batch in self.batches for piece in batch.split(self.size))

    @contextmanager
    def retry_on_oom(self, restart_step: Callable[[], None]) -> Iterator[None]:
        """Around forward and backward of one micro-batch. `restart_step` discards what the caller recorded of
        this step."""
        try:
            yield
        except torch.OutOfMemoryError:
            largest = max(len(batch.samples) for batch in self.batches)
            if min(self.size, largest) <= self.group_size:
                raise
            self._halve(largest)
            restart_step()

    def _halve(self, largest: int) -> None:
        before = min(self.size, largest)
        self.size = max(self.group_size, (before + 1) // 2 // self.group_size * self.group_size)
        self.module.zero_grad()
        if self.bn_buffers:
            torch._foreach_copy_(self.bn_buffers, self.saved_buffers)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._split()
        layer = active_batch_norm(self.module)
        print(
            f"out of memory: micro-batch size {before} is halved to {self.size}; "
            "the batch size of a step stays the same"
            + (f"; batch norm ({layer}) now normalizes over {self.size} images" if layer else ""),
            file=sys.stderr,
            flush=True,
        )


def active_batch_norm(module: nn.Module) -> str:
    """Name of the first batch norm in training mode; empty if there is none, or all are frozen."""
    names = (
        name
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats
    )
    return next(names, "")
