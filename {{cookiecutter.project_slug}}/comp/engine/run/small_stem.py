"""A stem for small pictures. Networks for 224 px shrink a picture by 2 or 4 before they look at it; of 32 px little is left then."""

from __future__ import annotations

from typing import Any

from torch import nn

from comp.engine.errors import Refused

FAMILIES = "resnet, resnext, seresnet, efficientnet, mobilenet, regnet and convnext have one"
SEES = 3  # px; a kernel that is larger is for large pictures, and begins anew


def small(module: nn.Module, name: str) -> Any:
    """The first convolutions go over every pixel, and no pooling follows them. Kernels of 3 px keep their weights."""
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
        raise Refused(
            f"model.stem: small: {name} has no stem of convolutions with a stride; {FAMILIES}; set it to default"
        )
    if pooled:
        module.maxpool = nn.Identity()
    for path in strided:
        module.set_submodule(path, _over_every_pixel(module.get_submodule(path)))
    return module


def _over_every_pixel(old: nn.Module) -> nn.Module:
    assert isinstance(old, nn.Conv2d)
    if max(old.kernel_size) <= SEES:
        old.stride = (1, 1)
        return old
    new = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        SEES,
        padding=SEES // 2,
        groups=old.groups,
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    return new
