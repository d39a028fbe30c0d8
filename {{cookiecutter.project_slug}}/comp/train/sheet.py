"""The contact sheet of a recipe: what the network will really see, drawn as training draws it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from comp import store
from comp.config import Config, Refused
from comp.prepare import making
from comp.prepare.images import Damaged
from comp.samples import Samples
from comp.train import augment
from comp.train.data import epoch_list, mixed

ROWS, DRAWS = 8, 7


def write(cfg: Config, samples: Samples, file: Path) -> None:
    """Eight samples, each as it is and as seven draws. The same config, the same picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chosen = epoch_list(samples.positions("train"), 0, 0)[:ROWS]
    how = making.of(cfg)
    change = augment.Augment(augment.named(cfg), cfg.data.size)
    figure, axes = plt.subplots(len(chosen), DRAWS + 1, figsize=(1.35 * (DRAWS + 1), 1.45 * len(chosen)), squeeze=False)
    for row, sample in enumerate(chosen):
        try:
            picture = how.picture(samples.frame["images"].iloc[sample][0])
        except Damaged as damaged:
            raise Refused(f"{damaged}; comp check lists every such file") from None
        drawn = [change(picture, mixed(0, 0, int(sample), n)) for n in range(DRAWS)]
        for column, shown in enumerate([augment.centred(picture, cfg.data.size), *drawn]):
            axes[row][column].imshow(shown.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes[row][column].set_axis_off()
        axes[row][0].set_title(_label(samples, int(sample)), fontsize=7, loc="left")
    figure.suptitle(f"recipe {cfg.augment.recipe}, {cfg.data.size} px: as it is, then {DRAWS} draws", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    with store.writing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def _label(samples: Samples, sample: int) -> str:
    """The id, and what the first head says of it."""
    head = samples.heads[0]
    values = samples.targets(head)[sample]
    if head.classes and len(values) == 1:
        text = head.classes[int(values[0])]
    elif head.row.space == "logit":
        text = head.outputs[int(np.argmax(values))]
    else:
        text = f"{values[0]:g}"
    return f"{samples.frame['id'].iloc[sample]}: {text}"
