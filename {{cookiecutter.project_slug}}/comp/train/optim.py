"""The optimizer. Its rate is set before every step: schedule.py."""

from __future__ import annotations

import torch
from torch import nn

from comp.config import Config


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


def set_rate(optim: torch.optim.Optimizer, rate: float, momentum: float | None) -> None:
    """momentum None: as it is."""
    for group in optim.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
        if momentum is not None and "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        if momentum is not None and "momentum" in group:
            group["momentum"] = momentum
