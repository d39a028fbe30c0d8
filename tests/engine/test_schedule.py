"""Learning rates and momentum against their closed forms, and against torch's schedulers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config

from comp.engine.config import duration, schema
from comp.engine.config import resolve as configs
from comp.engine.errors import UserError
from comp.engine.run import schedule, unused_knobs
from comp.engine.run.schedule import LRSchedule
from comp.engine.store import paths

STEPS, EPOCH = 120, 10  # a run of 12 epochs


pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _somewhere(empty: Path) -> None:
    """Other knobs as in configs/base.yaml."""


def curve(*overrides: str, steps: int = STEPS) -> LRSchedule:
    cfg = config("schedule.warmup=0", *(f"schedule.{text}" for text in overrides))
    return LRSchedule(cfg.schedule, 1.0, steps, EPOCH)


def rates(*overrides: str, steps: int = STEPS) -> list[float]:
    drawn = curve(*overrides, steps=steps)
    return [drawn.lr(step) for step in range(steps)]


def of_torch(make: Any, steps: int, peak: float = 1.0) -> tuple[list[float], list[float]]:
    """Learning rate and momentum that a scheduler of torch sets."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], peak, momentum=0.9)
    scheduler = make(optimizer)
    out: tuple[list[float], list[float]] = ([], [])
    for _ in range(steps):
        out[0].append(optimizer.param_groups[0]["lr"])
        out[1].append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        scheduler.step()
    return out


