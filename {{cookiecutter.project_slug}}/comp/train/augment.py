"""Augmentation recipes: plain functions by name, each three lists. `augment.recipe` in a config names one of them.

geometry  for each sample, uint8 in and out, ends in a square of `size`
colour    for each sample, uint8 in and out
batch     for each batch on the device, after normalising: (batch, generator) -> batch

A sample leaves the loader as uint8, always. To have your own: define `recipe(size)` in comp/competition.py and set
`augment.recipe: recipe`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before the import: it would go online
import albumentations as A
import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from comp import own
from comp.config import Config, Refused, nearest

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Recipe:
    geometry: list[Any]
    colour: list[Any] = field(default_factory=list)
    batch: list[Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = field(default_factory=list)


def none(size: int) -> Recipe:
    return Recipe([A.RandomCrop(size, size)])


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
            A.CoarseDropout(num_holes_range=(1, 4), hole_height_range=(0.1, 0.25), hole_width_range=(0.1, 0.25), p=0.5),
        ],
        [
            A.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05, p=0.8),
            A.OneOf([A.GaussianBlur(), A.GaussNoise(), A.Sharpen()], p=0.3),
        ],
    )


RECIPES = {recipe.__name__: recipe for recipe in (none, light, medium, heavy)}


def named(cfg: Config) -> Recipe:
    name = cfg.augment.recipe
    make = own.get("recipe") if name == "recipe" else RECIPES.get(name)
    if make is None:
        missing = "comp/competition.py defines no recipe(size)" if name == "recipe" else "there is no such recipe"
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
    """A recipe's sample lists as one function of (picture, seed): the same seed, the same bytes, in whichever process."""

    def __init__(self, recipe: Recipe, size: int):
        self.size = size
        self.chain = A.Compose([*recipe.geometry, *recipe.colour])

    def __call__(self, picture: Picture, seed: int) -> Picture:
        # Inside loader processes albumentations repeats its draws unless it is seeded before each call.
        self.chain.set_random_seed(seed)
        picture = self.chain(image=covered(picture, self.size))["image"]
        assert picture.dtype == np.uint8, "a recipe must hand over uint8; normalising is the first line of the step"
        if picture.shape[:2] != (self.size, self.size):
            raise Refused(f"augment.recipe: ends in {picture.shape[1]} x {picture.shape[0]} px, not in data.size {self.size}")
        return picture.reshape(self.size, self.size, -1)


def centred(picture: Picture, size: int) -> Picture:
    """What validation and inference see: the middle square of `size`, with all of the picture that fits."""
    height, width = picture.shape[:2]
    if (height, width) == (size, size):
        return picture
    scale = size / min(height, width)
    if scale != 1:
        shape = (max(size, round(width * scale)), max(size, round(height * scale)))
        picture = cv2.resize(picture, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        height, width = picture.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return picture[top : top + size, left : left + size].reshape(size, size, -1)


def covered(picture: Picture, size: int) -> Picture:
    """A writable picture with at least `size` px on each side, for crops."""
    assert min(picture.shape[:2]) >= size, "the cache holds at least data.size px"
    return np.array(picture)
