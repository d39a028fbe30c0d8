"""Learning rate and momentum as functions of the step, so a resumed run needs no scheduler state for them.

Only the plateau schedule depends on training itself: on one loss per epoch, which the checkpoint holds. This
module does not import torch, so that `comp schedule` draws a schedule at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from comp.engine.config import duration, schema
from comp.engine.config.schema import Config
from comp.engine.errors import UserError

THRESHOLD = 1e-4  # plateau: a loss is better when it is lower by this share, as in torch


class TrainLength(NamedTuple):
    """How long a fold trains, independent of the number of processes."""

    batch_size: int  # samples per batch that the loader yields
    grad_accum_steps: int  # batches per optimizer step
    steps_per_epoch: int
    steps: int

    @property
    def effective_batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.batch_size * self.grad_accum_steps


def train_length(cfg: Config, epoch_size: int) -> TrainLength:
    """`epoch_size`: samples per epoch. A dataset smaller than a batch shrinks the batch; an incomplete last
    step is dropped."""
    batch_size = min(cfg.train.batch_size, epoch_size)
    grad_accum_steps = min(cfg.train.grad_accum_steps, epoch_size // batch_size)
    steps_per_epoch = epoch_size // (batch_size * grad_accum_steps)
    return TrainLength(batch_size, grad_accum_steps, steps_per_epoch, steps_per_epoch * cfg.train.epochs)


def peak_lr(cfg: Config, effective_batch_size: int) -> float:
    """The highest learning rate: optim.lr, scaled from optim.lr_base_size to the actual batch size if that is
    set."""
    if cfg.optim.lr_base_size is None:
        return cfg.optim.lr
    power = {"linear": 1.0, "sqrt": 0.5}[cfg.optim.lr_base_scale]
    return float(cfg.optim.lr * (effective_batch_size / cfg.optim.lr_base_size) ** power)


@dataclass(frozen=True)
class LRSchedule:
    """The schedule of one fold; steps count from 0."""

    knobs: schema.Schedule  # section schedule of the config
    peak_lr: float
    steps: int
    steps_per_epoch: int
    epoch_losses: list[float] = field(default_factory=list)  # training loss of the epochs so far, for plateau

    def __post_init__(self) -> None:
        name, after_warmup = self.knobs.name, self.steps - self.warmup_steps
        if name == "wsd" and self.in_steps(self.knobs.cooldown) > after_warmup:
            raise UserError(
                "schedule-too-long",
                key="schedule.cooldown",
                what=f"{self.knobs.cooldown} after a warm-up of {self.warmup_steps} steps is more than the "
                f"{self.steps} steps of the run",
                remedy="shorten one of them",
            )
        cyclic = ("cosine_restarts", "triangular", "exp_range")
        if name in cyclic and min(length for _, length in self.cycles) < 1:
            raise UserError(
                "schedule-too-long",
                key="schedule.cycles",
                what=f"{self.knobs.cycles} cycles in {after_warmup} steps leave a cycle without any step",
                remedy="lower it",
            )

    def in_steps(self, value: float | str) -> int:
        return duration.parse(value).in_steps(self.steps, self.steps_per_epoch)

    @property
    def warmup_steps(self) -> int:
        """At most half of the run: the decay to low learning rates must not be cut off."""
        return min(self.in_steps(self.knobs.warmup), self.steps // 2)

    def lr(self, step: int) -> float:
        return self.peak_lr * self.factor(step)

    def factor(self, step: int) -> float:
        """Learning rate relative to the peak: linear warm-up to the schedule's first value, then the
        schedule."""
        factor = SHAPES[self.knobs.name](self, max(0, step - self.warmup_steps)).factor
        return factor * min(1.0, (step + 1) / (self.warmup_steps + 1))

    def momentum(self, step: int) -> float | None:
        """None: the schedule does not change the momentum."""
        if self.knobs.momentum is None:
            return None
        height = SHAPES[self.knobs.name](self, max(0, step - self.warmup_steps)).height
        low, high = self.knobs.momentum
        return None if height is None else high + (low - high) * height

    @property
    def cycles(self) -> list[tuple[int, int]]:
        """(first step, steps) of each cycle. Together they fill the run after the warm-up."""
        count, multiplier = self.knobs.cycles, self.knobs.cycle_mul
        if self.knobs.name != "cosine_restarts":
            multiplier = 1.0
        ends = [sum(multiplier**i for i in range(k)) for k in range(count + 1)]
        edges = [
            self.warmup_steps + math.floor((self.steps - self.warmup_steps) * end / ends[-1] + 1e-9 + 0.5)
            for end in ends
        ]
        return [(a, b - a) for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True)
class StagedLRSchedule:
    """The schedule once per training stage, each with its own peak."""

    stages: list[LRSchedule]
    epoch_losses: list[float] = field(default_factory=list)

    def _at(self, step: int) -> tuple[LRSchedule, int]:
        for stage in self.stages[:-1]:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        return self.stages[-1], step

    def lr(self, step: int) -> float:
        stage, stage_step = self._at(step)
        return stage.lr(stage_step)

    def momentum(self, step: int) -> float | None:
        stage, stage_step = self._at(step)
        return stage.momentum(stage_step)


Schedule = LRSchedule | StagedLRSchedule


def lr_schedule(cfg: Config, length: TrainLength) -> Schedule:
    peak, steps_per_epoch = peak_lr(cfg, length.effective_batch_size), length.steps_per_epoch
    if cfg.train.stages:
        stages = [
            (stage.lr * peak / cfg.optim.lr, stage.epochs * steps_per_epoch) for stage in cfg.train.stages
        ]
        return StagedLRSchedule(
            [LRSchedule(cfg.schedule, lr, steps, steps_per_epoch) for lr, steps in stages]
        )
    restarts = cfg.snapshots.cycles and cfg.snapshots.restarts
    schedule = _snapshot_cycles(cfg) if restarts else cfg.schedule
    return LRSchedule(schedule, peak, length.steps, steps_per_epoch)


def stage_schedules(schedule: Schedule) -> list[LRSchedule]:
    """One per stage; the schedule itself in a run without stages."""
    return schedule.stages if isinstance(schedule, StagedLRSchedule) else [schedule]


def shortened_warmups(schedule: Schedule) -> list[str]:
    """A warning for each warm-up that was cut to half of its run or stage."""
    stages = stage_schedules(schedule)
    return [
        f"schedule.warmup: {stage.in_steps(stage.knobs.warmup):,} of the {stage.steps:,} steps of "
        f"{'the run' if len(stages) == 1 else f'stage {number}'}; shortened to {stage.warmup_steps:,} (at most half)"
        for number, stage in enumerate(stages, 1)
        if stage.warmup_steps < stage.in_steps(stage.knobs.warmup)
    ]


def snapshot_steps(cfg: Config, length: TrainLength) -> list[int]:
    """Steps done when each snapshot is taken: at the end of every cycle, whether the learning rate restarts
    there or not."""
    if not cfg.snapshots.cycles:
        return []
    schedule = LRSchedule(_snapshot_cycles(cfg), 1.0, length.steps, length.steps_per_epoch)
    return [first + steps for first, steps in schedule.cycles]


def _snapshot_cycles(cfg: Config) -> schema.Schedule:
    """Snapshot ensembles (Huang et al. 2017): cosine cycles of equal length and height."""
    return cfg.schedule.model_copy(
        update={
            "name": "cosine_restarts",
            "cycles": cfg.snapshots.cycles,
            "cycle_mul": 1.0,
            "cycle_decay": 1.0,
        }
    )


# --- shapes: (schedule, step after the warm-up) -> point ---------------------------------------------


class Point(NamedTuple):
    factor: float  # of the peak learning rate
    # Position in a cycle, from its ends (0) to its peak (1), which momentum mirrors; None: no such cycle.
    height: float | None = None


def constant(schedule: LRSchedule, step: int) -> Point:
    return Point(1.0)


def step_decay(schedule: LRSchedule, step: int) -> Point:
    """Multiplied by schedule.factor once per `step_size`, or at each of the times listed there."""
    step_size = schedule.knobs.step_size
    if isinstance(step_size, list):
        drops = sum(step + schedule.warmup_steps >= schedule.in_steps(at) for at in step_size)
    else:
        drops = step // max(1, schedule.in_steps(step_size))
    return Point(schedule.knobs.factor**drops)


def plateau(schedule: LRSchedule, step: int) -> Point:
    """Multiplied by schedule.factor after more than `patience` epochs without a better loss; never below
    min_lr_ratio."""
    drops, bad_epochs, best = 0, 0, math.inf
    for loss in schedule.epoch_losses:
        better = loss < best * (1 - THRESHOLD)
        best, bad_epochs = (loss, 0) if better else (best, bad_epochs + 1)
        if bad_epochs > schedule.knobs.patience:
            drops, bad_epochs = drops + 1, 0
    return Point(max(schedule.knobs.min_lr_ratio, schedule.knobs.factor**drops))


def linear(schedule: LRSchedule, step: int) -> Point:
    remaining = 1 - step / (schedule.steps - schedule.warmup_steps)
    return Point(_interpolate(schedule.knobs.min_lr_ratio, 1.0, remaining))


def cosine(schedule: LRSchedule, step: int) -> Point:
    height = _cosine_decay(step / (schedule.steps - schedule.warmup_steps))
    return Point(_interpolate(schedule.knobs.min_lr_ratio, 1.0, height))


def cosine_restarts(schedule: LRSchedule, step: int) -> Point:
    cycle, done = _cycle_at(schedule, step)
    top = schedule.knobs.cycle_decay**cycle
    return Point(_interpolate(schedule.knobs.min_lr_ratio, top, _cosine_decay(done)))


def one_cycle(schedule: LRSchedule, step: int) -> Point:
    """Up from `start_lr_ratio` to the peak, then down to min_lr_ratio."""
    done = step / (schedule.steps - schedule.warmup_steps)
    height, rising = _rise_and_fall(schedule, done, DECAYS[schedule.knobs.anneal_strategy])
    low = schedule.knobs.start_lr_ratio if rising else schedule.knobs.min_lr_ratio
    return Point(_interpolate(low, 1.0, height), height)


def triangular(schedule: LRSchedule, step: int) -> Point:
    """Cycles between min_lr_ratio and the peak, each lower than the one before by the factor
    `cycle_decay`."""
    cycle, done = _cycle_at(schedule, step)
    height, _ = _rise_and_fall(schedule, done, DECAYS["linear"])
    scaled = height * schedule.knobs.cycle_decay**cycle
    return Point(_interpolate(schedule.knobs.min_lr_ratio, 1.0, scaled), height)


def exp_range(schedule: LRSchedule, step: int) -> Point:
    """Like triangular, but lower with every step: by the factor `cycle_decay` over a cycle."""
    cycle, done = _cycle_at(schedule, step)
    height, _ = _rise_and_fall(schedule, done, DECAYS["linear"])
    scaled = height * schedule.knobs.cycle_decay ** (cycle + done)
    return Point(_interpolate(schedule.knobs.min_lr_ratio, 1.0, scaled), height)


def wsd(schedule: LRSchedule, step: int) -> Point:
    """Warm-up, stable, decay: the peak until the last `cooldown`."""
    cooldown = schedule.in_steps(schedule.knobs.cooldown)
    left = schedule.steps - schedule.warmup_steps - step
    if left >= cooldown:
        return Point(1.0)
    height = DECAYS[schedule.knobs.anneal_strategy](1 - left / cooldown)
    return Point(_interpolate(schedule.knobs.min_lr_ratio, 1.0, height))


def range_linear(schedule: LRSchedule, step: int) -> Point:
    """comp lr-range: from `start_lr_ratio` to the peak, in `step_size`."""
    return Point(_interpolate(schedule.knobs.start_lr_ratio, 1.0, _range_done(schedule, step)))


def range_exponential(schedule: LRSchedule, step: int) -> Point:
    return Point(schedule.knobs.start_lr_ratio ** (1 - _range_done(schedule, step)))


def _range_done(schedule: LRSchedule, step: int) -> float:
    assert not isinstance(schedule.knobs.step_size, list)
    return min(1.0, step / max(1, schedule.in_steps(schedule.knobs.step_size) - 1))


SHAPES: dict[str, Callable[[LRSchedule, int], Point]] = {
    "constant": constant, "step": step_decay, "plateau": plateau, "linear": linear, "cosine": cosine,
    "cosine_restarts": cosine_restarts, "one_cycle": one_cycle, "triangular": triangular,
    "exp_range": exp_range, "wsd": wsd, "range_linear": range_linear, "range_exponential": range_exponential,
}  # fmt: skip


def _interpolate(low: float, high: float, height: float) -> float:
    return low + (high - low) * height


def _cosine_decay(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


# Share done -> height, from 1 to 0.
DECAYS: dict[str, Callable[[float], float]] = {"cosine": _cosine_decay, "linear": lambda done: 1 - done}


def _cycle_at(schedule: LRSchedule, step: int) -> tuple[int, float]:
    """Index of the cycle, and the share of it that is done."""
    at = step + schedule.warmup_steps
    index = max(i for i, (first, _) in enumerate(schedule.cycles) if first <= at)
    first, length = schedule.cycles[index]
    return index, (at - first) / length


def _rise_and_fall(schedule: LRSchedule, done: float, decay: Callable[[float], float]) -> tuple[float, bool]:
    """(height, still rising): up during pct_start of the cycle, down during the rest."""
    rise = schedule.knobs.pct_start
    if done < rise:
        return 1 - decay(done / rise), True
    return decay((done - rise) / (1 - rise)), False
