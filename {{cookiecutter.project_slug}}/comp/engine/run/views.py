"""Views of an image for test-time augmentation (TTA): small functions on the batch as it was loaded (batch,
channels, height, width).

`predict.tta` lists them by name; the predictions of all views are averaged in `predict.averaging_space`. No
view has to be undone, since classification and regression do not depend on where in the image something is.
Every recipe of transforms.py is a view as well.
"""

from __future__ import annotations

import re
import zlib
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from comp import transforms
from comp.engine import pages
from comp.engine.config.resolve import nearest
from comp.engine.data.seeding import derive_seed
from comp.engine.errors import UserError
from comp.engine.run.forward import View, identity
from comp.engine.run.gpu_augment import BatchOp


def hflip(x: Tensor) -> Tensor:
    return x.flip(3)


def vflip(x: Tensor) -> Tensor:
    return x.flip(2)


def rot90(x: Tensor) -> Tensor:
    return torch.rot90(x, 1, (2, 3))


def rot180(x: Tensor) -> Tensor:
    return x.flip(2, 3)


def rot270(x: Tensor) -> Tensor:
    return torch.rot90(x, 3, (2, 3))


def transpose(x: Tensor) -> Tensor:
    return x.transpose(2, 3)


def antitranspose(x: Tensor) -> Tensor:
    return x.flip(2, 3).transpose(2, 3)


VIEWS: dict[str, View] = {
    v.__name__: v for v in (identity, hflip, vflip, rot90, rot180, rot270, transpose, antitranspose)
}


def resized_crop(x: Tensor, share: float, down: float, across: float) -> Tensor:
    """A square crop of `share` of the side, resized to the full size. Position (down, across): (0, 0) is the
    top left corner and (0.5, 0.5) the center."""
    side = x.shape[2]
    crop = max(1, round(side * share))
    top, left = round((side - crop) * down), round((side - crop) * across)
    cropped = x[:, :, top : top + crop, left : left + crop].float()
    resized = F.interpolate(cropped, size=(side, side), mode="bilinear", antialias=True)
    if x.is_floating_point():
        return resized
    return resized.round().clamp(0, torch.iinfo(x.dtype).max).to(x.dtype)


# Three scales, and five crops. They lose the border, so they are no symmetries as those above are.
CROPS: dict[str, View] = {
    "zoom110": partial(resized_crop, share=1 / 1.10, down=0.5, across=0.5),
    "zoom125": partial(resized_crop, share=1 / 1.25, down=0.5, across=0.5),
    "zoom150": partial(resized_crop, share=1 / 1.50, down=0.5, across=0.5),
    "crop_top_left": partial(resized_crop, share=0.875, down=0.0, across=0.0),
    "crop_top_right": partial(resized_crop, share=0.875, down=0.0, across=1.0),
    "crop_bottom_left": partial(resized_crop, share=0.875, down=1.0, across=0.0),
    "crop_bottom_right": partial(resized_crop, share=0.875, down=1.0, across=1.0),
    "crop_middle": partial(resized_crop, share=0.875, down=0.5, across=0.5),
}


class RecipeView:
    """One draw of an augmentation recipe: `light2` is the second draw of `light`.

    The seed of an image is a hash of its pixels, so the draw is the same in any batch, in any process and on
    Kaggle. It costs as much as augmenting does, one image after the other in this process. What a recipe does
    after normalizing (mixup, erasing) is left out."""

    def __init__(self, name: str, draw: int):
        self.name, self.draw = name, draw
        self.by_size: dict[int, tuple[transforms.Augment, list[BatchOp]]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        side = x.shape[2]
        if side not in self.by_size:
            recipe = transforms.by_name(self.name, side)
            self.by_size[side] = transforms.Augment(recipe, side), recipe.batch_ops
        augment, batch_ops = self.by_size[side]
        images = [np.ascontiguousarray(image) for image in x.permute(0, 2, 3, 1).cpu().numpy()]
        seeds = np.array([derive_seed(zlib.crc32(image.data), self.draw, 5) for image in images], np.int64)
        augmented = np.stack([augment(i, seed) for i, seed in zip(images, seeds.tolist(), strict=True)])
        out = torch.from_numpy(augmented).permute(0, 3, 1, 2).to(x.device)
        if not batch_ops:
            return out
        scaled = out.float() / 255
        for op in batch_ops:
            scaled = op(scaled, seeds)
        return (scaled * 255).round().clamp(0, 255).to(x.dtype)


def views(names: list[str]) -> list[View]:
    fixed = VIEWS | CROPS
    if len(set(names)) < len(names):
        raise UserError("view-twice", key="predict.tta", what=f"{', '.join(names)} has a view twice")
    return [fixed[name] if name in fixed else _recipe_view(name) for name in names]


def _recipe_view(name: str) -> View:
    match = re.fullmatch(r"([a-z_]+?)([1-9]\d?)?", name)
    recipes = [recipe for recipe in transforms.RECIPES if recipe != "none"]
    if pages.get("recipe") is not None:
        recipes.append("recipe")
    if match is None or match[1] not in recipes:
        known = [*VIEWS, *CROPS, *recipes]
        raise UserError(
            "view-unknown",
            key="predict.tta",
            what=f"no such view {name!r}",
            remedy=f"the nearest is {nearest(name, known)[0]}; there are {', '.join(known)}",
        )
    return RecipeView(match[1], int(match[2] or 1))
