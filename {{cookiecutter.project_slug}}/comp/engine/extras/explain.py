"""comp explain: what in a picture made the network say what it said. Grad-CAM and SmoothGrad, for each row by the weights of
its own fold, which have not seen it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from comp import models, transforms
from comp.data import Index
from comp.engine import hardware
from comp.engine.bank import bank, predictions
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import experiments
from comp.engine.config.resolve import nearest
from comp.engine.data.seeding import fold_in
from comp.engine.errors import Refused
from comp.engine.readers import arrays
from comp.engine.report import plots
from comp.engine.run import loading, normalize
from comp.engine.run.backbone import inner
from comp.engine.run.context import Context
from comp.engine.store import artifacts, paths

NOISY, NOISE = 24, 0.15  # SmoothGrad: so many copies, with noise of so much of the picture's range
SIDE, GAP, TITLE = 192, 8, 34  # px
FINE = 4  # a map of fewer squares a side says nothing about where


def explain(run: str, ids: list[str], count: int) -> Path:
    cfg = experiments.stored_config(run)
    hardware.set_threads(cfg.train.threads)
    context = loading.load_context(cfg)
    rows, captions = _chosen(context, run, ids, count)
    sheet = Image.new("RGB", (GAP + 3 * (SIDE + GAP), TITLE + len(rows) * (SIDE + TITLE)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), f"{run}: the picture, Grad-CAM, SmoothGrad", "black")
    of_row = context.folds.assignment[0]
    networks: dict[int, nn.Module] = {}
    bar = tqdm(list(zip(rows, captions, strict=True)), desc="explaining", unit="row", leave=False, delay=2,
               disable=None if cfg.machine.progress else True)  # fmt: skip
    for place, (row, caption) in enumerate(bar):
        fold = int(of_row[row])
        if fold not in networks:
            networks[fold] = network(context, _weights(run, fold))
        image, cam, smooth = maps(context, networks[fold], int(row))
        top = TITLE + place * (SIDE + TITLE)
        pen.multiline_text((GAP, top - 4), caption, "black", spacing=1)
        for column, shown in enumerate((_plain(image), _over(image, cam), _heat(smooth))):
            sheet.paste(shown.resize((SIDE, SIDE)), (GAP + column * (SIDE + GAP), top + TITLE - GAP))
    file = paths.run_folder(run) / "explain.png"
    with artifacts.atomic(file) as temporary:
        sheet.save(temporary, "png")
    print(
        f"written: {paths.relative(file)}, {len(rows)} rows, each by the weights of its own fold\nnext: comp audit"
    )
    return file


def _chosen(context: Context, run: str, ids: list[str], count: int) -> tuple[NDArray[np.int64], list[str]]:
    """Rows and what stands above them: those of `ids`, or the ones that went worst."""
    head = context.samples.heads[0]
    file = paths.run_folder(run) / "oof.arrow"
    if artifacts.manifest_entry(file):
        oof = bank.read(file, context.samples, context.folds)
    else:
        oof = _of_some_folds(context, run)
    rows = oof.row.astype(np.int64)[oof.predicted]
    said = oof.probability(head)[oof.predicted]
    truth = context.samples.truth(head, rows)
    names = context.samples.frame["id"].to_numpy()[rows].tolist()
    classes = head.classes if head.spec.space == "logit" and head.task != "multilabel" else ()
    table = plots.worst_rows(truth, said, names, classes, len(rows) if ids else count)
    if ids:
        unknown = [name for name in ids if name not in set(names)]
        if unknown:
            raise Refused(
                f"--ids: {unknown[0]}: {run} has no out-of-fold prediction of it; the nearest is {nearest(unknown[0], names)[0]}"
            )
        table = table.set_index("id").loc[ids].reset_index()
    captions = [
        f"{row.id}: {row.true}\nsaid {row.predicted}, error {row.error:.3f}" for row in table.itertuples()
    ]
    return rows[table["position"].to_numpy()], captions


def _of_some_folds(context: Context, run: str) -> PredictionSet:
    """Of a run that is not finished, what its finished folds predict."""
    parts = sorted(paths.run_folder(run).glob("seed*/fold[0-9]*/oof.arrow"))
    if not parts:
        raise experiments.missing_predictions(run, "predictions to explain")
    print(
        f"{experiments.missing_predictions(run, 'predictions of all rows')}; the rows of the others are explained"
    )
    sets = [bank.read(file, context.samples, context.folds) for file in parts]
    return predictions.merge(sets, context.samples, context.folds, context.cfg.predict.averaging_space)


def _weights(run: str, fold: int) -> Path:
    found = sorted(paths.run_folder(run).glob(f"seed*/fold{fold}/weights.safetensors"))
    if not found:
        raise Refused(
            f"{run}: the weights of fold {fold} are gone; comp train {run} --fresh makes them again"
        )
    return found[0]


def network(context: Context, weights: Path) -> nn.Module:
    module = models.build(context.cfg, context.samples.heads, pretrained=False, loader=context.loader)
    return models.load_weights(module, weights).to(context.device).eval()


def maps(
    context: Context, module: nn.Module, row: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """(height, width, channels) of the sample's first picture, and two maps of (height, width) from 0 to 1."""
    batch = context.loader.images.batch([Index(row, None)])
    extras = context.loader.extras(batch)
    seen = transforms.Preprocess(normalize.build(context.cfg, module, context.device))
    x = seen(batch.images.permute(0, 3, 1, 2))
    with kept(module) as layers:
        output = module(x, **extras)
        place, sign = _answer(context, output)
        # Its gradient says which features spoke for the answer.
        feature, slope = telling(layers, sign * output[0, place], module)
    cam = grad_cam(spatial(feature, module)[:1], spatial(slope, module)[:1], x.shape[2:])
    total = torch.zeros_like(x[0, 0])
    generator = torch.Generator().manual_seed(fold_in(row, 6))
    spread = NOISE * float(x[0].max() - x[0].min())
    for _ in range(NOISY):
        noise = torch.randn(x.shape, generator=generator).to(x.device) * spread
        noisy = (x + noise).requires_grad_()
        (slope,) = torch.autograd.grad(sign * module(noisy, **extras)[0, place], noisy)
        total += slope[0].abs().sum(0)
    smooth = total / total.max().clamp(min=1e-12)
    return arrays.to_uint8(batch.images[0].numpy()), cam[0].cpu().numpy(), smooth.cpu().numpy()


