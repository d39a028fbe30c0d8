"""Augmentation recipes: functions of `size` (px) that return three lists of ops. `augment.recipe` in a config
names one of them.

geometry  moves pixels, and ends in a square of `size`
color    changes values
batch     runs after normalizing

The kind of an op decides where it runs, on every machine:
  albumentations transforms, policies (engine/run/policies.py)  on a sample, in loader processes
  functions of engine/run/cv2_ops.py                            on a sample, in threads
  functions of engine/run/gpu_augment.py                        on a batch, on the device
A sample leaves the loader as uint8, or in the dtype of data.bit_depth, never normalized.
A recipe of your own: define `recipe(size)` in comp/competition.py and set `augment.recipe: recipe`.

augment.auto_augment is appended to `color` and augment.random_erasing to `batch`. mixup, cutmix and mosaic
are in engine/run/mixup.py.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from random import Random
from typing import Any, NamedTuple

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before the import, which looks for updates online otherwise
import albumentations as A
import cv2
import numpy as np
import torch

from comp.engine import pages
from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.data.seeding import derive_seed
from comp.engine.errors import UserError
from comp.engine.readers.arrays import DTYPES, Pixels
from comp.engine.run import cv2_ops, gpu_augment, policies
from comp.engine.run.gpu_augment import BatchOp, Seeds
from comp.engine.run.normalize import Normalize


@dataclass(frozen=True)
class Recipe:
    geometry: list[Any]
    color: list[Any] = field(default_factory=list)
    batch: list[BatchOp] = field(default_factory=list)

    @property
    def sample_ops(self) -> list[Any]:
        return [op for op in [*self.geometry, *self.color] if not isinstance(op, BatchOp)]

    @property
    def batch_ops(self) -> list[BatchOp]:
        """Those before normalizing."""
        return [op for op in [*self.geometry, *self.color] if isinstance(op, BatchOp)]


def none(size: int) -> Recipe:
    """Images as they are."""
    return Recipe([])


def light(size: int) -> Recipe:
    """Small shifts and rotations only: safe where left and right differ, as in digits or scans."""
    return Recipe([
        A.Affine(scale=(0.9, 1.1), translate_percent=(-0.08, 0.08), rotate=(-12, 12), p=0.8),
        A.RandomCrop(size, size),
    ])  # fmt: skip


def medium(size: int) -> Recipe:
    """Random crops, horizontal flips and mild color jitter: the default for photographs."""
    return Recipe(
        [A.RandomResizedCrop((size, size), scale=(0.5, 1.0), ratio=(0.8, 1.25)), A.HorizontalFlip()],
        [A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02, p=0.8)],
    )


def heavy(size: int) -> Recipe:
    """As strong as leaves the object recognizable; for long schedules and large models.

    The bounds are tighter than albumentations' defaults, where noise has a deviation of up to 0.44 of the
    range and blur is up to 3 px at any size. Holes come last and borders are mirrored, since sharpening draws
    a white line around every black edge.
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
    """Like medium, with crops in threads and color on the device: for when the GPU waits for the loader."""
    return Recipe(
        [cv2_ops.random_resized_crop(size), cv2_ops.horizontal_flip()], [gpu_augment.color_jitter()]
    )


def resident(size: int) -> Recipe:
    """Like light, all of it on the device: a set that fits into machine.gpu_cache_mb stays there, and nothing
    is loaded."""
    return Recipe([gpu_augment.random_affine()])


RECIPES = {recipe.__name__: recipe for recipe in (none, light, medium, heavy, fast, resident)}


class EpochAugment(NamedTuple):
    """What all images of an epoch have in common, a function of the epoch alone."""

    size: int  # px, of augment.progressive_sizes
    strong: bool  # False in the last augment.disable_last_epochs epochs


