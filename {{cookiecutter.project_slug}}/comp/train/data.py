"""From the samples table to uint8 batches. One feed serves every fold, training and inference, so workers start once.

The random draws of a sample are a function of (seed, epoch, position in the epoch's list of draws) and of nothing else:
not of worker count, resume point or machine load. The list itself is a function of (seed, epoch).
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from comp.config import Config
from comp.prepare import cache
from comp.prepare.images import Damaged
from comp.samples import Positions, Samples
from comp.train import augment


class Draw(NamedTuple):
    """One sample of one batch. seed None: as it is, not augmented."""

    sample: int
    seed: int | None


@dataclass(frozen=True)
class Batch:
    samples: Positions
    pictures: torch.Tensor  # (batch, height, width, channels), uint8
    damaged: dict[int, str]  # sample -> reason; their pictures are black

    def pin_memory(self) -> Batch:
        return Batch(self.samples, self.pictures.pin_memory(), self.damaged)


def mixed(*numbers: int, spread: NDArray[np.int64] | None = None) -> Any:
    """Well-mixed 63-bit numbers from small ones (splitmix64), so that neighbouring seeds have nothing in common.

    `spread` mixes in one more number each: an array in, an array out.
    """
    state = np.zeros(1, np.uint64)
    for number in [*map(np.uint64, numbers), *([] if spread is None else [spread.astype(np.uint64)])]:
        state = (state ^ number) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    state >>= np.uint64(1)
    return int(state[0]) if spread is None else state.astype(np.int64)


def epoch_list(rows: Positions, seed: int, epoch: int) -> Positions:
    """Which samples an epoch draws, in which order. An oversampled one may stand in it several times."""
    return np.random.Generator(np.random.PCG64(mixed(seed, epoch, 1))).permutation(rows)


def training_batches(rows: Positions, size: int, seed: int, epoch: int, first: int) -> Iterator[list[Draw]]:
    """The epoch's micro-batches from number `first` on; a remainder smaller than a batch is left out."""
    drawn = epoch_list(rows, seed, epoch)
    size = min(size, len(drawn))
    for start in range(first * size, len(drawn) - size + 1, size):
        positions = np.arange(start, start + size)
        seeds = mixed(seed, epoch, 2, spread=positions)
        yield [Draw(sample, own) for sample, own in zip(drawn[positions].tolist(), seeds.tolist(), strict=True)]


def plain_batches(rows: Positions, size: int) -> Iterator[list[Draw]]:
    for start in range(0, len(rows), size):
        yield [Draw(row, None) for row in rows[start : start + size].tolist()]


class Pictures(Dataset[Any]):
    """Every sample's picture, decoded to size by the cache or on the fly: the same pixels either way."""

    def __init__(self, cfg: Config, images: cache.Images, image_of_sample: NDArray[np.int64]):
        self.size = cfg.data.size
        self.images = images
        self.image_of_sample = image_of_sample
        self.augment = augment.Augment(augment.named(cfg), self.size)

    def __getitem__(self, draw: Draw) -> tuple[int, augment.Picture | None, str]:
        try:
            picture = self.images[int(self.image_of_sample[draw.sample])]
        except Damaged as damaged:
            # An exception would lose its type on the way out of a loader process; the reader decides what it means.
            return draw.sample, None, str(damaged)
        if draw.seed is None:
            return draw.sample, augment.centred(picture, self.size), ""
        return draw.sample, self.augment(picture, draw.seed), ""


class Feed:
    """The loader of a process. Workers stay alive over epochs and folds; `batches` says what they read next."""

    def __init__(self, cfg: Config, samples: Samples, device: torch.device):
        paths = samples.frame["images"]
        several = np.flatnonzero(paths.map(len).to_numpy() != 1)
        assert not len(several), f"sample {samples.frame['id'].iloc[several[0]]} has several images"
        first = paths.map(lambda images: images[0])
        codes, unique = first.factorize()
        self.pictures = Pictures(cfg, cache.open_images(cfg, list(unique), cfg.machine.progress), codes.astype(np.int64))
        self.plan: Iterable[list[Draw]] = ()
        workers = cfg.machine.workers
        self.loader: DataLoader[Any] = DataLoader(
            self.pictures,
            batch_sampler=_Plan(self),
            num_workers=workers,
            collate_fn=_stacked,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_one_thread,
        )

    def batches(self, plan: Iterable[list[Draw]]) -> Iterator[Batch]:
        self.plan = plan
        return iter(self.loader)


class _Plan:
    """A batch sampler whose batches are set from outside, so that one DataLoader can read anything."""

    def __init__(self, feed: Feed):
        self.feed = feed

    def __iter__(self) -> Iterator[list[Draw]]:
        return iter(self.feed.plan)


def _stacked(items: Sequence[tuple[int, augment.Picture | None, str]]) -> Batch:
    shape = next((p.shape for _, p, _ in items if p is not None), None)
    pictures = [np.zeros(shape or (1, 1, 1), np.uint8) if p is None else p for _, p, _ in items]
    return Batch(
        np.array([sample for sample, _, _ in items], np.int64),
        torch.from_numpy(np.stack(pictures)),
        {sample: reason for sample, _, reason in items if reason},
    )


def _one_thread(worker: int) -> None:
    """OpenCV starts a pool in every worker otherwise, and they fight for two cores."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the whole group: the trainer decides when to stop
