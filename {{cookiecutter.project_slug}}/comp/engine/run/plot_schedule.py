"""comp schedule: the learning rate of a run, plotted before anything runs. Needs neither images nor torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from comp.engine.config.resolve import Loaded
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.report import plots
from comp.engine.run import pseudo_rows, schedule
from comp.engine.run.schedule import Schedule, TrainLength
from comp.engine.run.unused_knobs import CYCLIC
from comp.engine.store import paths

MAX_POINTS = 4000  # more are not visible


def plot(loaded: Loaded, experiment: str) -> None:
    """Plot and print the schedule of fold 0; other folds differ by a few steps."""
    cfg = loaded.config
    length = _train_length(loaded)
    lr_schedule = schedule.lr_schedule(cfg, length)
    file = paths.path("runs", f"{experiment}-schedule.png")
    _plot(cfg, lr_schedule, length, file)
    print(*summary(cfg, lr_schedule, length), sep="\n")
    print(f"written: {paths.relative(file)}\nnext: comp train {experiment}")


def _train_length(loaded: Loaded) -> TrainLength:
    cfg, table = loaded.config, samples.load()
    split = folds.load(table)
    folds.validate_plan(split, loaded)
    if cfg.data.pseudo_labels is not None:
        pseudo_rows.validate(cfg, split)
        table = pseudo_rows.add_rows(
            table, pseudo_rows.read(cfg.data.pseudo_labels), cfg.data.pseudo_labels, 0
        )
    rows = replace(split, samples=table).split(0)[0][: cfg.train.max_samples]
    epoch_size = len(rows) * cfg.augment.jsd_views
    if cfg.sampling.balance != "none":  # oversampling makes an epoch longer
        from comp import data
        from comp.engine.data import class_balance

        epoch_size = len(data.epoch_rows(rows, 0, 0, class_balance.make_sampler(cfg, table, rows)))
    return schedule.train_length(cfg, epoch_size)


def summary(cfg: Config, lr_schedule: Schedule, length: TrainLength) -> list[str]:
    first, *later = schedule.stage_schedules(lr_schedule)
    lrs = [lr_schedule.lr(step) for step in range(length.steps)]
    steps = f"{length.steps:,} steps, {length.steps_per_epoch:,} per epoch, "
    steps += f"{length.effective_batch_size} images each"
    if length.grad_accum_steps > 1:
        steps += f" ({length.batch_size} x {length.grad_accum_steps})"
    if later:
        steps += f", the schedule once for each of {1 + len(later)} stages"
    lines = [
        f"{first.knobs.name}: {steps}",
        f"learning rate: first {lrs[0]:.3g}, highest {max(lrs):.3g} at step {lrs.index(max(lrs)):,}, "
        f"last {lrs[-1]:.3g}",
    ]
    if first.peak_lr != cfg.optim.lr and not later:
        lines.append(
            f"optim.lr {cfg.optim.lr:g} is for {cfg.optim.lr_base_size} images; "
            f"{cfg.optim.lr_base_scale} scaling makes it {first.peak_lr:.4g}"
        )
    momenta = [m for step in range(length.steps) if (m := lr_schedule.momentum(step)) is not None]
    if momenta:
        lines.append(f"momentum: {min(momenta):.3g} at the peak, {max(momenta):.3g} away from it")
    if first.knobs.name in CYCLIC and not later:
        ends = ", ".join(f"{start + steps:,}" for start, steps in first.cycles)
        lines.append(f"cycles end after step {ends}")
    lines += schedule.shortened_warmups(lr_schedule)
    if first.knobs.name == "plateau":
        lines.append("plateau: plotted as if every epoch were better than the one before")
    return lines


def _plot(cfg: Config, lr_schedule: Schedule, length: TrainLength, file: Path) -> None:
    first, *later = schedule.stage_schedules(lr_schedule)
    steps = range(0, length.steps, max(1, length.steps // MAX_POINTS))
    epochs = [step / length.steps_per_epoch for step in steps]
    figure, axes = plots.new_figure(9, 4)
    axes.plot(epochs, [lr_schedule.lr(step) for step in steps], color="tab:blue", drawstyle="steps-post")
    axes.set(xlabel=f"epoch of {length.steps_per_epoch:,} steps", ylabel="learning rate")
    axes.set_xlim(0, cfg.train.epochs)
    axes.set_ylim(bottom=0)
    if first.warmup_steps:
        axes.axvspan(
            0, first.warmup_steps / length.steps_per_epoch, color="tab:orange", alpha=0.15, linewidth=0
        )
        axes.annotate(
            "warm-up",
            (0, 1),
            xycoords="axes fraction",
            xytext=(4, -12),
            textcoords="offset points",
            fontsize=8,
        )
    momenta = [lr_schedule.momentum(step) for step in steps]
    if momenta[-1] is not None:
        right = axes.twinx()
        right.plot(epochs, [m or 0.0 for m in momenta], color="tab:green", linewidth=1)
        right.set_ylabel("momentum", color="tab:green")
    peaks = ", ".join(f"{stage.peak_lr:.3g}" for stage in (first, *later))
    axes.set_title(
        f"{first.knobs.name}, peak {peaks}, {length.effective_batch_size} images per step, "
        f"{length.steps:,} steps",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    plots.save(figure, file)
