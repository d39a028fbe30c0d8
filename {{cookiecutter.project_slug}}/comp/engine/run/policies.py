"""RandAugment, AugMix, TrivialAugment and AutoAugment as one op of a recipe: `augment.auto_augment`, written
as timm writes it.

The policy runs after the recipe's geometry and color, on images of the final size. timm and torchvision draw
from the global generators of the process: those are seeded before each image and restored after it, so a
policy runs in loader processes, never in threads.
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
from comp.engine.errors import UserError
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
    """An op on one image that draws from the global generators."""

    name: str
    transform: Callable[[Any], Any]  # on a PIL image

    def __str__(self) -> str:
        return f"{self.name}, one of: {', '.join(op_names(self))}"

    def __call__(self, image: Pixels, seed: int) -> Pixels:
        grey = image.ndim == 2 or image.shape[2] == 1
        pil = Image.fromarray(image.squeeze() if grey else np.ascontiguousarray(image)).convert("RGB")
        with global_seed(seed):
            pil = self.transform(pil)
        return np.asarray(pil.convert("L") if grey else pil).reshape(*image.shape[:2], -1)


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seeds the generators of Python, numpy and torch, and restores their state afterwards."""
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
        raise UserError(
            "policy-unsupported",
            key="augment.auto_augment",
            what=f"{name} is for grey and RGB images, and data.channels is {channels}",
            remedy="set it to null",
        )
    grey = (128, 128, 128)  # fills the area outside of the image
    hparams = {"img_mean": grey, "translate_pct": 0.45}
    try:
        if ignored := [x for x in name.split("-")[1:] if not x.startswith("t") and not x[-1:].isdigit()]:
            raise ValueError(f"{ignored[0]} has no number, and timm would ignore it")
        if name == "trivial":
            return Policy(name, TrivialAugmentWide(fill=list(grey)))
        factories = {"rand": timm.rand_augment_transform, "augmix": timm.augment_and_mix_transform}
        transform = factories.get(kind, timm.auto_augment_transform)(name, hparams)
    except (AssertionError, ValueError, IndexError, KeyError) as error:
        example = EXAMPLES[(nearest(kind, EXAMPLES) or ["rand"])[0]]
        raise UserError(
            "policy-unknown",
            key="augment.auto_augment",
            what=f"{name!r} is no policy of timm" + (f" ({error})" if str(error) else ""),
            remedy=f"write it like {example}",
        ) from None
    for op in _ops(transform):
        if op.aug_fn is timm.posterize:
            op.aug_fn = posterize
    return Policy(name, transform)


def posterize(image: Any, bits: int, **rest: Any) -> Any:
    """timm draws 0 bits too, which newer versions of Pillow raise for."""
    from timm.data import auto_augment as timm

    return timm.posterize(image, max(1, bits), **rest)


def _ops(transform: Any) -> list[Any]:
    return transform.ops if hasattr(transform, "ops") else [op for part in transform.policy for op in part]


def op_names(policy: Policy) -> list[str]:
    """The ops that a policy draws from, for printing."""
    transform = policy.transform
    if not hasattr(transform, "ops") and not hasattr(transform, "policy"):
        return list(transform._augmentation_space(31))  # type: ignore[attr-defined]
    return list(dict.fromkeys(op.name for op in _ops(transform)))
