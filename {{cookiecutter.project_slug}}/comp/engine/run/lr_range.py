"""comp lr-range: the learning-rate range test. Trains a new network with the real loop while the rate rises
from far too low to far too high, and suggests where the loss falls fastest.

Only a plot and a table are kept: it trains in a temporary folder and restores the state of the random number
generators.
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
from comp.engine.errors import UserError
from comp.engine.report import plots
from comp.engine.run import schedule, tracking
from comp.engine.run.context import Context
from comp.engine.store import artifacts

Array = NDArray[np.float64]
DIVERGED = 4.0  # times the lowest loss so far, at which the test ends
SMOOTHING = 0.9  # of the running mean that decides on it; the loss of one batch is too noisy
WINDOW = 20  # a plotted point averages over a twentieth of the steps to either side
MIN_POINTS = 10  # that a suggestion needs


class Point(NamedTuple):
    lr: float
    loss: float


class SweepFinished(Exception):
    """The loss has diverged, or the last learning rate is reached."""


def sweep(context: Context, low: float, high: float, steps: int, linear: bool) -> list[Point]:
    """The loss of each step of fold 0 and the first seed."""
    cfg = range_config(context.cfg, low, high, steps, linear)
    context = replace(context, cfg=cfg, folds=_Unscored(context.folds))
    epochs = math.ceil(steps / _train_length(context).steps_per_epoch)
    context = replace(context, cfg=_with(cfg, train={"epochs": epochs}))
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [context.device] if context.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), tempfile.TemporaryDirectory() as folder:
            log = _StepLog(Path(folder), steps)
            with log:
                try:
                    train.train_fold(context, context.cfg.train.seeds[0], 0, Path(folder), log)
                except SweepFinished:
                    pass
                except UserError as error:  # NaN before the loss was seen to diverge
                    if error.code != "loss-not-finite" or len(log.points) < MIN_POINTS:
                        raise
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
    return log.points


def range_config(cfg: Config, low: float, high: float, steps: int, linear: bool) -> Config:
    """The experiment with a rising learning rate, without what only costs time here."""
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


def smoothed(points: list[Point]) -> tuple[Array, Array]:
    """Loss and its slope over the logarithm of the learning rate: locally weighted linear regression around
    each step."""
    x, y = np.log([point.lr for point in points]), np.array([point.loss for point in points])
    step = np.arange(len(points))
    weight = np.exp(-0.5 * ((step[:, None] - step) / max(2.0, len(points) / WINDOW)) ** 2)
    weight /= weight.sum(1, keepdims=True)
    mean_x, mean_y = weight @ x, weight @ y
    slope = (weight @ (x * y) - mean_x * mean_y) / (weight @ (x * x) - mean_x * mean_x)
    return mean_y, slope


def suggest(points: list[Point]) -> float:
    """The learning rate where the loss falls fastest, before its minimum."""
    mean, slope = smoothed(points)
    lowest = int(mean.argmin())
    if len(points) < MIN_POINTS or lowest < 3 or slope[:lowest].min() >= 0:
        raise UserError(
            "lr-range-too-high",
            where="comp lr-range",
            what=f"the loss rises from learning rate {points[0].lr:.3g} on",
            remedy="start lower, with --low",
        )
    return points[int(slope[:lowest].argmin())].lr


def to_base_lr(context: Context, lr: float) -> float:
    """The value of optim.lr that gives this learning rate, if optim.lr_base_size scales it."""
    return (
        lr * context.cfg.optim.lr / schedule.peak_lr(context.cfg, _train_length(context).effective_batch_size)
    )


def write(cfg: Config, points: list[Point], png: Path, csv: Path, linear: bool) -> float:
    """Write plot and table; returns the suggested learning rate."""
    best, (smooth, _) = suggest(points), smoothed(points)
    lines = [
        f"{step},{point.lr!r},{point.loss!r},{float(mean)!r}"
        for step, (point, mean) in enumerate(zip(points, smooth, strict=True))
    ]
    artifacts.write_text(csv, "\n".join(["step,lr,loss,smoothed_loss", *lines]) + "\n")
    figure, axes = plots.new_figure(8, 4.5)
    lrs, losses = [point.lr for point in points], [point.loss for point in points]
    axes.plot(lrs, losses, color="tab:blue", alpha=0.25, linewidth=1, label="loss of a step")
    axes.plot(lrs, smooth, color="tab:blue", label="smoothed")
    axes.axvline(best, color="tab:red", linewidth=1, label=f"suggested: {best:.2g}")
    if not linear:
        axes.set_xscale("log")
    fall = float(smooth[0] - smooth.min())
    axes.set_ylim(float(smooth.min()) - 0.2 * fall, float(smooth[0]) + 0.3 * fall)
    axes.set(xlabel="learning rate", ylabel="training loss")
    batch_size = cfg.train.batch_size * cfg.train.grad_accum_steps
    axes.set_title(f"{cfg.optim.name}, {cfg.model.name}, {batch_size} images per step", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    plots.save(figure, png)
    return best


class _StepLog(tracking.RunLogger):
    """Collects the records of steps, and raises SweepFinished when the test is over."""

    def __init__(self, folder: Path, steps: int):
        super().__init__(folder, tracking.NoWandb(), [])
        self.steps = steps
        self.points: list[Point] = []
        self._mean, self._lowest = 0.0, math.inf

    def log(self, record: tracking.Record) -> None:
        if "lr" not in record:
            return
        lr, loss = float(record["lr"]), float(record["loss"])
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * loss
        smooth = self._mean / (1 - SMOOTHING ** (len(self.points) + 1))  # corrects for the start at zero
        self.points.append(Point(lr, loss))
        self._lowest = min(self._lowest, smooth)
        diverged = len(self.points) >= MIN_POINTS and smooth > DIVERGED * self._lowest
        if len(self.points) == self.steps or diverged:
            raise SweepFinished


class _Unscored(Folds):
    """Training rows only: a learning rate is not chosen on rows that are scored."""

    def __init__(self, folds: Folds):
        super().__init__(folds.frame, folds.meta, folds.samples)

    def split(self, fold: int | str) -> tuple[Positions, Positions]:
        train_rows, valid_rows = super().split(fold)
        return train_rows, valid_rows[:0]


def _train_length(context: Context) -> schedule.TrainLength:
    cfg = context.cfg
    rows = context.folds.split(0)[0][: cfg.train.max_samples]
    epoch_rows = data.epoch_rows(rows, 0, 0, class_balance.make_sampler(cfg, context.samples, rows))
    return schedule.train_length(cfg, len(epoch_rows))


def _with(cfg: Config, **sections: dict[str, Any]) -> Config:
    """Not validated: the schema does not allow the shapes of a range test as a schedule."""
    return cfg.model_copy(
        update={name: getattr(cfg, name).model_copy(update=values) for name, values in sections.items()}
    )
