"""A forward pass over rows without gradients, shared by validation and inference."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from comp.data import sequential_batches
from comp.engine import hardware
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import UserError, joined
from comp.engine.run import distributed
from comp.engine.run.data_loader import Loader
from comp.engine.run.device import AMP_DTYPES
from comp.engine.store import paths
from comp.transforms import Preprocess

T = TypeVar("T")
View = Callable[[Tensor], Tensor]
Outputs = NDArray[np.float32]  # (views, rows, model outputs)
CPU_BATCH_BYTES = 10 * 2**20  # of one forward pass on a CPU: 17 RGB images of 224 px as float32


def identity(x: Tensor) -> Tensor:
    return x


@torch.inference_mode()
def forward_rows(
    module: nn.Module,
    loader: Loader,
    rows: Positions,
    batch_size: int,
    preprocess: Preprocess,
    amp: str,
    views: Sequence[View] = (identity,),
    on_batch: Callable[[int], object] = lambda count: None,
    parallel: int | None = None,
) -> tuple[Outputs, dict[int, str]]:
    """(views, rows, model outputs), and for each row with a damaged image the reason.

    When every process of a distributed training calls it, each computes a share of the rows and all get all
    of them. `parallel`: forward passes at the same time (default: 1 on a GPU, one a core on a CPU); it
    changes no result.
    """
    shared = distributed.is_collective()
    own_rows = rows[distributed.rank() :: distributed.world_size()] if shared else rows
    device = preprocess.normalize.device
    module.eval()
    if parallel is None:
        cpu_alone = device.type == "cpu" and not shared
        parallel = max(1, hardware.cores() // torch.get_num_threads()) if cpu_alone else 1
    networks = SimpleQueue[AutoBatch]()
    for replica in _replicas(module, parallel):
        networks.put(AutoBatch(replica, batch_size))
    damaged: dict[int, str] = {}

    @torch.inference_mode()
    def forward(view: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        network = networks.get()
        try:
            with torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "fp32"):
                return network(preprocess(view), extras).float()
        finally:
            networks.put(network)

    def calls() -> Iterator[Callable[[], tuple[int, Tensor]]]:
        for batch in loader.batches(sequential_batches(own_rows, batch_size)):
            damaged.update(batch.damaged)
            images = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2)
            extras = loader.extras(batch)
            for number, make_view in enumerate(views, 1):
                # Views transform the uint8 batch, so that it is decoded once. They run in this thread: the
                # ops of a recipe are not safe in several at a time.
                view, done = make_view(images), len(batch.samples) if number == len(views) else 0
                yield lambda view=view, extras=extras, done=done: (done, forward(view, extras))  # type: ignore[misc]

    outputs: list[Tensor] = []
    for done, output in _on_cpu(_in_order(calls(), parallel)):
        outputs.append(output)
        if done:
            on_batch(done)
    stacked = np.empty((len(views), 0, 0), np.float32)
    if outputs:
        stacked = torch.stack([torch.cat(outputs[i :: len(views)]) for i in range(len(views))]).numpy()
    if not shared:
        return stacked, damaged
    return _interleaved(len(rows), distributed.all_gather((stacked, damaged)))


def _replicas(module: nn.Module, count: int) -> list[nn.Module]:
    """The model and copies that share its weights. Attributes that a forward pass sets are separate."""
    weights = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return [module, *(copy.deepcopy(module, dict(weights)) for _ in range(count - 1))]


def _in_order(calls: Iterator[Callable[[], T]], parallel: int) -> Iterator[T]:
    """The results of the calls in their order, `parallel` of them running at a time; one runs in this
    thread."""
    if parallel == 1:
        yield from (call() for call in calls)
        return
    with ThreadPoolExecutor(parallel, "forward") as pool:
        running: deque[Future[T]] = deque()
        for call in calls:
            running.append(pool.submit(call))
            if len(running) > parallel:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _on_cpu(outputs: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Copied to the CPU one batch late, so that the GPU computes the next one meanwhile."""
    previous: tuple[int, Tensor] | None = None
    for following in outputs:
        if previous is not None:
            yield previous[0], previous[1].cpu()
        previous = following
    if previous is not None:
        yield previous[0], previous[1].cpu()


def _interleaved(count: int, parts: list[tuple[Outputs, dict[int, str]]]) -> tuple[Outputs, dict[int, str]]:
    """The rows of all processes in their original order."""
    views, _, width = parts[0][0].shape
    outputs = np.empty((views, count, width), np.float32)
    for rank, (part, _) in enumerate(parts):
        if part.size:
            outputs[:, rank :: len(parts)] = part
    return outputs, {row: reason for _, damaged in parts for row, reason in damaged.items()}


class AutoBatch:
    """A model that splits a batch into parts that fit into memory: out of memory halves them for the rest of
    the pass, down to one image.

    On a CPU the parts keep every activation below 32 MB, above which the C library asks the system for each
    block anew. Its pages must be zeroed first, which costs mobilenetv3 a fourth of its speed and efficientnet
    a fifth."""

    def __init__(self, module: nn.Module, size: int):
        self.module, self.size = module, size

    def __call__(self, images: Tensor, extras: Mapping[str, Tensor] | None = None) -> Tensor:
        if extras:  # several images a sample, or metadata: these do not split along the images
            out: Tensor = self.module(images, **extras)
            return out
        cpu = images.device.type == "cpu"
        while True:
            most = min(self.size, max(1, CPU_BATCH_BYTES // images[0].nbytes)) if cpu else self.size
            try:
                parts = images.tensor_split(-(-len(images) // most))
                return torch.cat([self.module(part) for part in parts])
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                self.size = (min(self.size, len(images)) + 1) // 2
            torch.cuda.empty_cache()


def raise_damaged(damaged: Mapping[int, str], samples: Samples) -> None:
    """Training never continues with a damaged image."""
    if damaged:
        ids = samples.frame["id"]
        raise joined(
            [
                UserError(
                    "image-damaged",
                    where=f"sample {ids.iloc[i]}",
                    what=reason,
                    remedy="comp check lists every such file",
                )
                for i, reason in damaged.items()
            ]
        )


def validate_finite(outputs: Outputs, weights: Path) -> None:
    if not np.isfinite(outputs).all():
        raise UserError(
            "not-finite",
            where=paths.relative(weights),
            what="the model outputs NaN or inf",
            remedy="train it again with a smaller optim.lr",
        )
