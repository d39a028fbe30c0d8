"""The optimizer and its rate. The rate is a function of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

import torch
from torch import nn

from comp.config import Config, Schedule


def optimizer(cfg: Config, module: nn.Module) -> torch.optim.Optimizer:
    """timm's, which spares norms and biases from weight decay."""
    from timm.optim import create_optimizer_v2

    given = (
        {"betas": (cfg.optim.momentum, 0.999)}
        if cfg.optim.name == "adamw"
        else {"momentum": cfg.optim.momentum}
    )
    # fused: one pass over all weights, a fifth of the time of the loop over tensors that a CPU gets otherwise
    return create_optimizer_v2(
        module, cfg.optim.name, lr=cfg.optim.rate, weight_decay=cfg.optim.weight_decay, fused=True, **given
    )


def share(schedule: Schedule, step: int, steps: int, steps_per_epoch: int) -> float:
    """The rate at a step (from 0) as a share of the peak: linear warm-up, then the schedule down to `final`."""
    warmup = round(schedule.warmup * steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return SHAPES[schedule.name](done, schedule.final)


SHAPES = {
    "constant": lambda done, final: 1.0,
    "cosine": lambda done, final: final + (1 - final) * (1 + math.cos(math.pi * done)) / 2,
}


def set_rate(optim: torch.optim.Optimizer, rate: float) -> None:
    for group in optim.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
