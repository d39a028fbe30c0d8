"""A forward pass over rows without gradients: what validation and inference share."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from comp.data import sequential_batches
from comp.engine import hardware
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import Refused
from comp.engine.run import distributed
from comp.engine.run.data_loader import Loader
from comp.transforms import Preprocess

T = TypeVar("T")
View = Callable[[Tensor], Tensor]
ON_A_CPU = 10 * 2**20  # bytes of a piece that goes through the network at a time: 17 RGB pictures of 224 px
HALF = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def plain(images: Tensor) -> Tensor:
    return images


@torch.inference_mode()
def forward_rows(
    module: nn.Module,
    loader: Loader,
    rows: Positions,
    batch_size: int,
    seen: Preprocess,
    amp: str,
    views: Sequence[View] = (plain,),
    on_batch: Callable[[int], object] = lambda count: None,
    at_once: int | None = None,
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """(views, rows, network outputs), and for each row whose picture is damaged the reason. Where all processes of a training
    ask for the same, each goes through its share of the rows, and all get all. `at_once`: views in the network at the same
    time; None is one on a GPU and one a core without: the same numbers sooner."""
    shared = distributed.is_collective()
    mine = rows[distributed.rank() :: distributed.world_size()] if shared else rows
    device = seen.normal.device
    module.eval()
    if at_once is None:
        alone = device.type == "cpu" and not shared
        at_once = max(1, hardware.cores() // torch.get_num_threads()) if alone else 1
    networks = SimpleQueue[AutoBatch]()
    for one in _side_by_side(module, at_once):
        networks.put(AutoBatch(one, batch_size))
    damaged: dict[int, str] = {}

    @torch.inference_mode()
    def forward(look: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        network = networks.get()
        try:
            with torch.autocast(device.type, HALF[amp], enabled=HALF[amp] is not None):
                return network(seen(look), extras).float()
        finally:
            networks.put(network)

    def calls() -> Iterator[Callable[[], tuple[int, Tensor]]]:
        for batch in loader.batches(sequential_batches(mine, batch_size)):
            damaged.update(batch.damaged)
            images = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2)
            extras = loader.extras(batch)
            for number, view in enumerate(views, 1):
                # Decoded once: the views turn the uint8 batch. In this thread, since a recipe draws for one at a time.
                look, done = view(images), len(batch.samples) if number == len(views) else 0
                yield lambda look=look, extras=extras, done=done: (done, forward(look, extras))  # type: ignore[misc]

    out: list[Tensor] = []
    for done, made in _landed(_in_order(calls(), at_once)):
        out.append(made)
        if done:
            on_batch(done)
    found = np.empty((len(views), 0, 0), np.float32)
    if out:
        found = torch.stack([torch.cat(out[view :: len(views)]) for view in range(len(views))]).numpy()
    if not shared:
        return found, damaged
    return _joined(len(rows), distributed.all_gather((found, damaged)))


def _side_by_side(module: nn.Module, count: int) -> list[nn.Module]:
    """The network and copies with the very same weights: what a forward notes down in itself stays its own."""
    weights = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return [module, *(copy.deepcopy(module, dict(weights)) for _ in range(count - 1))]


def _in_order(calls: Iterator[Callable[[], T]], at_once: int) -> Iterator[T]:
    """What the calls give, so many of them running; alone in this thread."""
    if at_once == 1:
        yield from (call() for call in calls)
        return
    with ThreadPoolExecutor(at_once, "forward") as pool:
        running: deque[Future[T]] = deque()
        for call in calls:
            running.append(pool.submit(call))
            if len(running) > at_once:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _landed(made: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """On the processor; each is fetched when the next is under way, so that a GPU always has something to do."""
    under_way: tuple[int, Tensor] | None = None
    for following in made:
        if under_way is not None:
            yield under_way[0], under_way[1].cpu()
        under_way = following
    if under_way is not None:
        yield under_way[0], under_way[1].cpu()


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


class AutoBatch:
    """A network in batches as large as fit: out of memory halves them for the rest of the pass, down to single pictures. On a CPU
    what fits is a piece whose layers stay below the 32 MB from which C's library asks the system for every block anew: the
    pages of those, all of them to be filled with zeros first, cost mobilenetv3 a fourth of its speed and efficientnet a fifth."""

    def __init__(self, module: nn.Module, size: int):
        self.module, self.size = module, size

    def __call__(self, images: Tensor, extras: Mapping[str, Tensor] | None = None) -> Tensor:
        if extras:  # several images of a sample, or metadata: they cannot be parted picture by picture
            out: Tensor = self.module(images, **extras)
            return out
        cpu = images.device.type == "cpu"
        while True:
            most = min(self.size, max(1, ON_A_CPU // images[0].nbytes)) if cpu else self.size
            try:
                parts = images.tensor_split(-(-len(images) // most))
                return torch.cat([self.module(part) for part in parts])
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                self.size = (min(self.size, len(images)) + 1) // 2
            torch.cuda.empty_cache()


def raise_damaged(damaged: Mapping[int, str], samples: Samples) -> None:
    """Half an image never teaches: training stops at the first damaged file and names it."""
    if damaged:
        ids = samples.frame["id"]
        raise Refused(
            *(
                f"sample {ids.iloc[i]}: {reason}; comp check lists every such file"
                for i, reason in damaged.items()
            )
        )
