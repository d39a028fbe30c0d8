"""A grid of augmented images as training makes them, and the list of ops with where each runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from comp import transforms
from comp.data import epoch_rows
from comp.engine.config.schema import Config
from comp.engine.data import image_reader
from comp.engine.data.samples import Positions, Samples
from comp.engine.data.seeding import derive_seed
from comp.engine.errors import UserError
from comp.engine.readers.arrays import DamagedImage
from comp.engine.report import plots
from comp.engine.run import mixup
from comp.engine.run.normalize import Normalize
from comp.engine.store import artifacts

ROWS, DRAWS = 8, 7
GAP, TITLE = 6, 22  # px


def write(cfg: Config, samples: Samples, file: Path) -> None:
    """Eight samples, each as it is and in seven draws of the first epoch, mixed ones among them. The same
    config gives the same image."""
    epoch = transforms.epoch_augments(cfg)[0]
    chosen = epoch_rows(samples.positions("train"), 0, 0)[:ROWS]
    columns = _columns(cfg, samples, epoch, chosen)
    side = max(96, epoch.size) if epoch.size < 192 else 192
    size = GAP + (DRAWS + 1) * (side + GAP), TITLE + len(chosen) * (side + TITLE)
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    pen.text((GAP, GAP), f"{heading(cfg)}, {epoch.size} px: not augmented, then {DRAWS} draws", "black")
    for row, sample in enumerate(chosen):
        top = TITLE + row * (side + TITLE)
        pen.text((GAP, top), f"{samples.frame['id'].iloc[sample]}: {samples.label(int(sample))}", "black")
        for place, column in enumerate(columns):
            scaled = Image.fromarray(plots.to_rgb(column[row]))
            scaled = scaled.resize((side, side), Image.Resampling.NEAREST)
            grid.paste(scaled, (GAP + place * (side + GAP), top + TITLE - GAP))
    with artifacts.atomic(file) as temporary:
        grid.save(temporary, "png")


def _columns(
    cfg: Config, samples: Samples, epoch: transforms.EpochAugment, rows: Positions
) -> list[NDArray[Any]]:
    """The images of the rows, not augmented and then in each draw: (rows, size, size, channels)."""
    recipe = transforms.epoch_recipe(cfg, epoch)
    augment = transforms.Augment(recipe, epoch.size, epoch.size / cfg.data.size)
    # A fixed mean and deviation, so that the noise of random erasing is visible as noise.
    normalize = Normalize(torch.full((1, 1, 1), 128.0), torch.full((1, 1, 1), 64.0))
    preprocess, mix = transforms.Preprocess(normalize, recipe), mixup.epoch_mix(cfg, epoch)
    reader = image_reader.from_config(cfg)
    try:
        images = [reader.image(samples.frame["images"].iloc[row][0]) for row in rows]
    except DamagedImage as damaged:
        raise UserError(
            "image-damaged",
            where=damaged.name,
            what=damaged.reason,
            remedy="comp check lists every such file",
        ) from None
    resize = transforms.Augment(transforms.none(epoch.size), epoch.size)
    plain = np.stack([resize(image, seed=0) for image in images])
    columns = [_to_uint8(transforms.Preprocess(normalize)(torch.from_numpy(plain).permute(0, 3, 1, 2)))]
    for number in range(DRAWS):
        seeds = np.array([derive_seed(0, 0, int(row), number) for row in rows], np.int64)
        batch = np.stack([augment(*pair) for pair in zip(images, seeds.tolist(), strict=True)])
        drawn, _ = mix(preprocess(torch.from_numpy(batch).permute(0, 3, 1, 2), seeds), seeds)
        columns.append(_to_uint8(drawn))
    return columns


def _to_uint8(x: torch.Tensor) -> NDArray[Any]:
    return (x * 64 + 128).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def heading(cfg: Config) -> str:
    """The recipe and the other augmentation knobs that are on, in one line."""
    knobs = cfg.augment
    return ", ".join(
        [f"recipe {knobs.recipe}", *(f"{name} {getattr(knobs, name)}" for name in knobs.strong_ops)]
    )


def ops(cfg: Config) -> list[str]:
    """Every op of the first epoch in the order in which it runs, with where it runs."""
    recipe = transforms.epoch_recipe(cfg, transforms.epoch_augments(cfg)[0])
    lines = [*_recipe_lines(recipe)]
    for name in ("mixup", "cutmix", "mosaic"):
        if value := getattr(cfg.augment, name):
            what = {"mosaic": f"{value:g} of the images"}.get(name, f"alpha {value:g}")
            lines.append(f"{'pairs' if name != 'mosaic' else 'fours':9} device     {name}: {what}")
    if cfg.augment.disable_last_epochs:
        lines.append(
            f"the last {cfg.augment.disable_last_epochs} epochs without {', '.join(cfg.augment.strong_ops)}"
        )
    if cfg.augment.progressive_sizes:
        lines.append(
            f"sizes     {', '.join(map(str, cfg.augment.progressive_sizes))} px, in equal parts of the epochs"
        )
    return lines or ["no augmentation"]


def _recipe_lines(recipe: transforms.Recipe) -> Iterator[str]:
    runs_on = {"albumentations": "processes", "policy": "processes", "cv2": "threads", "batch": "device"}
    for name in ("geometry", "color", "batch"):
        for op in getattr(recipe, name):
            kind = transforms.op_type(op)
            yield f"{name:9} {runs_on[kind]:9}  {op.__qualname__.split('.')[0] if kind == 'cv2' else op}"
