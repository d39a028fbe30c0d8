"""The rate and the momentum as functions of the step. A resumed run needs no state of a scheduler for them.

Only the plateau schedule looks at how training goes: at one number an epoch, which the checkpoint carries.
No torch in here, so that `comp schedule` can draw a curve at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from comp.engine.config import duration
from comp.engine.config.schema import Config, Schedule
from comp.engine.errors import Refused

BETTER = 1e-4  # plateau: a loss counts as better when it is lower by this share, as in torch


class TrainLength(NamedTuple):
    """How long a fold trains, however many processes share the work."""

    batch_size: int  # images a forward pass
    accumulate: int  # forward passes a step
    steps_per_epoch: int
    steps: int

    @property
    def effective(self) -> int:
        """Images a step."""
        return self.batch_size * self.accumulate


def train_length(cfg: Config, drawn: int) -> TrainLength:
    """`drawn` is how many samples an epoch draws. A set smaller than a batch is a batch; what does not fill a step is left out."""
    batch_size = min(cfg.train.batch_size, drawn)
    accumulate = min(cfg.train.grad_accum_steps, drawn // batch_size)
    steps_per_epoch = drawn // (batch_size * accumulate)
    return TrainLength(batch_size, accumulate, steps_per_epoch, steps_per_epoch * cfg.train.epochs)


def peak_lr(cfg: Config, effective: int) -> float:
    """The highest rate: optim.lr is meant for optim.lr_base_size images a step, if that is said."""
    if cfg.optim.lr_base_size is None:
        return cfg.optim.lr
    power = {"linear": 1.0, "sqrt": 0.5}[cfg.optim.lr_base_scale]
    return float(cfg.optim.lr * (effective / cfg.optim.lr_base_size) ** power)


@dataclass(frozen=True)
class LRSchedule:
    """The schedule of one fold."""

    schedule: Schedule
    peak: float
    steps: int
    steps_per_epoch: int
    seen: list[float] = field(default_factory=list)  # plateau: the loss of every epoch so far

    def __post_init__(self) -> None:
        if self.schedule.name == "wsd" and self.warmup + self.in_steps(self.schedule.cooldown) > self.steps:
            raise Refused(
                f"schedule.cooldown: {self.schedule.cooldown} after a warm-up of {self.warmup} steps is more than the {self.steps} steps of the run"
            )
        if (
            self.schedule.name in ("cosine_restarts", "triangular", "exp_range")
            and min(length for _, length in self.cycles) < 1
        ):
            raise Refused(
                f"schedule.cycles: {self.schedule.cycles} cycles in {self.steps - self.warmup} steps leave one without any"
            )

    def in_steps(self, value: float | str) -> int:
        return duration.parse(value).in_steps(self.steps, self.steps_per_epoch)

    @property
    def warmup(self) -> int:
        """Steps. At most half of the run: the schedule proper, down to low rates, is what a run must not lose."""
        return min(self.in_steps(self.schedule.warmup), self.steps // 2)

    def rate(self, step: int) -> float:
        return self.peak * self.share(step)

    def share(self, step: int) -> float:
        """The rate at a step (from 0) as a share of the peak: linear warm-up to the first value of the schedule, then the schedule."""
        share = SHAPES[self.schedule.name](self, max(0, step - self.warmup)).share
        return share * min(1.0, (step + 1) / (self.warmup + 1))

    def momentum(self, step: int) -> float | None:
        """None: the schedule leaves momentum alone."""
        if self.schedule.momentum is None:
            return None
        height = SHAPES[self.schedule.name](self, max(0, step - self.warmup)).height
        low, high = self.schedule.momentum
        return None if height is None else high + (low - high) * height

    @property
    def cycles(self) -> list[tuple[int, int]]:
        """(first step, steps) of each cycle. They fill the run after the warm-up, so that the last one ends with it."""
        count, times = self.schedule.cycles, self.schedule.cycle_mul
        if self.schedule.name != "cosine_restarts":
            times = 1.0
        ends = [sum(times**i for i in range(k)) for k in range(count + 1)]
        edges = [
            self.warmup + math.floor((self.steps - self.warmup) * end / ends[-1] + 1e-9 + 0.5) for end in ends
        ]
        return [(a, b - a) for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True)
class StagedLRSchedule:
    """The schedule once for every stage, each with its own peak."""

    curves: list[LRSchedule]
    seen: list[float] = field(default_factory=list)

    def _at(self, step: int) -> tuple[LRSchedule, int]:
        for curve in self.curves[:-1]:
            if step < curve.steps:
                return curve, step
            step -= curve.steps
        return self.curves[-1], step

    def rate(self, step: int) -> float:
        curve, inside = self._at(step)
        return curve.rate(inside)

    def momentum(self, step: int) -> float | None:
        curve, inside = self._at(step)
        return curve.momentum(inside)


def lr_schedule(cfg: Config, span: TrainLength) -> LRSchedule | StagedLRSchedule:
    if cfg.train.stages:
        each = span.steps_per_epoch
        return StagedLRSchedule([
            LRSchedule(cfg.schedule, stage.lr * peak_lr(cfg, span.effective) / cfg.optim.lr, stage.epochs * each, each)
            for stage in cfg.train.stages
        ])  # fmt: skip
    plan = _cyclic(cfg) if cfg.snapshots.cycles and cfg.snapshots.restarts else cfg.schedule
    return LRSchedule(plan, peak_lr(cfg, span.effective), span.steps, span.steps_per_epoch)


def stage_schedules(curve: LRSchedule | StagedLRSchedule) -> list[LRSchedule]:
    """One a stage; of a run without stages, the one there is."""
    return curve.curves if isinstance(curve, StagedLRSchedule) else [curve]


def shortened_warmups(curve: LRSchedule | StagedLRSchedule) -> list[str]:
    """A line for each warm-up that was cut to half of its run or stage."""
    parts = stage_schedules(curve)
    return [
        f"schedule.warmup: {part.in_steps(part.schedule.warmup):,} steps are more than half of the {part.steps:,} of "
        f"{'the run' if len(parts) == 1 else f'stage {number}'}; shortened to {part.warmup:,}"
        for number, part in enumerate(parts, 1)
        if part.warmup < part.in_steps(part.schedule.warmup)
    ]


def snapshot_steps(cfg: Config, span: TrainLength) -> list[int]:
    """How many steps are over when each snapshot is taken: at the end of every cycle, whether the rate restarts there or not."""
    if not cfg.snapshots.cycles:
        return []
    return [
        first + length
        for first, length in LRSchedule(_cyclic(cfg), 1.0, span.steps, span.steps_per_epoch).cycles
    ]


def _cyclic(cfg: Config) -> Schedule:
    """Of the snapshot-ensembles paper: cosines of one length and height."""
    return cfg.schedule.model_copy(
        update={
            "name": "cosine_restarts",
            "cycles": cfg.snapshots.cycles,
            "cycle_mul": 1.0,
            "cycle_decay": 1.0,
        }
    )


class Point(NamedTuple):
    share: float  # of the peak
    height: float | None = (
        None  # where between its ends (0) and its peak (1) a cycle stands; momentum runs against it
    )


def constant(curve: LRSchedule, step: int) -> Point:
    return Point(1.0)


def step_decay(curve: LRSchedule, step: int) -> Point:
    """One drop every so often, or one at each of the times listed."""
    every = curve.schedule.step_size
    if isinstance(every, list):
        drops = sum(step + curve.warmup >= curve.in_steps(at) for at in every)
    else:
        drops = step // max(1, curve.in_steps(every))
    return Point(curve.schedule.factor**drops)


def plateau(curve: LRSchedule, step: int) -> Point:
    """Down by `factor` whenever more than `patience` epochs in a row brought nothing better; never below `final`."""
    drops, waited, best = 0, 0, math.inf
    for loss in curve.seen:
        better = loss < best * (1 - BETTER)
        best, waited = (loss, 0) if better else (best, waited + 1)
        if waited > curve.schedule.patience:
            drops, waited = drops + 1, 0
    return Point(max(curve.schedule.min_lr_ratio, curve.schedule.factor**drops))


def linear(curve: LRSchedule, step: int) -> Point:
    return Point(_between(curve.schedule.min_lr_ratio, 1.0, 1 - step / (curve.steps - curve.warmup)))


def cosine(curve: LRSchedule, step: int) -> Point:
    return Point(_between(curve.schedule.min_lr_ratio, 1.0, _half_wave(step / (curve.steps - curve.warmup))))


def cosine_restarts(curve: LRSchedule, step: int) -> Point:
    number, done = _place(curve, step)
    top = curve.schedule.cycle_decay**number
    return Point(_between(curve.schedule.min_lr_ratio, top, _half_wave(done)))


def one_cycle(curve: LRSchedule, step: int) -> Point:
    """Up from `start` to the peak, then down to `final`."""
    height, rising = _wave(curve, step / (curve.steps - curve.warmup), SLOPES[curve.schedule.anneal_strategy])
    return Point(
        _between(curve.schedule.start_lr_ratio if rising else curve.schedule.min_lr_ratio, 1.0, height),
        height,
    )


def triangular(curve: LRSchedule, step: int) -> Point:
    """Cycles between `final` and the peak, each lower than the one before by `decay`."""
    number, done = _place(curve, step)
    height, _ = _wave(curve, done, SLOPES["linear"])
    return Point(
        _between(curve.schedule.min_lr_ratio, 1.0, height * curve.schedule.cycle_decay**number), height
    )


def exp_range(curve: LRSchedule, step: int) -> Point:
    """Like triangular, but lower with every step: by `decay` over a cycle."""
    number, done = _place(curve, step)
    height, _ = _wave(curve, done, SLOPES["linear"])
    return Point(
        _between(curve.schedule.min_lr_ratio, 1.0, height * curve.schedule.cycle_decay ** (number + done)),
        height,
    )


def wsd(curve: LRSchedule, step: int) -> Point:
    """Warm-up, stable, decay: the peak until the last `cooldown`."""
    length = curve.in_steps(curve.schedule.cooldown)
    left = curve.steps - curve.warmup - step
    if left >= length:
        return Point(1.0)
    return Point(
        _between(curve.schedule.min_lr_ratio, 1.0, SLOPES[curve.schedule.anneal_strategy](1 - left / length))
    )


def range_linear(curve: LRSchedule, step: int) -> Point:
    """comp lr-range: from `start` to the peak, in `every`."""
    return Point(_between(curve.schedule.start_lr_ratio, 1.0, min(1.0, step / max(1, _climb(curve) - 1))))


def range_exponential(curve: LRSchedule, step: int) -> Point:
    return Point(curve.schedule.start_lr_ratio ** (1 - min(1.0, step / max(1, _climb(curve) - 1))))


def _climb(curve: LRSchedule) -> int:
    assert not isinstance(curve.schedule.step_size, list)
    return curve.in_steps(curve.schedule.step_size)


SHAPES: dict[str, Callable[[LRSchedule, int], Point]] = {
    "step": step_decay,
    **{
        shape.__name__: shape
        for shape in (
            constant,
            linear,
            plateau,
            cosine,
            cosine_restarts,
            one_cycle,
            triangular,
            exp_range,
            wsd,
            range_linear,
            range_exponential,
        )
    },
}


def _between(low: float, high: float, height: float) -> float:
    return low + (high - low) * height


def _half_wave(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


# How far down from 1 to 0 after this share of the way.
SLOPES: dict[str, Callable[[float], float]] = {"cosine": _half_wave, "linear": lambda done: 1 - done}


def _place(curve: LRSchedule, step: int) -> tuple[int, float]:
    """Number of the cycle, and how much of it is done."""
    at = step + curve.warmup
    number = max(i for i, (first, _) in enumerate(curve.cycles) if first <= at)
    first, length = curve.cycles[number]
    return number, (at - first) / length


def _wave(curve: LRSchedule, done: float, slope: Callable[[float], float]) -> tuple[float, bool]:
    """Up during `rise` of it, down during the rest: (height, still rising)."""
    rise = curve.schedule.pct_start
    if done < rise:
        return 1 - slope(done / rise), True
    return slope((done - rise) / (1 - rise)), False
