"""Options that make a network faster or smaller in memory without changing what it computes, except for
rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from comp.engine.config.schema import Config
from comp.engine.errors import UserError
from comp.engine.run.backbone import inner


def prepare(cfg: Config, module: nn.Module) -> Callable[..., Tensor]:
    """The network as the training loop calls it. `module` itself is still what is saved, averaged and
    validated."""
    if cfg.train.grad_checkpointing:
        _enable_checkpointing(cfg, module)
    if cfg.train.channels_last:
        if not any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
            raise UserError(
                "knob-unused",
                key="train.channels_last",
                what=f"{cfg.model.name} has no convolution",
                remedy="set it to false",
            )
        module.to(memory_format=torch.channels_last)
    if not cfg.train.compile:
        return module
    compiled: Callable[..., Tensor] = torch.compile(module)
    return compiled


def _enable_checkpointing(cfg: Config, module: nn.Module) -> None:
    network, _ = inner(module)
    unsupported = UserError(
        "knob-unsupported",
        key="train.grad_checkpointing",
        what=f"{cfg.model.name} does not support it",
        remedy="set it to false",
    )
    if not hasattr(network, "set_grad_checkpointing"):
        raise unsupported
    try:
        network.set_grad_checkpointing(True)
    except AssertionError:  # timm's networks without it assert that it is off
        raise unsupported from None