def _answer(context: Context, output: Tensor) -> tuple[int, int]:
    """Which output is explained: the first head's likeliest class, or its value; of a single logit, the side it took."""
    width = models.output_sizes(context.cfg, context.samples.heads)[0]
    head = context.samples.heads[0]
    if width == 1:
        return 0, -1 if head.spec.space == "logit" and float(output[0, 0]) < 0 else 1
    return int(output[0, :width].argmax()), 1


@contextmanager
def kept(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects features that still know where they are, in the order in which they are made: the stages that timm's feature_info
    names, through which everything goes, and at last forward_features; of a network of your own the convolutions."""
    layers: list[Tensor] = []
    backbone, _ = inner(module)

    def look(_part: nn.Module, _inputs: Any, output: Any) -> None:
        layers.append(output)

    info = getattr(backbone, "feature_info", None)
    stages = {each["module"] for each in info or () if each.get("module")}
    forward = getattr(backbone, "forward_features", None)
    parts = [
        part
        for name, part in backbone.named_modules()
        if (name in stages if forward is not None else isinstance(part, nn.Conv2d))
    ]
    handles = [part.register_forward_hook(look) for part in parts]
    if forward is not None:

        def keeping(*args: Tensor, **named: Tensor) -> Tensor:
            layers.append(forward(*args, **named))
            return layers[-1]

        backbone.forward_features = keeping
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()
        if forward is not None:
            del backbone.forward_features


def telling(layers: list[Tensor], answer: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """The last features that the answer hangs on everywhere and whose map is fine enough to look at, and their gradient. Of a
    32 px picture some networks end in a single square; behind the last attention a class token alone is read."""
    if not layers:
        raise Refused("comp explain: this network has neither forward_features nor a convolution to look at")
    slopes = torch.autograd.grad(answer, layers, allow_unused=True)
    read = [
        (layer, slope)
        for layer, slope in zip(layers, slopes, strict=True)
        if slope is not None and bool(spatial(slope, module).any())
    ]
    if not read:
        raise Refused("comp explain: the answer of this network hangs on no map of features")
    sides = [min(spatial(layer, module).shape[2:]) for layer, _ in read]
    fine = [pair for pair, side in zip(read, sides, strict=True) if side >= FINE]
    return fine[-1] if fine else read[sides.index(max(sides))]


def spatial(feature: Tensor, module: nn.Module) -> Tensor:
    """(batch, channels, rows, columns), whatever order a network keeps: tokens, channels last, or this."""
    network, _ = inner(module)
    if feature.ndim == 3:  # (batch, tokens, channels), class tokens first
        patches = feature[:, getattr(network, "num_prefix_tokens", 0) :]
        side = math.isqrt(patches.shape[1])
        return patches.transpose(1, 2).reshape(len(feature), feature.shape[2], side, -1)
    widths = {each["num_chs"] for each in getattr(network, "feature_info", None) or ()}
    widths.add(getattr(network, "num_features", feature.shape[1]))
    last = getattr(network, "output_fmt", "NCHW") == "NHWC" or feature.shape[1] not in widths
    return feature.permute(0, 3, 1, 2) if last and feature.shape[3] in widths else feature


def grad_cam(feature: Tensor, slope: Tensor, size: torch.Size) -> Tensor:
    """(batch, height, width), 0 to 1: each feature weighs as much as it raises the answer on average."""
    weight = slope.mean((2, 3), keepdim=True)
    cam = (weight * feature).sum(1, keepdim=True).clamp(min=0).detach()
    cam = F.interpolate(cam, tuple(size), mode="bilinear", align_corners=False)[:, 0]
    return cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)


def _plain(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(plots.to_rgb(image))


def _heat(values: NDArray[np.float32]) -> Image.Image:
    from matplotlib import colormaps

    return Image.fromarray((255 * colormaps["inferno"](values)[:, :, :3]).astype(np.uint8))


def _over(image: NDArray[np.uint8], cam: NDArray[np.float32]) -> Image.Image:
    return Image.blend(_plain(image), _heat(cam), 0.55)
