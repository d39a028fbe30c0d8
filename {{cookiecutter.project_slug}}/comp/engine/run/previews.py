"""comp augment, comp schedule, comp lr-range: what an experiment does, before it is trained. A config is
resolved and refused here before the modules that draw import torch."""

from __future__ import annotations

import sys

from comp.engine import hardware
from comp.engine.config import experiments
from comp.engine.data import samples
from comp.engine.errors import UserError
from comp.engine.run import loading, plot_schedule, unused_knobs
from comp.engine.store import paths

LR_RANGE_STEPS = 10  # at least, or there is no curve


def augment(experiment: str, overrides: list[str]) -> None:
    loaded = experiments.load(experiment, overrides)
    cfg = loaded.config
    hardware.set_threads(cfg.train.threads)
    from comp.engine.run import augment_grid

    file = paths.path("runs", f"{experiment}-augment.png")
    with loaded.locating():
        augment_grid.write(cfg, samples.load(), file)
    print(*augment_grid.ops(cfg), sep="\n")
    print(f"written: {paths.relative(file)}: the original in the first column, then seven augmented images")
    print(f"next: comp train {experiment}")


def schedule(experiment: str, overrides: list[str], *, debug: bool = False) -> None:
    loaded = experiments.load(experiment, overrides, debug)
    for message in unused_knobs.messages(loaded):
        print(message, file=sys.stderr)
    plot_schedule.plot(loaded, experiment)


def lr_range(
    experiment: str, overrides: list[str], *, low: float, high: float, steps: int, linear: bool
) -> None:
    if not 0 < low < high:
        what = "the range of learning rates must start above 0 and rise"
        raise UserError("range-invalid", where=f"--low {low:g} --high {high:g}", what=what)
    if steps < LR_RANGE_STEPS:
        what = f"a range test needs at least {LR_RANGE_STEPS} steps"
        raise UserError("range-invalid", where=f"--steps {steps}", what=what)
    loaded = experiments.load(experiment, overrides)
    cfg = loaded.config
    hardware.set_threads(cfg.train.threads)
    context = loading.load_context(cfg, loaded)
    from comp.engine.run import lr_range

    png, csv = (paths.path("runs", f"{experiment}-lr-range.{kind}") for kind in ("png", "csv"))
    points = lr_range.sweep(context, low, high, steps, linear)
    lr = lr_range.to_base_lr(context, lr_range.write(cfg, points, png, csv, linear))
    tested = f"{len(points)} steps, learning rates {points[0].lr:.3g} to {points[-1].lr:.3g}"
    print(f"{tested}; suggested: optim.lr={lr:.2g}")
    print(f"written: {paths.relative(png)}, {paths.relative(csv)}")
    print(f"next: comp train {experiment} --as {experiment}r optim.lr={lr:.2g}")
