"""The contact sheet of a recipe: what the network will really see, drawn as training draws it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from comp import store
from comp.config import Config, Refused
from comp.prepare import making
from comp.prepare.images import Damaged
from comp.samples import Samples
from comp.train import augment
from comp.train.data import epoch_list
from comp.train.draws import mixed

ROWS, DRAWS = 8, 7
GAP, TITLE = 6, 22  # px


def write(cfg: Config, samples: Samples, file: Path) -> None:
    """Eight samples, each as it is and as seven draws. The same config, the same picture."""
    recipe = augment.named(cfg)
    change = augment.Augment(recipe, cfg.data.size)
    seen = augment.Seen((torch.zeros(1, 1, 1), torch.ones(1, 1, 1)), recipe)
    how = making.of(cfg)
    chosen = epoch_list(samples.positions("train"), 0, 0)[:ROWS]
    side = max(96, cfg.data.size) if cfg.data.size < 192 else 192
    sheet = Image.new(
        "RGB", (GAP + (DRAWS + 1) * (side + GAP), TITLE + len(chosen) * (side + TITLE)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    pen.text(
        (GAP, GAP), f"recipe {cfg.augment.recipe}, {cfg.data.size} px: as it is, then {DRAWS} draws", "black"
    )
    for row, sample in enumerate(chosen):
        try:
            picture = how.picture(samples.frame["images"].iloc[sample][0])
        except Damaged as damaged:
            raise Refused(f"{damaged}; comp check lists every such file") from None
        seeds = [mixed(0, 0, int(sample), n) for n in range(DRAWS)]
        batch = torch.from_numpy(np.stack([change(picture, seed) for seed in seeds])).permute(0, 3, 1, 2)
        drawn = seen(batch, np.array(seeds)).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        top = TITLE + row * (side + TITLE)
        pen.text((GAP, top), f"{samples.frame['id'].iloc[sample]}: {samples.label(int(sample))}", "black")
        for column, shown in enumerate([augment.centred(picture, cfg.data.size), *drawn]):
            scaled = Image.fromarray(shown.squeeze()).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(scaled, (GAP + column * (side + GAP), top + TITLE - GAP))
    with store.writing(file) as temporary:
        sheet.save(temporary, "png")
