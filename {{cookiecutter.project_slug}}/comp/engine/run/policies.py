"""RandAugment, AugMix, TrivialAugment and AutoAugment as one op of a recipe: `augment.policy`, in timm's own words.

They come after the recipe's own geometry and colour, on pictures of the final size. What timm and torchvision draw, they
draw from generators that a whole process shares: so those are seeded before each picture and put back after it, and such
an op runs in loader processes, never in threads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from comp.engine.config.resolve import nearest
from comp.engine.errors import Refused
from comp.engine.readers.arrays import Pixels

EXAMPLES = {
    "rand": "rand-m9-n2-mstd0.5",
    "augmix": "augmix-m3-w3",
    "trivial": "trivial",
    "original": "original-mstd0.5",
    "3a": "3a",
}


@dataclass(frozen=True)
class Policy:
    """An op on one picture that draws from process-wide generators."""

    name: str
    change: Callable[[Any], Any]

    def __call__(self, picture: Pixels, seed: int) -> Pixels:
        grey = picture.ndim == 2 or picture.shape[2] == 1
        image = Image.fromarray(picture.squeeze() if grey else np.ascontiguousarray(picture)).convert("RGB")
        with global_seed(seed):
            image = self.change(image)
        return np.asarray(image.convert("L") if grey else image).reshape(*picture.shape[:2], -1)


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's generators begin at `seed` and are found as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def create(name: str, channels: int) -> Policy:
    from timm.data import auto_augment as timm
    from torchvision.transforms import TrivialAugmentWide

    kind = name.split("-", maxsplit=1)[0]
    if channels not in (1, 3):
        raise Refused(
            f"augment.policy: {name} is for grey and colour pictures, and data.channels is {channels}; set it to null"
        )
    grey = (128, 128, 128)  # what comes in from outside
    hparams = {"img_mean": grey, "translate_pct": 0.45}
    try:
        silent = [
            part for part in name.split("-")[1:] if not part.startswith("t") and not part[-1:].isdigit()
        ]
        assert not silent, f"{silent[0]} has no number, and timm would pass over it"
        if name == "trivial":
            return Policy(name, TrivialAugmentWide(fill=list(grey)))
        makers = {"rand": timm.rand_augment_transform, "augmix": timm.augment_and_mix_transform}
        change = makers.get(kind, timm.auto_augment_transform)(name, hparams)
    except (AssertionError, ValueError, IndexError, KeyError) as error:
        close = EXAMPLES[(nearest(kind, EXAMPLES) or ["rand"])[0]]
        reason = f" ({error})" if str(error) else ""
        raise Refused(f"augment.policy: {name!r} is no policy{reason}; write it like {close}") from None
    for op in _held(change):
        if op.aug_fn is timm.posterize:
            op.aug_fn = posterize
    return Policy(name, change)


def posterize(image: Any, bits: int, **rest: Any) -> Any:
    """timm goes down to no bit at all, which newer Pillows refuse."""
    from timm.data import auto_augment as timm

    return timm.posterize(image, max(1, bits), **rest)


def _held(change: Any) -> list[Any]:
    return change.ops if hasattr(change, "ops") else [op for part in change.policy for op in part]


def ops(policy: Policy) -> list[str]:
    """What it draws from, for a person."""
    change = policy.change
    if not hasattr(change, "ops") and not hasattr(change, "policy"):
        return list(change._augmentation_space(31))  # type: ignore[attr-defined]
    return list(dict.fromkeys(op.name for op in _held(change)))
