"""Losses by name: (network output of a head, target) -> one number a sample. `loss.name` in a config names one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from comp import own
from comp.config import Config, Refused
from comp.tasks import Head
from comp.train.model import loss_name, outputs

Loss = Callable[[Tensor, Tensor], Tensor]
Total = Callable[[Tensor, list[Tensor]], Tensor]


def cross_entropy(output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Target: class codes (batch,), or a share for each class (batch, classes)."""
    return F.cross_entropy(output, target, reduction="none", label_smoothing=smoothing)


def kl(output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """How far the answer is from a share for each class: cross entropy less what no model can get rid of."""
    if target.ndim == 1:
        target = F.one_hot(target, output.shape[1]).to(output.dtype)
    target = target * (1 - smoothing) + smoothing / output.shape[1]
    return F.kl_div(F.log_softmax(output, 1), target, reduction="none").sum(1)


def bce(output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    target = target.view_as(output) * (1 - smoothing) + 0.5 * smoothing
    return F.binary_cross_entropy_with_logits(output, target, reduction="none").mean(1)


def mse(output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    return F.mse_loss(output, target.view_as(output), reduction="none").mean(1)


def l1(output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    return F.l1_loss(output, target.view_as(output), reduction="none").mean(1)


def huber(output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    return F.huber_loss(output, target.view_as(output), reduction="none").mean(1)


def cumulative(output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Ordinal: output k asks whether the grade is above k."""
    above = (target[:, None] > torch.arange(output.shape[1], device=output.device)).to(output.dtype)
    return F.binary_cross_entropy_with_logits(output, above, reduction="none").sum(1)


LOSSES = {loss.__name__: loss for loss in (cross_entropy, kl, bce, mse, l1, huber, cumulative)}


def total(cfg: Config, heads: tuple[Head, ...]) -> Total:
    """The mean over heads of each head's loss: (batch, all outputs), one target a head -> (batch,)"""
    sizes = outputs(cfg, heads)
    losses = [_named(cfg, head) for head in heads]

    def loss(output: Tensor, targets: list[Tensor]) -> Tensor:
        blocks = output.float().split(sizes, dim=1)
        each = [one(block, target) for one, block, target in zip(losses, blocks, targets, strict=True)]
        return torch.stack(each).mean(0)

    return loss


def _named(cfg: Config, head: Head) -> Loss:
    name = loss_name(cfg, head)
    if name == "loss":
        hook = own.get("loss")
        if hook is None:
            raise Refused("loss.name: loss: comp/competition.py defines no loss(output, target)")
        return hook
    function, smoothing = LOSSES[name], cfg.loss.smoothing
    return lambda output, target: function(output, target, smoothing)
