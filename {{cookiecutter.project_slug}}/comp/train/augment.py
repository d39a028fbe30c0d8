"""Augmentation recipes: plain functions by name, each three lists. `augment.recipe` in a config names one of them.

geometry  moves pixels, ends in a square of `size`
colour    changes them
batch     comes after normalising

What an op is decides where it runs, on every machine: any albumentations transform in loader processes; a function of
train/native.py on a sample, in threads; one of train/device.py on the batch, on the device. A sample leaves the loader as
uint8, always. To have your own: define `recipe(size)` in comp/competition.py and set `augment.recipe: recipe`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from random import Random
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before the import: it would go online
import albumentations as A
import cv2
import numpy as np
import torch

from comp import own
from comp.config import Config, Refused, nearest
from comp.train import device, native
from comp.train.device import OnBatch, Seeds
from comp.train.draws import mixed
from comp.train.native import Picture


@dataclass(frozen=True)
class Recipe:
    geometry: list[Any]
    colour: list[Any] = field(default_factory=list)
    batch: list[OnBatch] = field(default_factory=list)

    @property
    def on_sample(self) -> list[Any]:
        return [op for op in [*self.geometry, *self.colour] if not isinstance(op, OnBatch)]

    @property
    def on_batch(self) -> list[OnBatch]:
        return [op for op in [*self.geometry, *self.colour] if isinstance(op, OnBatch)]


def none(size: int) -> Recipe:
    return Recipe([])


def light(size: int) -> Recipe:
    """Small shifts and turns only: safe where left and right differ, as in digits or scans."""
    return Recipe([
        A.Affine(scale=(0.9, 1.1), translate_percent=0.08, rotate=(-12, 12), p=0.8),
        A.RandomCrop(size, size),
    ])  # fmt: skip


def medium(size: int) -> Recipe:
    """Crops, mirror images and mild colour: the default for photographs."""
    return Recipe(
        [A.RandomResizedCrop((size, size), scale=(0.5, 1.0), ratio=(0.8, 1.25)), A.HorizontalFlip()],
        [A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02, p=0.8)],
    )


def heavy(size: int) -> Recipe:
    """Everything that leaves the object recognisable; for long schedules and large networks."""
    return Recipe(
        [
            A.RandomResizedCrop((size, size), scale=(0.3, 1.0), ratio=(0.75, 1.33)),
            A.HorizontalFlip(),
            A.Affine(rotate=(-20, 20), shear=(-8, 8), p=0.5),
            A.CoarseDropout(
                num_holes_range=(1, 4), hole_height_range=(0.1, 0.25), hole_width_range=(0.1, 0.25), p=0.5
            ),
        ],
        [
            A.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05, p=0.8),
            A.OneOf([A.GaussianBlur(), A.GaussNoise(), A.Sharpen()], p=0.3),
        ],
    )


def fast(size: int) -> Recipe:
    """Like medium, with crops in threads and colour on the device: for when the loader is what the GPU waits for."""
    return Recipe([native.crop(size), native.mirror()], [device.jitter()])


def resident(size: int) -> Recipe:
    """Like light, all of it on the device: a small set then lives there altogether and nothing is loaded at all."""
    return Recipe([device.affine()])


RECIPES = {recipe.__name__: recipe for recipe in (none, light, medium, heavy, fast, resident)}


def named(cfg: Config) -> Recipe:
    name = cfg.augment.recipe
    make = own.get("recipe") if name == "recipe" else RECIPES.get(name)
    if make is None:
        missing = (
            "comp/competition.py defines no recipe(size)" if name == "recipe" else "there is no such recipe"
        )
        raise Refused(f"augment.recipe: {name!r}: {missing}; the nearest is {nearest(name, RECIPES)[0]}")
    with warnings.catch_warnings():
        # A wrong argument is only a warning for albumentations, and the transform would run with its defaults.
        warnings.simplefilter("error", UserWarning)
        try:
            recipe = make(cfg.data.size)
        except UserWarning as warning:
            raise Refused(f"augment.recipe: {name}: {warning}") from None
    assert isinstance(recipe, Recipe), f"{name} must return a Recipe"
    return recipe


class Augment:
    """A recipe's sample ops as one function of (picture, seed): the same seed, the same bytes, in whichever process."""

    def __init__(self, recipe: Recipe, size: int):
        self.size = size
        self.steps = [
            _step(kind, list(ops))
            for kind, ops in groupby(
                recipe.on_sample, lambda op: isinstance(op, A.BasicTransform | A.BaseCompose)
            )
        ]
        self.threads = not any(isinstance(op, A.BasicTransform | A.BaseCompose) for op in recipe.on_sample)

    def __call__(self, picture: Picture, seed: int) -> Picture:
        if not self.steps:
            return centred(picture, self.size)
        for number, step in enumerate(self.steps):
            picture = step(picture, mixed(seed, number))
        assert picture.dtype == np.uint8, (
            "a recipe must hand over uint8; normalising is the first line of the step"
        )
        if picture.shape[:2] != (self.size, self.size):
            raise Refused(
                f"augment.recipe: ends in {picture.shape[1]} x {picture.shape[0]} px, not in data.size {self.size}"
            )
        return picture.reshape(self.size, self.size, -1)


def _step(albumentations: bool, ops: list[Any]) -> Callable[[Picture, int], Picture]:
    if not albumentations:

        def ours(picture: Picture, seed: int) -> Picture:
            random = Random(seed)
            for op in ops:
                picture = op(picture, random)
            return picture

        return ours
    chain = A.Compose(ops)

    def theirs(picture: Picture, seed: int) -> Picture:
        chain.set_random_seed(
            seed % 2**32
        )  # inside loader processes it repeats its draws unless seeded before each call
        return chain(image=np.array(picture))["image"]  # a copy: the cache is read-only

    return theirs


def centred(picture: Picture, size: int) -> Picture:
    """What validation and inference see: the middle square of `size`, with all of the picture that fits."""
    height, width = picture.shape[:2]
    if (height, width) == (size, size):
        return picture
    scale = size / min(height, width)
    if scale != 1:
        shape = (max(size, round(width * scale)), max(size, round(height * scale)))
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        channels = picture.shape[2] if picture.ndim == 3 else 1
        parts = [
            cv2.resize(picture.reshape(height, width, -1)[:, :, at : at + 4], shape, interpolation=how)
            for at in range(0, channels, 4)  # OpenCV knows four at most
        ]
        wide = (
            parts[0] if len(parts) == 1 else np.concatenate([p.reshape(*shape[::-1], -1) for p in parts], 2)
        )
        picture = wide.astype(np.uint8, copy=False)
        height, width = picture.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return picture[top : top + size, left : left + size].reshape(size, size, -1)


class Seen:
    """From a uint8 batch to what the network sees: the device's share of the recipe around normalising."""

    def __init__(self, normal: tuple[torch.Tensor, torch.Tensor], recipe: Recipe | None = None):
        self.mean, self.std = normal
        self.before = recipe.on_batch if recipe else []
        self.after = recipe.batch if recipe else []

    def __call__(self, pictures: torch.Tensor, seeds: Seeds | None = None) -> torch.Tensor:
        """(batch, channels, height, width), uint8 -> float"""
        x = pictures.to(self.mean.device, non_blocking=True).float()
        if seeds is None:
            return (x - self.mean) / self.std
        if self.before:
            x = x / 255
            for op in self.before:
                x = op(x, seeds)
            x = x * 255
        x = (x - self.mean) / self.std
        for op in self.after:
            x = op(x, seeds)
        return x
