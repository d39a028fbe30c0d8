"""Views of a picture for test-time augmentation: small functions on the uint8 batch (batch, channels, height, width).

`predict.tta` lists them by name; what they say of one picture is averaged in `predict.space`. Classification and
regression look the same from every side, so nothing has to be turned back.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


VIEWS = {v.__name__: v for v in (identity, hflip, vflip, rot90, rot180, rot270, transpose, antitranspose)}


def views(names: list[str]) -> list[View]:
    for name in names:
        if name not in VIEWS:
            raise Refused(
                f"predict.tta: there is no view {name!r}; the nearest is {nearest(name, VIEWS)[0]}, there are {', '.join(VIEWS)}"
            )
    if len(set(names)) < len(names):
        raise Refused(f"predict.tta: {', '.join(names)} names a view twice")
    return [VIEWS[name] for name in names]
