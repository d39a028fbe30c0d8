"""Maps of where a prediction comes from, for comp explain: Grad-CAM and SmoothGrad."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from comp import models, transforms
from comp.data import Index
from comp.engine.data.seeding import derive_seed
from comp.engine.errors import UserError
from comp.engine.readers import arrays
from comp.engine.run import normalize
from comp.engine.run.backbone import inner
from comp.engine.run.context import Context

COPIES, NOISE = 24, 0.15  # SmoothGrad: noisy copies, and the noise as a share of the image's range
MIN_SIDE = 4  # a feature map with fewer cells per side says nothing about where


def load_network(context: Context, weights: Path) -> nn.Module:
    module = models.build(context.cfg, context.samples.heads, pretrained=False, loader=context.loader)
    return models.load_weights(module, weights).to(context.device).eval()


def maps(
    context: Context, module: nn.Module, row: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """(height, width, channels) of the sample's first image, and Grad-CAM and SmoothGrad as (height, width),
    0 to 1."""
    batch = context.loader.dataset.batch([Index(row, None)])
    extras = context.loader.extras(batch)
    preprocess = transforms.Preprocess(normalize.build(context.cfg, module, context.device))
    x = preprocess(batch.images.permute(0, 3, 1, 2))  # (1 or more images, channels, height, width)
    with spatial_features(module) as layers:
        output = module(x, **extras)
        column, sign = _explained_output(context, output)
        feature, gradient = choose_layer(layers, sign * output[0, column], module)
    cam = grad_cam(to_nchw(feature, module)[:1], to_nchw(gradient, module)[:1], x.shape[2:])
    total = torch.zeros_like(x[0, 0])
    generator = torch.Generator().manual_seed(derive_seed(row, 6))
    std = NOISE * float(x[0].max() - x[0].min())
    for _ in range(COPIES):
        noise = torch.randn(x.shape, generator=generator).to(x.device) * std
        noisy = (x + noise).requires_grad_()
        (gradient,) = torch.autograd.grad(sign * module(noisy, **extras)[0, column], noisy)
        total += gradient[0].abs().sum(0)
    smooth = total / total.max().clamp(min=1e-12)
    return arrays.to_uint8(batch.images[0].numpy()), cam[0].cpu().numpy(), smooth.cpu().numpy()


def _explained_output(context: Context, output: Tensor) -> tuple[int, int]:
    """(column, sign) of the output that is explained: the first head's most likely class, or its value. A
    single logit is explained with the sign of its prediction."""
    width = models.output_sizes(context.cfg, context.samples.heads)[0]
    head = context.samples.heads[0]
    if width == 1:
        return 0, -1 if head.spec.space == "logit" and float(output[0, 0]) < 0 else 1
    return int(output[0, :width].argmax()), 1


@contextmanager
def spatial_features(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects feature maps of a forward pass, in the order in which they are computed: the stages in timm's
    feature_info, then the output of forward_features. Of a network without either: the convolutions."""
    layers: list[Tensor] = []
    backbone, _ = inner(module)

    def collect(_part: nn.Module, _inputs: Any, output: Any) -> None:
        layers.append(output)

    info = getattr(backbone, "feature_info", None)
    stages = {stage["module"] for stage in info or () if stage.get("module")}
    forward = getattr(backbone, "forward_features", None)
    parts = [
        part
        for name, part in backbone.named_modules()
        if (name in stages if forward is not None else isinstance(part, nn.Conv2d))
    ]
    handles = [part.register_forward_hook(collect) for part in parts]
    if forward is not None:

        def collecting_forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            layers.append(forward(*args, **kwargs))
            return layers[-1]

        backbone.forward_features = collecting_forward
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()
        if forward is not None:
            del backbone.forward_features


def choose_layer(layers: list[Tensor], output: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """The last feature map with a gradient everywhere and at least MIN_SIDE cells per side, with that
    gradient.

    For a 32 px image some networks end in a single cell, and after the last attention only a class token is
    read; an earlier map is taken then.
    """
    if not layers:
        raise UserError(
            "features-missing",
            where="comp explain",
            what="this network has neither forward_features nor a convolution",
        )
    gradients = torch.autograd.grad(output, layers, allow_unused=True)
    used = [
        (layer, gradient)
        for layer, gradient in zip(layers, gradients, strict=True)
        if gradient is not None and bool(to_nchw(gradient, module).any())
    ]
    if not used:
        raise UserError(
            "features-missing",
            where="comp explain",
            what="the output of this network does not depend on any feature map",
        )
    sides = [min(to_nchw(layer, module).shape[2:]) for layer, _ in used]
    fine = [pair for pair, side in zip(used, sides, strict=True) if side >= MIN_SIDE]
    return fine[-1] if fine else used[sides.index(max(sides))]


def to_nchw(feature: Tensor, module: nn.Module) -> Tensor:
    """(batch, channels, rows, columns) from tokens, from channels last, or unchanged."""
    network, _ = inner(module)
    if feature.ndim == 3:  # (batch, tokens, channels), class tokens first
        patches = feature[:, getattr(network, "num_prefix_tokens", 0) :]
        side = math.isqrt(patches.shape[1])
        return patches.transpose(1, 2).reshape(len(feature), feature.shape[2], side, -1)
    widths = {stage["num_chs"] for stage in getattr(network, "feature_info", None) or ()}
    widths.add(getattr(network, "num_features", feature.shape[1]))
    last = getattr(network, "output_fmt", "NCHW") == "NHWC" or feature.shape[1] not in widths
    return feature.permute(0, 3, 1, 2) if last and feature.shape[3] in widths else feature


def grad_cam(feature: Tensor, gradient: Tensor, size: torch.Size) -> Tensor:
    """(batch, height, width), 0 to 1: the sum of channels, each weighted by its mean gradient."""
    weight = gradient.mean((2, 3), keepdim=True)
    cam = (weight * feature).sum(1, keepdim=True).clamp(min=0).detach()
    cam = F.interpolate(cam, tuple(size), mode="bilinear", align_corners=False)[:, 0]
    return cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)
