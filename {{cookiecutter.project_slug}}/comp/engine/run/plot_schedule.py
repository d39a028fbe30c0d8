"""comp schedule: the rate of a run before anything runs. Neither pictures nor torch are needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from comp.engine.config.resolve import Loaded
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.report import plots
from comp.engine.run import pseudo_rows, schedule
from comp.engine.run.schedule import LRSchedule, StagedLRSchedule, TrainLength
from comp.engine.run.unused_knobs import CYCLIC
from comp.engine.store import paths

MOST_POINTS = 4000  # more cannot be told apart


def plot(loaded: Loaded, experiment: str) -> None:
    """Fold 0 speaks for the others: they differ by a few steps."""
    table = samples.load()
    split = folds.load(table)
    folds.validate_plan(split, loaded)
    cfg = loaded.config
    if cfg.data.pseudo_labels is not None:
        pseudo_rows.validate(cfg, split)
        table = pseudo_rows.add_rows(
            table, pseudo_rows.read(cfg.data.pseudo_labels), cfg.data.pseudo_labels, 0
        )
    taught = replace(split, samples=table).split(0)[0][: cfg.train.max_samples]
    drawn = len(taught) * cfg.augment.jsd_views
    if cfg.sampling.balance != "none":  # rare classes may be drawn more often than they are there
        from comp import data
        from comp.engine.data import class_balance

        drawn = len(data.epoch_rows(taught, 0, 0, class_balance.make_sampler(cfg, table, taught)))
    span = schedule.train_length(cfg, drawn)
    curve = schedule.lr_schedule(cfg, span)
    file = paths.path("runs", f"{experiment}-schedule.png")
    _picture(cfg, curve, span, file)
    print(*summary(cfg, curve, span), sep="\n")
    print(f"{paths.relative(file)}\nnext: comp train {experiment}")


def summary(cfg: Config, curve: LRSchedule | StagedLRSchedule, span: TrainLength) -> list[str]:
    first, *later = schedule.stage_schedules(curve)
    rates = [curve.rate(step) for step in range(span.steps)]
    lasting = f"{span.steps:,} steps, {span.steps_per_epoch:,} an epoch, {span.effective} images each"
    if span.accumulate > 1:
        lasting += f" ({span.batch_size} x {span.accumulate})"
    if later:
        lasting += f", the schedule once for each of {1 + len(later)} stages"
    lines = [
        f"{first.schedule.name}: {lasting}",
        f"rate: first {rates[0]:.3g}, highest {max(rates):.3g} at step {rates.index(max(rates)):,}, last {rates[-1]:.3g}",
    ]
    if first.peak != cfg.optim.lr and not later:
        lines.append(
            f"optim.lr {cfg.optim.lr:g} is meant for {cfg.optim.lr_base_size} images; {cfg.optim.lr_base_scale} scaling makes it {first.peak:.4g}"
        )
    momenta = [m for step in range(span.steps) if (m := curve.momentum(step)) is not None]
    if momenta:
        lines.append(f"momentum: {min(momenta):.3g} at the peak, {max(momenta):.3g} away from it")
    if first.schedule.name in CYCLIC and not later:
        lines.append(
            "cycles end after step " + ", ".join(f"{start + length:,}" for start, length in first.cycles)
        )
    lines += schedule.shortened_warmups(curve)
    if first.schedule.name == "plateau":
        lines.append("plateau: drawn as if every epoch were better than the one before")
    return lines


def _picture(cfg: Config, curve: LRSchedule | StagedLRSchedule, span: TrainLength, file: Path) -> None:
    first, *later = schedule.stage_schedules(curve)
    steps = range(0, span.steps, max(1, span.steps // MOST_POINTS))
    at = [step / span.steps_per_epoch for step in steps]
    figure, axes = plots.new_figure(9, 4)
    axes.plot(at, [curve.rate(step) for step in steps], color="tab:blue", drawstyle="steps-post")
    axes.set(xlabel=f"epoch of {span.steps_per_epoch:,} steps", ylabel="rate", xlim=(0, cfg.train.epochs))
    axes.set_ylim(bottom=0)
    if warm := first.warmup:
        axes.axvspan(0, warm / span.steps_per_epoch, color="tab:orange", alpha=0.15, linewidth=0)
        axes.annotate(
            "warm-up",
            (0, 1),
            xycoords="axes fraction",
            xytext=(4, -12),
            textcoords="offset points",
            fontsize=8,
        )
    momenta = [curve.momentum(step) for step in steps]
    if momenta[-1] is not None:
        right = axes.twinx()
        right.plot(at, [m or 0.0 for m in momenta], color="tab:green", linewidth=1)
        right.set_ylabel("momentum", color="tab:green")
    peaks = ", ".join(f"{part.peak:.3g}" for part in (first, *later))
    axes.set_title(
        f"{first.schedule.name}, peak {peaks}, {span.effective} images a step, {span.steps:,} steps",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    plots.save(figure, file)
