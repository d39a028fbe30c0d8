"""From the samples table to uint8 batches. One feed serves every fold, training and inference, so it is opened once.

The random draws of a sample are a function of (seed, epoch, position in the epoch's list of draws) and of nothing else:
not of worker count, thread, resume point or machine load. The list itself is a function of (seed, epoch).

Three ways lead to the same pixels. Which one is taken follows from the recipe and from what fits, and changes no result:
  processes  the recipe holds albumentations, which keep Python's lock
  threads    every sample op is one of train/native.py: no copies between processes, nothing to start
  resident   no sample op at all, and the set fits into machine.gpu_cache_mb: the pictures lie on the device
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from comp import transforms
from comp.engine.config.schema import Config
from comp.engine.data import cache, class_balance
from comp.engine.data.samples import Positions, Samples
from comp.engine.data.seeding import fold_in
from comp.engine.data.workers import AHEAD, WorkerPool
from comp.engine.errors import Refused
from comp.engine.readers.arrays import DamagedImage, Pixels
from comp.engine.run import tabular
from comp.engine.run.gpu_augment import to_device


class Index(NamedTuple):
    """One sample of one batch. seed None: as it is, not augmented."""

    sample: int
    seed: int | None
    day: transforms.EpochAugment | None = None  # None: as on the last one, at full size


@dataclass(frozen=True)
class Batch:
    samples: Positions
    images: torch.Tensor  # (images, height, width, channels), uint8 or what data.depth says
    seeds: NDArray[np.int64] | None  # one an image
    damaged: dict[int, str]  # sample -> reason; their pictures are black
    owner: torch.Tensor | None = (
        None  # (images,) which of `samples` each belongs to; None: one image a sample
    )

    def pin_memory(self) -> Batch:
        return replace(self, images=self.images.pin_memory())

    def to(self, device: torch.device) -> Batch:
        owner = None if self.owner is None else self.owner.to(device, non_blocking=True)
        return replace(self, images=self.images.to(device, non_blocking=True), owner=owner)

    def cut(self, size: int) -> Iterator[Batch]:
        """The same samples in pieces of at most `size`."""
        if len(self.samples) <= size:
            yield self
            return
        for start in range(0, len(self.samples), size):
            part = slice(start, start + size)
            mine: Any = part
            if self.owner is not None:
                mine = ((self.owner >= start) & (self.owner < start + size)).cpu()
            yield Batch(
                self.samples[part],
                self.images[mine],
                None
                if self.seeds is None
                else self.seeds[np.asarray(mine) if self.owner is not None else part],
                {},
                None if self.owner is None else self.owner[mine] - start,
            )


Batches = Iterable[list[Index]]


def epoch_rows(
    rows: Positions, seed: int, epoch: int, draw: class_balance.Sampler = class_balance.shuffle
) -> Positions:
    """Which samples an epoch draws, in which order. An oversampled one may stand in it several times."""
    return draw(rows, np.random.Generator(np.random.PCG64(fold_in(seed, epoch, 1))))


def training_batches(
    rows: Positions,
    size: int,
    seed: int,
    epoch: int,
    first: int,
    draw: class_balance.Sampler = class_balance.shuffle,
) -> Iterator[list[Index]]:
    """The epoch's micro-batches from number `first` on; a remainder smaller than a batch is left out."""
    drawn = epoch_rows(rows, seed, epoch, draw)
    size = min(size, len(drawn))
    for start in range(first * size, len(drawn) - size + 1, size):
        seeds = fold_in(seed, epoch, 2, spread=np.arange(start, start + size))
        yield [
            Index(sample, own)
            for sample, own in zip(drawn[start : start + size].tolist(), seeds.tolist(), strict=True)
        ]


def sequential_batches(rows: Positions, size: int) -> Iterator[list[Index]]:
    for start in range(0, len(rows), size):
        yield [Index(row, None) for row in rows[start : start + size].tolist()]


Loaded = tuple[Index, list[Pixels], str]


class ImageDataset(Dataset[Any]):
    """Every sample's pictures, decoded to size by the cache or on the fly: the same pixels either way."""

    def __init__(
        self, cfg: Config, images: cache.Images, listed: NDArray[np.int64], start: NDArray[np.int64]
    ):
        self.size, self.channels = cfg.data.size, cfg.data.channels
        self.images = images
        self.listed, self.start = listed, start  # images of sample s: listed[start[s] : start[s + 1]]
        self.image_of_sample = listed[start[:-1]]  # its first
        # One for each kind of day; what a draw does not say is as on the last.
        kinds = transforms.epoch_augments(cfg)
        self.augment = {
            day: transforms.Augment(transforms.epoch_recipe(cfg, day), day.size, day.size / self.size)
            for day in kinds
        }
        self.last = kinds[-1]

    def __getitem__(self, draw: Index) -> Loaded:
        seen: list[Pixels] = []
        reason = ""
        for number, index in enumerate(
            self.listed[self.start[draw.sample] : self.start[draw.sample + 1]].tolist()
        ):
            try:
                image = self.images[index]
            except DamagedImage as damaged:
                # An exception would lose its type on the way out of a loader process; the reader decides what it means.
                reason = str(damaged)
                side = (draw.day or self.last).size if draw.seed is not None else self.size
                seen.append(np.zeros((side, side, self.channels), self.images.reader.dtype))
                continue
            seed = image_seed(draw.seed, number)
            if seed is None:
                seen.append(transforms.center_crop(image, self.size))
            else:
                seen.append(self.augment[draw.day or self.last](image, seed))
        return draw, seen, reason

    def batch(self, draws: list[Index]) -> Batch:
        return collate([self[draw] for draw in draws])