def epoch_augment(cfg: Config, epoch: int) -> EpochAugment:
    sizes = cfg.augment.progressive_sizes or [cfg.data.size]
    strong = epoch < cfg.train.epochs - cfg.augment.disable_last_epochs
    return EpochAugment(sizes[epoch * len(sizes) // cfg.train.epochs], strong)


def epoch_augments(cfg: Config) -> list[EpochAugment]:
    """The distinct ones of a run, in order."""
    return list(dict.fromkeys(epoch_augment(cfg, epoch) for epoch in range(cfg.train.epochs)))


def epoch_recipe(cfg: Config, epoch: EpochAugment) -> Recipe:
    """augment.recipe with augment.auto_augment and augment.random_erasing."""
    recipe, knobs = from_config(cfg, epoch.size), cfg.augment
    color, batch = list(recipe.color), list(recipe.batch)
    if epoch.strong and knobs.auto_augment is not None:
        color.append(policies.create(knobs.auto_augment, cfg.data.channels))
    if epoch.strong and knobs.random_erasing:
        batch.append(gpu_augment.random_erasing(knobs.random_erasing))
    complete = Recipe(recipe.geometry, color, batch)
    if cfg.data.bit_depth > 8 and (only_8_bit := [op for op in complete.sample_ops if op_type(op) != "cv2"]):
        raise UserError(
            "depth-unsupported",
            key="data.bit_depth",
            what=(
                f"{cfg.data.bit_depth} bits, and {type(only_8_bit[0]).__name__} of augment.recipe "
                f"{knobs.recipe} works on 8"
            ),
            remedy="use none, fast, resident, or a recipe of ops of engine/run/cv2_ops.py and gpu_augment.py",
        )
    return complete


def from_config(cfg: Config, size: int | None = None) -> Recipe:
    return by_name(cfg.augment.recipe, size or cfg.data.size)


def by_name(name: str, size: int) -> Recipe:
    make = pages.get("recipe") if name == "recipe" else RECIPES.get(name)
    if make is None:
        what, remedy = "no such recipe", f"the nearest is {nearest(name, RECIPES)[0]}"
        if name == "recipe":
            what, remedy = "comp/competition.py defines no recipe(size)", "define it there"
        raise UserError("recipe-unknown", key="augment.recipe", what=f"{name!r}: {what}", remedy=remedy)
    with warnings.catch_warnings():
        # A wrong argument is only a warning for albumentations, and the transform would run with its
        # defaults.
        warnings.simplefilter("error", UserWarning)
        try:
            recipe = make(size)
        except UserWarning as warning:
            raise UserError("recipe-invalid", key="augment.recipe", what=f"{name}: {warning}") from None
    if not isinstance(recipe, Recipe):
        raise UserError(
            "recipe-invalid",
            where="comp/competition.py",
            key=name,
            what=f"returns {type(recipe).__name__}, not comp.transforms.Recipe",
            remedy="return Recipe([A.RandomCrop(size, size)], [A.ColorJitter()]): lists of ops, not A.Compose",
        )
    return recipe


class Augment:
    """The ops of a recipe that run on a sample, as one function of (image, seed): the same seed, the same
    bytes, in any process.

    `scale`: images are resized by it first. Recipes crop by pixels, so an epoch at a smaller size needs
    smaller images.
    """

    def __init__(self, recipe: Recipe, size: int, scale: float = 1.0):
        self.size, self.scale = size, scale
        self.steps = [_step(kind, list(ops)) for kind, ops in groupby(recipe.sample_ops, op_type)]
        self.threads = all(op_type(op) == "cv2" for op in recipe.sample_ops)

    def __call__(self, image: Pixels, seed: int) -> Pixels:
        if not self.steps:
            return cv2_ops.center_crop(image, self.size)
        if self.scale != 1:
            height, width = (max(self.size, round(side * self.scale)) for side in image.shape[:2])
            image = cv2_ops.resize(image, height, width)
        for number, step in enumerate(self.steps):
            image = step(image, derive_seed(seed, number))
        assert image.dtype in DTYPES.values(), (
            "a recipe must return the dtype that it got: normalizing comes later, on the device"
        )
        if image.shape[:2] != (self.size, self.size):
            raise UserError(
                "recipe-invalid",
                key="augment.recipe",
                what=f"returns {image.shape[1]} x {image.shape[0]} px instead of a square of {self.size} px",
            )
        return image.reshape(self.size, self.size, -1)


def op_type(op: Any) -> str:
    """Decides where an op runs: cv2 in threads, batch on the device, the others in processes."""
    if isinstance(op, BatchOp):
        return "batch"
    if isinstance(op, policies.Policy):
        return "policy"
    return "albumentations" if isinstance(op, A.BasicTransform | A.BaseCompose) else "cv2"


def _step(kind: str, ops: list[Any]) -> Callable[[Pixels, int], Pixels]:
    if kind == "albumentations":
        compose = A.Compose(ops)

        def albumentations_step(image: Pixels, seed: int) -> Pixels:
            # Seeded before each call: in a loader process it would repeat its draws otherwise.
            compose.set_random_seed(seed % 2**32)
            return compose(image=np.array(image))["image"]  # a copy: the cache is read-only

        return albumentations_step
    if kind == "policy":
        (policy,) = ops
        return policy

    def cv2_step(image: Pixels, seed: int) -> Pixels:
        random = Random(seed)
        for op in ops:
            image = op(image, random)
        return image

    return cv2_step


class Preprocess:
    """From a uint8 batch to the model's input: normalizing, and the ops of a recipe that run on a batch."""

    def __init__(self, normalize: Normalize, recipe: Recipe | None = None):
        self.normalize = normalize
        self.before = recipe.batch_ops if recipe else []
        self.after = recipe.batch if recipe else []

    def __call__(self, images: torch.Tensor, seeds: Seeds | None = None) -> torch.Tensor:
        """(batch, channels, height, width), uint8 -> normalized float. Without seeds nothing is augmented."""
        x = images.to(self.normalize.device, non_blocking=True)
        if seeds is not None:
            # Batches are channels-last. On a CPU that saves a forward pass a sixth to a quarter with resnet18
            # and efficientnet_b0, but a training step of resnet18 takes a third longer.
            x = x.contiguous()
        x = x.float()
        if images.dtype == torch.uint16:
            x = x / 257
        if seeds is None:
            return self.normalize(x)
        if self.before:
            x = x / 255
            for op in self.before:
                x = op(x, seeds)
            x = x * 255
        x = self.normalize(x)
        for op in self.after:
            x = op(x, seeds)
        return x
