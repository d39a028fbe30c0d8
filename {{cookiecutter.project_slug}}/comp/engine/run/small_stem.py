"""A stem for small images (model.stem=small). Models for 224 px reduce an image by 2 or 4 in their first
layers, which leaves little of 32 px.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from comp.engine.errors import UserError

FAMILIES = "resnet, resnext, seresnet, efficientnet, mobilenet, regnet, convnext"
KERNEL = 3  # px; larger kernels are replaced by untrained ones of this size


def small(module: nn.Module, name: str) -> Any:
    """Sets the stride of the stem's convolutions to 1 and removes its pooling. Kernels of up to 3 px keep
    their weights."""
    pooled = isinstance(getattr(module, "conv1", None), nn.Module) and isinstance(
        getattr(module, "maxpool", None), nn.Module
    )
    first = next(
        (
            each
            for each in (["conv1"] if pooled else ["conv_stem", "stem"])
            if isinstance(getattr(module, each, None), nn.Module)
        ),
        "",
    )
    strided = [
        f"{first}.{inside}".rstrip(".")
        for inside, each in (getattr(module, first).named_modules() if first else ())
        if isinstance(each, nn.Conv2d) and max(each.stride) > 1
    ]
    if not strided:
        raise UserError(
            "stem-unsupported",
            key="model.stem",
            what=f"small: {name} has no stem of convolutions with a stride, as {FAMILIES} have",
            remedy="set it to default",
        )
    if pooled:
        module.maxpool = nn.Identity()
    for path in strided:
        module.set_submodule(path, _stride_1(module.get_submodule(path)))
    return module


def _stride_1(old: nn.Module) -> nn.Module:
    assert isinstance(old, nn.Conv2d)
    if max(old.kernel_size) <= KERNEL:
        old.stride = (1, 1)
        return old
    new = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        KERNEL,
        padding=KERNEL // 2,
        groups=old.groups,
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    return new