def half_wave(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


CLOSED = {
    "constant": ([], lambda s: 1.0),
    "linear": (["min_lr_ratio=0.1"], lambda s: 1 - 0.9 * s / STEPS),
    "cosine": (["min_lr_ratio=0.1"], lambda s: 0.1 + 0.9 * half_wave(s / STEPS)),
    "step": (["step_size=3 epochs", "factor=0.5"], lambda s: 0.5 ** (s // 30)),
    "cosine_restarts": (
        ["cycles=3", "min_lr_ratio=0", "cycle_decay=0.5"],
        lambda s: 0.5 ** (s // 40) * half_wave(s % 40 / 40),
    ),
    "triangular": (
        ["cycles=3", "min_lr_ratio=0.2", "pct_start=0.5", "cycle_decay=0.5"],
        lambda s: 0.2 + 0.8 * 0.5 ** (s // 40) * (1 - abs(s % 40 / 20 - 1)),
    ),
    "exp_range": (
        ["cycles=3", "min_lr_ratio=0.2", "pct_start=0.25", "cycle_decay=0.5"],
        lambda s: 0.2 + 0.8 * 0.5 ** (s / 40) * min(s % 40 / 10, (40 - s % 40) / 30),
    ),
    "wsd": (
        ["cooldown=25%", "anneal_strategy=linear", "min_lr_ratio=0"],
        lambda s: min(1.0, (STEPS - s) / 30),
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_schedule_equals_its_closed_form(name: str) -> None:
    overrides, form = CLOSED[name]
    assert rates(f"name={name}", *overrides) == pytest.approx(
        [form(step) for step in range(STEPS)], abs=1e-12
    )


def test_step_decay_at_listed_times_and_cosine_cooldown_of_wsd() -> None:
    dropped = rates("name=step", "step_size=[50%, 9 epochs, 110 steps]")
    assert [step for step in range(1, STEPS) if dropped[step] < dropped[step - 1]] == [60, 90, 110]
    assert rates("name=wsd", "cooldown=60 steps", "min_lr_ratio=0") == pytest.approx(
        [half_wave(max(0, step - 60) / 60) for step in range(STEPS)]
    )


@pytest.mark.parametrize("times", [1, 2])
def test_cosine_restarts_equal_torchs(times: int) -> None:
    first, cycles = (30, 4) if times == 1 else (8, 4)
    whole = first * (cycles if times == 1 else 2**cycles - 1)
    overrides = ["name=cosine_restarts", f"cycles={cycles}", f"cycle_mul={times}", "min_lr_ratio=0.1"]
    make = lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, first, times, eta_min=0.1)  # noqa: E731
    assert rates(*overrides, steps=whole) == pytest.approx(of_torch(make, whole)[0])
    ends = [sum(first * times**i for i in range(k + 1)) for k in range(cycles)]
    assert [start + length for start, length in curve(*overrides, steps=whole).cycles] == ends


@pytest.mark.parametrize(("anneal", "torchs"), [("cosine", "cos"), ("linear", "linear")])
def test_one_cycle_equals_torchs(anneal: str, torchs: Any) -> None:
    """torch reaches its last value in its last step, ours one step later, so torch gets one step more."""
    share = (0.3 * STEPS + 1) / (STEPS + 1)
    rate, momentum = of_torch(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 1.0, STEPS + 1, pct_start=share, anneal_strategy=torchs, div_factor=25, final_div_factor=4, base_momentum=0.8,
            max_momentum=0.95), STEPS,
    )  # fmt: skip
    drawn = curve("name=one_cycle", f"anneal_strategy={anneal}", "min_lr_ratio=0.01", "momentum=[0.8, 0.95]")
    assert [drawn.lr(step) for step in range(STEPS)] == pytest.approx(rate)
    assert [drawn.momentum(step) for step in range(STEPS)] == pytest.approx(momentum)


def test_triangular_cycles_and_their_momentum_equal_torchs() -> None:
    rate, momentum = of_torch(
        lambda o: torch.optim.lr_scheduler.CyclicLR(
            o, 0.2, 1.0, step_size_up=12, step_size_down=28, base_momentum=0.85, max_momentum=0.95), STEPS,
    )  # fmt: skip
    drawn = curve("name=triangular", "cycles=3", "min_lr_ratio=0.2", "pct_start=0.3")
    assert [drawn.lr(step) for step in range(STEPS)] == pytest.approx(rate)
    assert [drawn.momentum(step) for step in range(STEPS)] == pytest.approx(momentum)
    assert curve("name=triangular", "momentum=null").momentum(3) is None
    assert curve("name=cosine").momentum(3) is None


def test_plateau_equals_torchs() -> None:
    losses = [3.0, 2.0, 2.0, 1.9999, 2.1, 1.5, 1.6, 1.7, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=1, min_lr=0.02)
    drawn = curve("name=plateau", "factor=0.3", "patience=1", "min_lr_ratio=0.02")
    seen = []
    for loss in losses:
        theirs.step(loss)
        drawn.epoch_losses.append(loss)
        seen.append(drawn.lr(50))
        assert seen[-1] == pytest.approx(optimizer.param_groups[0]["lr"])
    assert seen[0] == 1 and seen[-1] == 0.02 and len(set(seen)) == 5


@pytest.mark.parametrize("name", [*CLOSED, "one_cycle", "plateau"])
def test_warmup_rises_to_the_first_value_of_every_schedule(name: str) -> None:
    drawn = curve(f"name={name}", "warmup=25%")
    first = drawn.factor(30)
    assert [drawn.factor(step) for step in range(30)] == pytest.approx(
        [first * (s + 1) / 31 for s in range(30)]
    )
    shorter = curve(f"name={name}", "step_size=40 steps", "cooldown=20 steps", steps=90)
    drawn = curve(f"name={name}", "step_size=40 steps", "cooldown=20 steps", "warmup=3 epochs")
    assert [drawn.factor(30 + s) for s in range(90)] == pytest.approx([shorter.factor(s) for s in range(90)])


@pytest.mark.parametrize(
    ("warmup", "requested"), [("12", 120), ("61 steps", 61), ("100%", 120), ("500 steps", 500)]
)
def test_a_warmup_is_at_most_half_of_the_run(warmup: str, requested: int) -> None:
    drawn = curve("name=cosine", f"warmup={warmup}", "min_lr_ratio=0")
    assert drawn.warmup_steps == 60
    assert max(range(STEPS), key=drawn.lr) == 60 and drawn.lr(STEPS - 1) < 0.001
    (line,) = schedule.shortened_warmups(drawn)
    assert re.findall(r"\d+", line) == [str(requested), "120", "60"] and line.startswith("schedule.warmup:")
    assert curve("warmup=50%").warmup_steps == 60 and not schedule.shortened_warmups(curve("warmup=50%"))


def test_each_stage_has_its_own_warmup() -> None:
    staged = config(
        "train.epochs=3",
        "train.stages=[{train: head, epochs: 1, lr: 1e-2}, {train: everything, epochs: 2, lr: 1e-3}]",
    )
    lines = schedule.shortened_warmups(schedule.lr_schedule(staged, schedule.train_length(staged, 320)))
    assert [re.findall(r"\d+", each) for each in lines] == [["10", "10", "1", "5"]]


def test_durations() -> None:
    written = config("schedule.warmup=2", "schedule.step_size=[1, 50%]").model_dump()["schedule"]
    assert (written["warmup"], written["step_size"]) == (2.0, [1.0, "50%"])
    assert duration.parse("500 steps").in_steps(1000, 10) == 500
    assert duration.parse("1.5 epochs").in_steps(1000, 10) == duration.parse(1.5).in_steps(1000, 10) == 15
    assert duration.parse("12.5%").in_steps(1000, 10) == 125 and duration.parse("12.5 %").in_epochs(8) == 1
    assert duration.parse("1 step").in_epochs(8) is None and duration.parse("1 epoch").in_epochs(8) == 1
    for wrong in ("3 epohs", "epochs", "-1 epoch", "120%", True, None, [1], float("nan"), "1e3 steps"):
        with pytest.raises(ValueError, match="should be"):
            duration.parse(wrong)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["name=wsd", "warmup=50%", "cooldown=60%"], "schedule.cooldown: 60% after a warm-up of 60 steps"),
        (["name=cosine_restarts", "cycles=121"], "schedule.cycles: 121 cycles in 120 steps"),
        (["name=cosine_restarts", "cycles=12", "cycle_mul=3"], "schedule.cycles: 12 cycles in 120 steps"),
        (["warmup=3 epohs"], "schedule.warmup: must be like 500 steps, 3 epochs or 10%, not '3 epohs'"),
        (["step_size=[1 epoch, x]"], "schedule.step_size: must be like"),
    ],
)
def test_impossible_schedules_are_errors(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        curve(*overrides)
    assert words in str(caught.value)


def test_the_learning_rate_scales_with_the_effective_batch_size() -> None:
    cfg = config("optim.lr=0.1", "train.batch_size=8", "train.grad_accum_steps=4", "optim.lr_base_size=256")
    span = schedule.train_length(cfg, 1000)
    assert (span.effective_batch_size, span.steps_per_epoch, span.steps) == (32, 31, 31 * cfg.train.epochs)
    assert schedule.lr_schedule(cfg, span).lr(10**3) != 0
    assert schedule.peak_lr(cfg, span.effective_batch_size) == pytest.approx(0.1 / 8)
    root = config("optim.lr=0.1", "optim.lr_base_size=256", "optim.lr_base_scale=sqrt")
    assert schedule.peak_lr(root, 64) == pytest.approx(0.1 / 2)
    assert schedule.peak_lr(config("optim.lr=0.1"), 64) == 0.1
    assert schedule.train_length(cfg, 20).effective_batch_size == 16, (
        "a set smaller than a step makes smaller steps"
    )


def unused_messages(*overrides: str) -> list[str]:
    return unused_knobs.messages(configs.load(paths.root(), "exp001", overrides))


def test_a_knob_without_effect_is_reported_with_file_and_line() -> None:
    assert unused_messages("schedule=cosine_restarts", "schedule.cycles=3") == []
    assert unused_messages("schedule=constant", "schedule.cycles=3") == [
        "schedule.cycles: 3 has no effect with schedule.name: constant; "
        "it is used by cosine_restarts, triangular, exp_range"
    ]
    assert (
        len(unused_messages("optim.lr_base_scale=sqrt", "optim.clip_grad=null", "optim.clip_mode=agc")) == 2
    )
    assert "schedule.momentum: null" in unused_messages("schedule=one_cycle", "optim.momentum=0.8")[0]
    assert unused_messages("schedule=one_cycle", "optim.momentum=0.8", "schedule.momentum=null") == []
    assert set(unused_knobs.SCHEDULES) == set(schema.Schedule.model_fields) - {"name", "warmup"}


@pytest.mark.parametrize("knob", unused_knobs.SCHEDULES)
def test_a_knob_without_effect_changes_nothing_and_every_other_does(knob: str) -> None:
    other: dict[str, Any] = {
        "min_lr_ratio": 0.3, "step_size": "20%", "factor": 0.3, "patience": 0, "cycles": 2, "cycle_mul": 2, "cycle_decay": 0.5, "start_lr_ratio": 0.4, "pct_start": 0.6,
        "anneal_strategy": "linear", "momentum": "[0.5, 0.6]", "cooldown": "50%",
    }  # fmt: skip
    for name in schedule.SHAPES:
        if name.startswith("range"):
            continue
        one, two = curve(f"name={name}"), curve(f"name={name}", f"{knob}={other[knob]}")
        for drawn in (one, two):
            drawn.epoch_losses.extend([1.0, 1.0, 1.0, 1.0, 1.0] * (4 if knob == "min_lr_ratio" else 1))
        same = all((one.lr(s), one.momentum(s)) == (two.lr(s), two.momentum(s)) for s in range(STEPS))
        assert same == (name not in unused_knobs.SCHEDULES[knob]), name
