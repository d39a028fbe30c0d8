"""Knobs that were set explicitly and have no effect, because of another knob: reported before a run."""

from __future__ import annotations

from collections.abc import Iterator

from comp.engine.config import resolve
from comp.engine.config.resolve import Loaded
from comp.engine.config.schema import Config
from comp.engine.errors import UserError

CYCLIC = ("cosine_restarts", "triangular", "exp_range")
CYCLING = ("one_cycle", "triangular", "exp_range")
SCHEDULES = {  # knob of `schedule` -> the schedules that use it
    "min_lr_ratio": ("linear", "plateau", "cosine", *CYCLIC, "one_cycle", "wsd"),
    "step_size": ("step",),
    "factor": ("step", "plateau"),
    "patience": ("plateau",),
    "cycles": CYCLIC,
    "cycle_mul": ("cosine_restarts",),
    "cycle_decay": CYCLIC,
    "start_lr_ratio": ("one_cycle",),
    "pct_start": CYCLING,
    "anneal_strategy": ("one_cycle", "wsd"),
    "momentum": CYCLING,
    "cooldown": ("wsd",),
}
DEFAULTS = ("configs/base.yaml:", "configs/debug.yaml:")  # not set for this experiment


def messages(loaded: Loaded) -> list[str]:
    """One line per knob, with the file and line where it is set."""
    values = resolve.flatten(loaded.config.model_dump())
    out = []
    for key, reason in _unused(loaded.config):
        origin = loaded.origins.get(key, DEFAULTS[0])
        if not origin.startswith(DEFAULTS) and values.get(key) is not None:
            what = f"{values[key]} has no effect {reason}"
            out.append(UserError("knob-unused", where=origin, key=key, what=what).line)
    return out


def _unused(cfg: Config) -> Iterator[tuple[str, str]]:
    name = cfg.schedule.name
    for knob, names in SCHEDULES.items():
        if name not in names and not cfg.snapshots.cycles:  # snapshots have a schedule of their own
            yield f"schedule.{knob}", f"with schedule.name: {name}; it is used by {', '.join(names)}"
    if name in CYCLING and cfg.schedule.momentum is not None:
        yield (
            "optim.momentum",
            f"with schedule.name: {name}, which cycles it; schedule.momentum: null keeps it constant",
        )
    if cfg.distill.teacher is None:
        for knob in ("kind", "temperature", "weight"):
            yield f"distill.{knob}", "without distill.teacher"
    elif cfg.distill.kind == "hard":
        yield "distill.temperature", "with distill.kind: hard"
    if cfg.optim.lr_base_size is None:
        yield "optim.lr_base_scale", "without optim.lr_base_size"
    if cfg.optim.clip_grad is None:
        yield "optim.clip_mode", "with optim.clip_grad: null"
