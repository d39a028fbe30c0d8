"""Augmentation recipes: plain functions by name, each three lists. `augment.recipe` in a config names one of them.

geometry  moves pixels, ends in a square of `size`
colour    changes them
batch     comes after normalising

What an op is decides where it runs, on every machine: any albumentations transform and a policy (train/policies.py) in
loader processes; a function of train/native.py on a sample, in threads; one of train/device.py on the batch, on the device.
A sample leaves the loader as uint8, or in the kind of data.depth, never normalised. To have your own: define `recipe(size)` in comp/competition.py and set
`augment.recipe: recipe`.

The knobs beside the recipe are added to its lists: the policy to the colours, erasing to the batch. What an epoch gets of
them, and at which size, is its Day. What pairs samples stands in train/mixing.py.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from random import Random
from typing import Any, NamedTuple

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before the import: it would go online
import albumentations as A
import cv2
import numpy as np
import torch

from comp.engine import pages
from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.data.seeding import fold_in
from comp.engine.errors import Refused
from comp.engine.readers.arrays import DTYPES, Pixels
from comp.engine.run import cv2_ops, gpu_augment, policies
from comp.engine.run.gpu_augment import BatchOp, Seeds
from comp.engine.run.normalize import Normalize


@dataclass(frozen=True)
class Recipe:
    geometry: list[Any]
    colour: list[Any] = field(default_factory=list)
    batch: list[BatchOp] = field(default_factory=list)

    @property
    def on_sample(self) -> list[Any]:
        return [op for op in [*self.geometry, *self.colour] if not isinstance(op, BatchOp)]

    @property
    def on_batch(self) -> list[BatchOp]:
        return [op for op in [*self.geometry, *self.colour] if isinstance(op, BatchOp)]


def none(size: int) -> Recipe:
    return Recipe([])


def light(size: int) -> Recipe:
    """Small shifts and turns only: safe where left and right differ, as in digits or scans."""
    return Recipe([
        A.Affine(scale=(0.9, 1.1), translate_percent=(-0.08, 0.08), rotate=(-12, 12), p=0.8),
        A.RandomCrop(size, size),
    ])  # fmt: skip


def medium(size: int) -> Recipe:
    """Crops, mirror images and mild colour: the default for photographs."""
    return Recipe(
        [A.RandomResizedCrop((size, size), scale=(0.5, 1.0), ratio=(0.8, 1.25)), A.HorizontalFlip()],
        [A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02, p=0.8)],
    )


def heavy(size: int) -> Recipe:
    """Everything that leaves the object recognisable; for long schedules and large networks.

    albumentations' own bounds do not: its noise has up to 0.44 of the range as deviation, and its blur up to 3 px at any size. Holes
    come last and borders are mirrored, since sharpening draws a white line around every black edge.
    """
    return Recipe(
        [
            A.RandomResizedCrop((size, size), scale=(0.4, 1.0), ratio=(0.75, 1.33)),
            A.HorizontalFlip(),
            A.Affine(rotate=(-20, 20), shear=(-8, 8), border_mode=cv2.BORDER_REFLECT_101, p=0.5),
        ],
        [
            A.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05, p=0.8),
            A.OneOf(
                [
                    A.GaussianBlur(sigma_limit=(0.3, max(0.5, size / 100))),
                    A.GaussNoise(std_range=(0.02, 0.1)),
                    A.Sharpen(alpha=(0.1, 0.4), lightness=(1.0, 1.0)),
                ],
                p=0.3,
            ),
            A.CoarseDropout(
                num_holes_range=(1, 4), hole_height_range=(0.08, 0.2), hole_width_range=(0.08, 0.2), p=0.5
            ),
        ],
    )


def fast(size: int) -> Recipe:
    """Like medium, with crops in threads and colour on the device: for when the loader is what the GPU waits for."""
    return Recipe(
        [cv2_ops.random_resized_crop(size), cv2_ops.horizontal_flip()], [gpu_augment.color_jitter()]
    )


def resident(size: int) -> Recipe:
    """Like light, all of it on the device: a small set then lives there altogether and nothing is loaded at all."""
    return Recipe([gpu_augment.random_affine()])


RECIPES = {recipe.__name__: recipe for recipe in (none, light, medium, heavy, fast, resident)}


class EpochAugment(NamedTuple):
    """What all pictures of an epoch have in common, a function of the epoch alone."""

    size: int  # px, of augment.progressive_sizes
    strong: bool  # False in the last epochs, as many as augment.disable_last_epochs says


def epoch_augment(cfg: Config, epoch: int) -> EpochAugment:
    sizes = cfg.augment.progressive_sizes or [cfg.data.size]
    strong = epoch < cfg.train.epochs - cfg.augment.disable_last_epochs
    return EpochAugment(sizes[epoch * len(sizes) // cfg.train.epochs], strong)


def epoch_augments(cfg: Config) -> list[EpochAugment]:
    """Every kind of day of a run, in order."""
    return list(dict.fromkeys(epoch_augment(cfg, epoch) for epoch in range(cfg.train.epochs)))


def epoch_recipe(cfg: Config, today: EpochAugment) -> Recipe:
    """The recipe with what the knobs beside it add."""
    recipe, knobs = from_config(cfg, today.size), cfg.augment
    colour, batch = list(recipe.colour), list(recipe.batch)
    if today.strong and knobs.policy is not None:
        colour.append(policies.create(knobs.policy, cfg.data.channels))
    if today.strong and knobs.random_erasing:
        batch.append(gpu_augment.random_erasing(knobs.random_erasing))
    made = Recipe(recipe.geometry, colour, batch)
    if cfg.data.depth > 8 and (coarse := [op for op in made.on_sample if op_type(op) != "native"]):
        raise Refused(
            f"data.depth: {cfg.data.depth} bits, and {type(coarse[0]).__name__} of augment.recipe {knobs.recipe} works on 8; "
            "take none, fast, resident, or your own recipe of comp/engine/run/cv2_ops.py and device.py"
        )
    return made


def from_config(cfg: Config, size: int | None = None) -> Recipe:
    return by_name(cfg.augment.recipe, size or cfg.data.size)


def by_name(name: str, size: int) -> Recipe:
    make = pages.get("recipe") if name == "recipe" else RECIPES.get(name)
    if make is None:
        missing = (
            "comp/competition.py defines no recipe(size)" if name == "recipe" else "there is no such recipe"
        )
        raise Refused(f"augment.recipe: {name!r}: {missing}; the nearest is {nearest(name, RECIPES)[0]}")
    with warnings.catch_warnings():
        # A wrong argument is only a warning for albumentations, and the transform would run with its defaults.
        warnings.simplefilter("error", UserWarning)
        try:
            recipe = make(size)
        except UserWarning as warning:
            raise Refused(f"augment.recipe: {name}: {warning}") from None
    assert isinstance(recipe, Recipe), f"{name} must return a Recipe"
    return recipe


class Augment:
    """A recipe's sample ops as one function of (picture, seed): the same seed, the same bytes, in whichever process.

    `shrink`: pictures of a day smaller than data.size are brought to its scale first, since recipes crop by pixels.
    """

    def __init__(self, recipe: Recipe, size: int, shrink: float = 1.0):
        self.size, self.shrink = size, shrink
        self.steps = [_step(what, list(ops)) for what, ops in groupby(recipe.on_sample, op_type)]
        self.threads = all(op_type(op) == "native" for op in recipe.on_sample)

    def __call__(self, picture: Pixels, seed: int) -> Pixels:
        if not self.steps:
            return center_crop(picture, self.size)
        if self.shrink != 1:
            height, width = picture.shape[:2]
            picture = _resized(
                picture, *(max(self.size, round(side * self.shrink)) for side in (height, width))
            )
        for number, step in enumerate(self.steps):
            picture = step(picture, fold_in(seed, number))
        assert picture.dtype in DTYPES.values(), (
            "a recipe must hand over pixels as it got them; normalising is the first line of the step"
        )
        if picture.shape[:2] != (self.size, self.size):
            raise Refused(
                f"augment.recipe: ends in {picture.shape[1]} x {picture.shape[0]} px, not in {self.size}, the size of its pictures"
            )
        return picture.reshape(self.size, self.size, -1)


def op_type(op: Any) -> str:
    """Whose an op on a sample is, which decides where it runs."""
    if isinstance(op, policies.Policy):
        return "policy"
    return "albumentations" if isinstance(op, A.BasicTransform | A.BaseCompose) else "native"


def _step(what: str, ops: list[Any]) -> Callable[[Pixels, int], Pixels]:
    if what == "albumentations":
        chain = A.Compose(ops)

        def theirs(picture: Pixels, seed: int) -> Pixels:
            chain.set_random_seed(
                seed % 2**32
            )  # inside loader processes it repeats its draws unless seeded before each call
            return chain(image=np.array(picture))["image"]  # a copy: the cache is read-only

        return theirs
    if what == "policy":
        (policy,) = ops
        return policy

    def ours(picture: Pixels, seed: int) -> Pixels:
        random = Random(seed)
        for op in ops:
            picture = op(picture, random)
        return picture

    return ours


def center_crop(picture: Pixels, size: int) -> Pixels:
    """What validation and inference see: the middle square of `size`, with all of the picture that fits."""
    height, width = picture.shape[:2]
    if (height, width) == (size, size):
        return picture
    scale = size / min(height, width)
    if scale != 1:
        picture = _resized(picture, max(size, round(height * scale)), max(size, round(width * scale)))
        height, width = picture.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return picture[top : top + size, left : left + size].reshape(size, size, -1)


def _resized(picture: Pixels, height: int, width: int) -> Pixels:
    how = cv2.INTER_AREA if height < picture.shape[0] else cv2.INTER_CUBIC
    flat = picture.reshape(*picture.shape[:2], -1)
    parts = [
        cv2.resize(flat[:, :, at : at + 4], (width, height), interpolation=how).reshape(height, width, -1)
        for at in range(0, flat.shape[2], 4)  # OpenCV knows four at most
    ]
    return np.concatenate(parts, 2).astype(picture.dtype, copy=False)


class Preprocess:
    """From a uint8 batch to what the network sees: the device's share of the recipe around normalising."""

    def __init__(self, normal: Normalize, recipe: Recipe | None = None):
        self.normal = normal
        self.before = recipe.on_batch if recipe else []
        self.after = recipe.batch if recipe else []

    def __call__(self, images: torch.Tensor, seeds: Seeds | None = None) -> torch.Tensor:
        """(batch, channels, height, width), uint8 -> float, in its units"""
        x = images.to(self.normal.device, non_blocking=True)
        if seeds is not None:
            # Batches come with their channels innermost. A CPU likes that in a forward pass, a sixth to a quarter less for resnet18
            # and efficientnet_b0, and not on the way back: there a step of resnet18 takes a third longer.
            x = x.contiguous()
        x = x.float()
        if images.dtype == torch.uint16:
            x = x / 257
        if seeds is None:
            return self.normal(x)
        if self.before:
            x = x / 255
            for op in self.before:
                x = op(x, seeds)
            x = x * 255
        x = self.normal(x)
        for op in self.after:
            x = op(x, seeds)
        return x
