"""Views of a picture for test-time augmentation: small functions on the batch as it was loaded (batch, channels, height, width).

`predict.tta` lists them by name; what they say of one picture is averaged in `predict.space`. Classification and
regression look the same from every side, so nothing has to be turned back. Any recipe of train/augment.py is a view as well.
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
from comp.engine.data.seeding import fold_in
from comp.engine.errors import Refused
from comp.engine.run.evaluate import View
from comp.engine.run.gpu_augment import BatchOp


def identity(x: Tensor) -> Tensor:
    return x


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
    """A square of `share` of the side, brought back to size: 0, 0 is the top left one and 0.5, 0.5 the middle."""
    side = x.shape[2]
    kept = max(1, round(side * share))
    top, left = round((side - kept) * down), round((side - kept) * across)
    piece = x[:, :, top : top + kept, left : left + kept].float()
    larger = F.interpolate(piece, size=(side, side), mode="bilinear", antialias=True)
    return larger if x.is_floating_point() else larger.round().clamp(0, torch.iinfo(x.dtype).max).to(x.dtype)


# Closer looks: three scales, and the corners that with crop_middle are the five crops. They lose the rim, so they are no symmetries.
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
    """One draw of an augmentation recipe: `light2` is the second of `light`. What a picture gets follows from its own pixels, so it
    is the same in any batch, in any process and on Kaggle. Costs what augmenting costs, picture by picture in this process; what
    a recipe does after normalising (mixing, erasing) is left out."""

    def __init__(self, name: str, draw: int):
        self.name, self.draw = name, draw
        self.made: dict[int, tuple[transforms.Augment, list[BatchOp]]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        side = x.shape[2]
        if side not in self.made:
            recipe = transforms.by_name(self.name, side)
            self.made[side] = transforms.Augment(recipe, side), recipe.on_batch
        change, on_batch = self.made[side]
        images = [np.ascontiguousarray(image) for image in x.permute(0, 2, 3, 1).cpu().numpy()]
        seeds = np.array([fold_in(zlib.crc32(image.data), self.draw, 5) for image in images], np.int64)
        drawn = np.stack([change(p, seed) for p, seed in zip(images, seeds.tolist(), strict=True)])
        out = torch.from_numpy(drawn).permute(0, 3, 1, 2).to(x.device)
        if not on_batch:
            return out
        share = out.float() / 255
        for op in on_batch:
            share = op(share, seeds)
        return (share * 255).round().clamp(0, 255).to(x.dtype)


def views(names: list[str]) -> list[View]:
    known = VIEWS | CROPS
    if len(set(names)) < len(names):
        raise Refused(f"predict.tta: {', '.join(names)} names a view twice")
    return [known[name] if name in known else _of_recipe(name) for name in names]


def _of_recipe(name: str) -> View:
    found = re.fullmatch(r"([a-z_]+?)([1-9]\d?)?", name)
    recipes = [each for each in transforms.RECIPES if each != "none"] + ["recipe"] * (
        pages.get("recipe") is not None
    )
    if found is None or found[1] not in recipes:
        known = [*VIEWS, *CROPS, *recipes]
        raise Refused(
            f"predict.tta: there is no view {name!r}; the nearest is {nearest(name, known)[0]}, there are {', '.join(known)}"
        )
    return RecipeView(found[1], int(found[2] or 1))
