"""The contact sheet of a recipe: what the network will really see, drawn as training draws it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from comp import transforms
from comp.data import epoch_rows
from comp.engine.config.schema import Config
from comp.engine.data import image_reader
from comp.engine.data.samples import Samples
from comp.engine.data.seeding import fold_in
from comp.engine.errors import Refused
from comp.engine.readers.arrays import DamagedImage
from comp.engine.report import plots
from comp.engine.run import mixup, policies
from comp.engine.run.gpu_augment import BatchOp
from comp.engine.run.normalize import Normalize
from comp.engine.store import artifacts

ROWS, DRAWS = 8, 7
GAP, TITLE = 6, 22  # px


def write(cfg: Config, samples: Samples, file: Path) -> None:
    """Eight samples, each as it is and as seven draws of the first day, pairs and fours among them. The same config, the
    same picture."""
    today = transforms.epoch_augments(cfg)[0]
    recipe = transforms.epoch_recipe(cfg, today)
    change = transforms.Augment(recipe, today.size, today.size / cfg.data.size)
    grey = Normalize(
        torch.full((1, 1, 1), 128.0), torch.full((1, 1, 1), 64.0)
    )  # so that erasing's noise shows as noise
    seen, mix = transforms.Preprocess(grey, recipe), mixup.epoch_mix(cfg, today)
    reader = image_reader.from_config(cfg)
    chosen = epoch_rows(samples.positions("train"), 0, 0)[:ROWS]
    side = max(96, today.size) if today.size < 192 else 192
    sheet = Image.new(
        "RGB", (GAP + (DRAWS + 1) * (side + GAP), TITLE + len(chosen) * (side + TITLE)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), f"{heading(cfg)}, {today.size} px: as it is, then {DRAWS} draws", "black")
    try:
        loaded = [reader.image(samples.frame["images"].iloc[sample][0]) for sample in chosen]
    except DamagedImage as damaged:
        raise Refused(f"{damaged}; comp check lists every such file") from None
    plain = np.stack([transforms.center_crop(image, today.size) for image in loaded])
    columns = [_shown(transforms.Preprocess(grey)(torch.from_numpy(plain).permute(0, 3, 1, 2)))]
    for number in range(DRAWS):
        seeds = np.array([fold_in(0, 0, int(sample), number) for sample in chosen], np.int64)
        batch = np.stack([change(*each) for each in zip(loaded, seeds.tolist(), strict=True)])
        drawn, _ = mix(seen(torch.from_numpy(batch).permute(0, 3, 1, 2), seeds), seeds)
        columns.append(_shown(drawn))
    for row, sample in enumerate(chosen):
        top = TITLE + row * (side + TITLE)
        pen.text((GAP, top), f"{samples.frame['id'].iloc[sample]}: {samples.label(int(sample))}", "black")
        for place, column in enumerate(columns):
            scaled = Image.fromarray(plots.to_rgb(column[row]))
            scaled = scaled.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(scaled, (GAP + place * (side + GAP), top + TITLE - GAP))
    with artifacts.atomic(file) as temporary:
        sheet.save(temporary, "png")


def _shown(x: torch.Tensor) -> np.ndarray:
    return (x * 64 + 128).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def heading(cfg: Config) -> str:
    """The recipe and the knobs beside it that are on, in one line."""
    knobs = cfg.augment
    return ", ".join([f"recipe {knobs.recipe}", *(f"{name} {getattr(knobs, name)}" for name in knobs.strong)])


def ops(cfg: Config) -> list[str]:
    """Every op of the first day in the order in which a picture meets it, with where it runs."""
    recipe = transforms.epoch_recipe(cfg, transforms.epoch_augments(cfg)[0])
    lines = [*_of_recipe(recipe)]
    for name in ("mixup", "cutmix", "mosaic"):
        if value := getattr(cfg.augment, name):
            what = {"mosaic": f"{value:g} of the pictures"}.get(name, f"alpha {value:g}")
            lines.append(f"{'pairs' if name != 'mosaic' else 'fours':9} device     {name}: {what}")
    if cfg.augment.disable_last_epochs:
        lines.append(
            f"the last {cfg.augment.disable_last_epochs} epochs without {', '.join(cfg.augment.strong)}"
        )
    if cfg.augment.progressive_sizes:
        lines.append(
            f"sizes     {', '.join(map(str, cfg.augment.progressive_sizes))} px, in equal parts of the epochs"
        )
    return lines or ["nothing: pictures as they are"]


def _of_recipe(recipe: transforms.Recipe) -> Iterator[str]:
    for name in ("geometry", "colour", "batch"):
        for op in getattr(recipe, name):
            if isinstance(op, policies.Policy):
                yield f"{name:9} processes  {op.name}, out of: {', '.join(policies.ops(op))}"
            elif isinstance(op, BatchOp):
                yield f"{name:9} device     {op.name}"
            else:
                native = transforms.op_type(op) == "native"
                yield f"{name:9} {'threads   ' if native else 'processes '} {op.__qualname__.split('.')[0] if native else op}"
