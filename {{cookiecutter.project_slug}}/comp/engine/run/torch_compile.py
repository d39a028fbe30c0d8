"""What makes a network faster or smaller in memory without changing what it computes, but for rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from comp.engine.config.schema import Config
from comp.engine.errors import Refused
from comp.engine.run.backbone import inner


def prepare(cfg: Config, module: nn.Module) -> Callable[..., Tensor]:
    """The network as the loop calls it. `module` stays what is saved, averaged and validated."""
    if cfg.train.grad_checkpointing:
        _checkpointed(cfg, module)
    if cfg.train.channels_last:
        if not any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
            raise Refused(
                f"train.channels_last: {cfg.model.name} has no convolution to gain by it; set it to false"
            )
        module.to(memory_format=torch.channels_last)
    if not cfg.train.compile:
        return module
    compiled: Callable[..., Tensor] = torch.compile(module)
    return compiled


def _checkpointed(cfg: Config, module: nn.Module) -> None:
    network, _ = inner(module)
    refusal = Refused(f"train.grad_checkpointing: {cfg.model.name} does not know it; set it to false")
    if not hasattr(network, "set_grad_checkpointing"):
        raise refusal
    try:
        network.set_grad_checkpointing(True)
    except AssertionError:  # how timm says no
        raise refusal from None
