"""Views of a picture for test-time augmentation: small functions on the batch as it was loaded (batch, channels, height, width).

`predict.tta` lists them by name; what they say of one picture is averaged in `predict.space`. Classification and
regression look the same from every side, so nothing has to be turned back.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from comp.config import Refused, nearest
from comp.train.evaluate import View


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


def part(x: Tensor, share: float, down: float, across: float) -> Tensor:
    """A square of `share` of the side, brought back to size: 0, 0 is the top left one and 0.5, 0.5 the middle."""
    side = x.shape[2]
    kept = max(1, round(side * share))
    top, left = round((side - kept) * down), round((side - kept) * across)
    piece = x[:, :, top : top + kept, left : left + kept].float()
    larger = F.interpolate(piece, size=(side, side), mode="bilinear", antialias=True)
    return larger if x.is_floating_point() else larger.round().clamp(0, torch.iinfo(x.dtype).max).to(x.dtype)


# Closer looks: three scales, and the corners that with crop_middle are the five crops. They lose the rim, so they are no symmetries.
CLOSER: dict[str, View] = {
    "zoom110": partial(part, share=1 / 1.10, down=0.5, across=0.5),
    "zoom125": partial(part, share=1 / 1.25, down=0.5, across=0.5),
    "zoom150": partial(part, share=1 / 1.50, down=0.5, across=0.5),
    "crop_top_left": partial(part, share=0.875, down=0.0, across=0.0),
    "crop_top_right": partial(part, share=0.875, down=0.0, across=1.0),
    "crop_bottom_left": partial(part, share=0.875, down=1.0, across=0.0),
    "crop_bottom_right": partial(part, share=0.875, down=1.0, across=1.0),
    "crop_middle": partial(part, share=0.875, down=0.5, across=0.5),
}


def views(names: list[str]) -> list[View]:
    known = VIEWS | CLOSER
    for name in names:
        if name not in known:
            raise Refused(
                f"predict.tta: there is no view {name!r}; the nearest is {nearest(name, known)[0]}, there are {', '.join(known)}"
            )
    if len(set(names)) < len(names):
        raise Refused(f"predict.tta: {', '.join(names)} names a view twice")
    return [known[name] for name in names]
