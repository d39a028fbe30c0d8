"""comp lr-range: the real loop on a network of its own, while the rate climbs from far too low to far too high.

Nothing of it stays but a picture and a table: it trains in a temporary folder, and gives back the random numbers it found.
"""

from __future__ import annotations

import math
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from comp import data, train
from comp.engine.config.schema import Config
from comp.engine.data import class_balance
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Positions
from comp.engine.errors import Refused, UserError
from comp.engine.report import plots
from comp.engine.run import schedule, tracking
from comp.engine.run.context import Context
from comp.engine.store import artifacts

Values = NDArray[np.float64]
DIVERGED = 4.0  # times the lowest loss so far, which is where it ends
SMOOTH = 0.9  # of the running mean that decides on it; a single batch says little
WIDTH = 20  # a twentieth of the steps is what a point of the drawn curve leans on, to either side
MIN_POINTS = 10  # points that a suggestion needs


class Point(NamedTuple):
    rate: float
    loss: float


class SweepFinished(Exception):
    """The loss has flown away, or the last rate is reached."""


def sweep(context: Context, low: float, high: float, steps: int, linear: bool) -> list[Point]:
    """What the loss of each step was, beginning with fold 0 of the first seed."""
    quiet = replace(
        context, cfg=range_config(context.cfg, low, high, steps, linear), folds=_Unscored(context.folds)
    )
    span = _span(quiet)
    epochs = math.ceil(steps / span.steps_per_epoch)
    quiet = replace(quiet, cfg=_with(quiet.cfg, train={"epochs": epochs}))
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [context.device] if context.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), tempfile.TemporaryDirectory() as folder:
            listener = _Listener(Path(folder), steps)
            with listener:
                try:
                    train.fold(quiet, context.cfg.train.seeds[0], 0, Path(folder), listener)
                except SweepFinished:
                    pass
                except UserError as refused:  # the loss was no number before it was large
                    if "the loss is" not in str(refused) or len(listener.points) < MIN_POINTS:
                        raise
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
    return listener.points


def range_config(cfg: Config, low: float, high: float, steps: int, linear: bool) -> Config:
    """The experiment itself, but for its rate, and for what only costs time here."""
    shape = {
        "name": "range_linear" if linear else "range_exponential",
        "start_lr_ratio": low / high,
        "step_size": f"{steps} steps",
    }
    return _with(
        cfg,
        data={"pseudo_labels": None},
        distill={"teacher": None},
        schedule={**shape, "warmup": 0, "momentum": None},
        optim={"lr": high, "lr_base_size": None},
        train={"ema_decay": None, "checkpoint_every": 0},
        snapshots={"cycles": None},
        average={"predict_with": "default", "members": []},
        select={"name": "last"},
    )


def smoothed(points: list[Point]) -> tuple[Values, Values]:
    """Loss and its slope over the logarithm of the rate: around each step a line through its neighbours, the near ones counting most."""
    x, y = np.log([point.rate for point in points]), np.array([point.loss for point in points])
    step = np.arange(len(points))
    near = np.exp(-0.5 * ((step[:, None] - step) / max(2.0, len(points) / WIDTH)) ** 2)
    near /= near.sum(1, keepdims=True)
    mean_x, mean_y = near @ x, near @ y
    slope = (near @ (x * y) - mean_x * mean_y) / (near @ (x * x) - mean_x * mean_x)
    return mean_y, slope


def suggest(points: list[Point]) -> float:
    """Where the loss falls steepest, before it is lowest."""
    mean, slope = smoothed(points)
    lowest = int(mean.argmin())
    if len(points) < MIN_POINTS or lowest < 3 or slope[:lowest].min() >= 0:
        raise Refused(f"lr-range: the loss rises from rate {points[0].rate:.3g} on: begin lower, with --low")
    return points[int(slope[:lowest].argmin())].rate


def to_base_lr(context: Context, rate: float) -> float:
    """What optim.lr has to say for it, where optim.lr_base_size scales that."""
    return rate * context.cfg.optim.lr / schedule.peak_lr(context.cfg, _span(context).effective)


def write(cfg: Config, points: list[Point], png: Path, csv: Path, linear: bool) -> float:
    """The picture and the table, and the suggestion."""
    best, (smooth, _) = suggest(points), smoothed(points)
    lines = [
        f"{step},{point.rate!r},{point.loss!r},{float(mean)!r}"
        for step, (point, mean) in enumerate(zip(points, smooth, strict=True))
    ]
    artifacts.write_text(csv, "\n".join(["step,rate,loss,smooth", *lines]) + "\n")
    figure, axes = plots.new_figure(8, 4.5)
    rates = [point.rate for point in points]
    axes.plot(
        rates,
        [point.loss for point in points],
        color="tab:blue",
        alpha=0.25,
        linewidth=1,
        label="loss of a step",
    )
    axes.plot(rates, smooth, color="tab:blue", label="smoothed")
    axes.axvline(best, color="tab:red", linewidth=1, label=f"suggested: {best:.2g}")
    if not linear:
        axes.set_xscale("log")
    fall = float(smooth[0] - smooth.min())
    axes.set_ylim(float(smooth.min()) - 0.2 * fall, float(smooth[0]) + 0.3 * fall)
    axes.set(xlabel="rate", ylabel="training loss")
    axes.set_title(
        f"{cfg.optim.name}, {cfg.model.name}, {cfg.train.batch_size * cfg.train.grad_accum_steps} images a step",
        fontsize=10,
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    plots.save(figure, png)
    return best


class _Listener(tracking.RunLogger):
    """Hears of every step, and has heard enough at some point."""

    def __init__(self, folder: Path, steps: int):
        super().__init__(folder, tracking.NoWandb(), [])
        self.steps = steps
        self.points: list[Point] = []
        self._mean, self._lowest = 0.0, math.inf

    def log(self, record: tracking.Record) -> None:
        if "lr" not in record:
            return
        rate, loss = float(record["lr"]), float(record["loss"])
        self._mean = SMOOTH * self._mean + (1 - SMOOTH) * loss
        smooth = self._mean / (1 - SMOOTH ** (len(self.points) + 1))  # as if it had not begun at zero
        self.points.append(Point(rate, loss))
        self._lowest = min(self._lowest, smooth)
        if len(self.points) == self.steps or (
            len(self.points) >= MIN_POINTS and smooth > DIVERGED * self._lowest
        ):
            raise SweepFinished


class _Unscored(Folds):
    """The training part of a fold alone: a rate is not chosen on rows that are scored."""

    def __init__(self, folds: Folds):
        super().__init__(folds.frame, folds.meta, folds.samples)

    def split(self, fold: int | str) -> tuple[Positions, Positions]:
        taught, scored = super().split(fold)
        return taught, scored[:0]


def _span(context: Context) -> schedule.TrainLength:
    cfg = context.cfg
    taught = context.folds.split(0)[0][: cfg.train.max_samples]
    drawn = data.epoch_rows(taught, 0, 0, class_balance.make_sampler(cfg, context.samples, taught))
    return schedule.train_length(cfg, len(drawn))


def _with(cfg: Config, **sections: dict[str, Any]) -> Config:
    """Not validated again: the shapes of a range test are no schedule to train with."""
    return cfg.model_copy(
        update={name: getattr(cfg, name).model_copy(update=values) for name, values in sections.items()}
    )