def image_seed(seed: int | None, number: int) -> int | None:
    """The images of a sample are augmented each in its own way."""
    return seed if seed is None or number == 0 else fold_in(seed, number)


def collate(items: Sequence[Loaded]) -> Batch:
    seen = [
        (place, number, image)
        for place, (_, images, _) in enumerate(items)
        for number, image in enumerate(images)
    ]
    images = np.stack([image for _, _, image in seen])
    draws = [draw for draw, _, _ in items]
    seeds = None
    if draws[0].seed is not None:
        seeds = np.array([image_seed(draws[place].seed, number) for place, number, _ in seen], np.int64)
    return Batch(
        np.array([draw.sample for draw in draws], np.int64),
        torch.from_numpy(images),
        seeds,
        {draw.sample: reason for draw, _, reason in items if reason},
        torch.tensor([place for place, _, _ in seen]) if len(seen) > len(items) else None,
    )


class Loader:
    """The loader of a process. Workers stay alive over epochs and folds; the plan says what they read next."""

    def __init__(self, cfg: Config, samples: Samples, device: torch.device):
        paths = samples.frame["images"].map(lambda images: images[: cfg.data.images])
        start = np.concatenate([[0], np.cumsum(paths.map(len).to_numpy())]).astype(np.int64)
        codes, unique = paths.explode().factorize()
        opened = cache.open_images(cfg, list(unique), cfg.machine.progress)
        self.images = ImageDataset(cfg, opened, codes.astype(np.int64), start)
        self.multi_image = samples.multi_image and cfg.data.images > 1
        if len(codes) > len(paths) and not self.multi_image:
            raise Refused(
                "some samples have several images, and the networks were trained on one each; data.images=1 takes the first"
            )
        self.metadata = tabular.encode_metadata(samples, device) if cfg.model.metadata else None
        self.cfg, self.device = cfg, device
        self.resident = GpuCache(self.images, device, cfg.machine.gpu_cache_mb * 10**6)

    def extras(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What the network takes beside the pictures: whose they are, and the metadata of the samples."""
        out = {} if batch.owner is None else {"owner": batch.owner.to(self.device, non_blocking=True)}
        if self.metadata is not None:
            out["metadata"] = self.metadata[to_device(batch.samples, self.device)]
        return out

    def batches(self, plan: Batches, day: transforms.EpochAugment | None = None) -> Iterator[Batch]:
        """Batches on their way to the device, one copied ahead of the one in use. `day`: what augments those with a seed."""
        if day is not None:
            plan = ([draw._replace(day=day) for draw in draws] for draws in plan)
        if self.resident.possible:
            return self.resident.batches(plan)
        return prefetched(self._loaded(plan), self.device)

    def _loaded(self, plan: Batches) -> Iterator[Batch]:
        if self.cfg.machine.num_workers == 0:
            return map(self.images.batch, plan)
        if all(change.threads for change in self.images.augment.values()):
            return self._by_threads(plan)
        return self.processes.batches(plan)

    def _by_threads(self, plan: Batches) -> Iterator[Batch]:
        pinned = self.device.type == "cuda"

        def load(draws: list[Index]) -> Batch:
            batch = self.images.batch(draws)
            return batch.pin_memory() if pinned else batch

        waiting: deque[Any] = deque()
        for draws in plan:
            waiting.append(self.pool.submit(load, draws))
            if len(waiting) > AHEAD * self.cfg.machine.num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        cv2.setNumThreads(0)
        return ThreadPoolExecutor(self.cfg.machine.num_workers, "pictures")

    @cached_property
    def processes(self) -> WorkerPool[list[Index], Batch]:
        return WorkerPool(self.images, collate, self.cfg.machine.num_workers, self.device.type == "cuda")


def prefetched(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """On a GPU, the next batch is copied on a stream of its own while this one is computed on."""
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    ready: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            coming = batch.to(device)
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(side)
        coming.images.record_stream(torch.cuda.current_stream(device))
        ready = coming
    if ready is not None:
        yield ready


class GpuCache:
    """The whole set on the device. Read there once, at first use; a batch is then one gather."""

    def __init__(self, images: ImageDataset, device: torch.device, room: int):
        side = images.size
        size = (
            len(images.images) * side * side * images.channels * np.dtype(images.images.reader.dtype).itemsize
        )
        self.possible = (
            not any(change.steps or change.size != side for change in images.augment.values())
            and size <= room
            and len(images.listed) == len(images.image_of_sample)
        )
        self.images, self.device = images, device
        self.damaged: dict[int, str] = {}

    @cached_property
    def tensor(self) -> torch.Tensor:
        """(images, height, width, channels)"""
        first = {
            int(index): sample for sample, index in reversed(list(enumerate(self.images.image_of_sample)))
        }
        parts = []
        for start in range(0, len(first), 1024):
            part = self.images.batch(
                [Index(first[i], None) for i in range(start, min(start + 1024, len(first)))]
            )
            self.damaged |= {
                int(self.images.image_of_sample[s]): reason for s, reason in part.damaged.items()
            }
            parts.append(part.images)
        return torch.cat(parts).to(self.device)

    def batches(self, plan: Batches) -> Iterator[Batch]:
        for draws in plan:
            rows = np.array([draw.sample for draw in draws], np.int64)
            index = self.images.image_of_sample[rows]
            images = self.tensor[to_device(index, self.device)]
            seeds = None if draws[0].seed is None else np.array([draw.seed for draw in draws], np.int64)
            broken = {
                int(r): self.damaged[int(i)]
                for r, i in zip(rows, index, strict=True)
                if int(i) in self.damaged
            }
            yield Batch(rows, images, seeds, broken)
