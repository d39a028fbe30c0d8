"""From rows of the samples table to uint8 batches: which rows an epoch draws, and how one example is made.

The random draws of an example are a function of (seed, epoch, position in the epoch's list of rows) and of
nothing else: not of the number of workers, the thread, the step where a run resumes or the load of the
machine. The list itself is a function of (seed, epoch). engine/run/data_loader.py reads these batches in
processes or threads, or keeps the whole set on the GPU; all of them give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from comp import transforms
from comp.engine.config.schema import Config
from comp.engine.data import cache, class_balance
from comp.engine.data.samples import Positions
from comp.engine.data.seeding import derive_seed
from comp.engine.readers.arrays import DamagedImage, Pixels
from comp.engine.run import cv2_ops


class Index(NamedTuple):
    """What dataset[index] takes: a row of the samples table and how to augment it."""

    sample: int
    seed: int | None  # None: not augmented
    epoch_augment: transforms.EpochAugment | None = None  # None: as in the last epoch, at full size


@dataclass(frozen=True)
class Batch:
    samples: Positions  # (batch,) rows of the samples table
    images: torch.Tensor  # (images, height, width, channels), uint8 or the dtype of data.bit_depth
    seeds: NDArray[np.int64] | None  # (images,)
    damaged: dict[int, str]  # sample -> reason; the images of such a sample are black
    owner: torch.Tensor | None = None  # (images,) index into `samples`; None: one image a sample

    def pin_memory(self) -> Batch:
        return replace(self, images=self.images.pin_memory())

    def to(self, device: torch.device) -> Batch:
        owner = None if self.owner is None else self.owner.to(device, non_blocking=True)
        return replace(self, images=self.images.to(device, non_blocking=True), owner=owner)

    def split(self, size: int) -> Iterator[Batch]:
        """The same samples in micro-batches of at most `size`. Images of one sample stay together."""
        if len(self.samples) <= size:
            yield self
            return
        for start in range(0, len(self.samples), size):
            part = slice(start, start + size)
            images: Any = part
            if self.owner is not None:
                images = ((self.owner >= start) & (self.owner < start + size)).cpu()
            seeds = self.seeds
            if seeds is not None:
                seeds = seeds[part if self.owner is None else np.asarray(images)]
            owner = None if self.owner is None else self.owner[images] - start
            yield Batch(self.samples[part], self.images[images], seeds, {}, owner)


# --- samplers -----------------------------------------------------------------------------------------------

Batches = Iterable[list[Index]]  # a batch sampler, as torch calls it: one list an item


def epoch_rows(
    rows: Positions, seed: int, epoch: int, draw: class_balance.Sampler = class_balance.shuffle
) -> Positions:
    """The rows of an epoch in their order. Oversampling repeats some of them."""
    return draw(rows, np.random.Generator(np.random.PCG64(derive_seed(seed, epoch, 1))))


def training_batches(
    rows: Positions,
    size: int,
    seed: int,
    epoch: int,
    first: int,
    draw: class_balance.Sampler = class_balance.shuffle,
) -> Iterator[list[Index]]:
    """The batches of an epoch from the `first` on, grad_accum_steps of them a step. A last batch smaller than `size` is dropped; a
    dataset smaller than `size` is one batch."""
    drawn = epoch_rows(rows, seed, epoch, draw)
    size = min(size, len(drawn))
    for start in range(first * size, len(drawn) - size + 1, size):
        seeds = derive_seed(seed, epoch, 2, spread=np.arange(start, start + size))
        yield [
            Index(sample, image_seed)
            for sample, image_seed in zip(drawn[start : start + size].tolist(), seeds.tolist(), strict=True)
        ]


def sequential_batches(rows: Positions, size: int) -> Iterator[list[Index]]:
    """Every row once, in order and not augmented: validation and inference."""
    for start in range(0, len(rows), size):
        yield [Index(row, None) for row in rows[start : start + size].tolist()]


# --- examples -----------------------------------------------------------------------------------------------

Example = tuple[Index, list[Pixels], str]  # images of the sample, and why one of them is damaged, or ""


class ImageDataset(Dataset[Any]):
    """The images of every sample, resized to data.size and augmented. Whether they come from the cache or are
    decoded now changes no pixel."""

    def __init__(
        self, cfg: Config, images: cache.Images, image_of: NDArray[np.int64], start: NDArray[np.int64]
    ):
        self.size, self.channels = cfg.data.size, cfg.data.channels
        self.images = images
        # sample s has the images image_of[start[s] : start[s + 1]]
        self.image_of, self.start = image_of, start
        self.first_image = image_of[start[:-1]]  # (samples,)
        # One for each kind of epoch: some are smaller, the last ones may be without the strong ops.
        kinds = transforms.epoch_augments(cfg)
        self.augment = {
            epoch_augment: transforms.Augment(
                transforms.epoch_recipe(cfg, epoch_augment),
                epoch_augment.size,
                epoch_augment.size / self.size,
            )
            for epoch_augment in kinds
        }
        self.last = kinds[-1]

    def __getitem__(self, index: Index) -> Example:
        """One example: its images, each (size, size, channels)."""
        images: list[Pixels] = []
        reason = ""
        augment = self.augment[index.epoch_augment or self.last]
        listed = self.image_of[self.start[index.sample] : self.start[index.sample + 1]]
        for number, image_index in enumerate(listed.tolist()):
            seed = image_seed(index.seed, number)
            try:
                image = self.images[image_index]
            except DamagedImage as damaged:
                # An exception would lose its type between loader processes. Training refuses it, inference
                # goes on.
                reason = str(damaged)
                side = self.size if seed is None else augment.size
                images.append(np.zeros((side, side, self.channels), self.images.reader.dtype))
                continue
            images.append(cv2_ops.center_crop(image, self.size) if seed is None else augment(image, seed))
        return index, images, reason

    def batch(self, indices: list[Index]) -> Batch:
        return collate([self[index] for index in indices])


def image_seed(seed: int | None, number: int) -> int | None:
    """The seed of the image `number` of a sample: each is augmented on its own."""
    return seed if seed is None or number == 0 else derive_seed(seed, number)


def collate(examples: Sequence[Example]) -> Batch:
    images = [
        (place, number, image)
        for place, (_, sample_images, _) in enumerate(examples)
        for number, image in enumerate(sample_images)
    ]
    indices = [index for index, _, _ in examples]
    seeds = None
    if indices[0].seed is not None:
        seeds = np.array([image_seed(indices[place].seed, number) for place, number, _ in images], np.int64)
    return Batch(
        np.array([index.sample for index in indices], np.int64),
        torch.from_numpy(np.stack([image for _, _, image in images])),
        seeds,
        {index.sample: reason for index, _, reason in examples if reason},
        torch.tensor([place for place, _, _ in images]) if len(images) > len(examples) else None,
    )
