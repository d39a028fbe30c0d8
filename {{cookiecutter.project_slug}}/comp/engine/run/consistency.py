"""Consistency loss between augmented views of an image: augment.jsd_views puts each image several times into
a batch.

The views of an image are neighbors in the epoch's list, and whatever splits a batch keeps neighbors
together. So an epoch is that many times longer, random draws stay functions of the position in the list, and
no other module has to handle views.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from comp.engine.config.schema import Config
from comp.engine.errors import UserError
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import VALUES, Head
from comp.models import output_sizes

WEIGHT = 12.0  # AugMix (Hendrycks et al. 2020), as timm's JsdCrossEntropy
OutputLoss = Callable[[Tensor], Tensor]


def validate(cfg: Config, heads: tuple[Head, ...]) -> None:
    if cfg.augment.jsd_views == 1:
        return
    if value := next((head.name for head in heads if head.spec.spaces is VALUES), ""):
        what = f"target {value} is a value, and the divergence between views is one of probabilities"
    elif loss_knobs.metric_learning_loss(cfg, heads):
        what = "embeddings have no probabilities to compare between views"
    else:
        return
    raise UserError("knob-unused", key="augment.jsd_views", what=what, remedy="set it to 1")


def consistency_loss(cfg: Config, heads: tuple[Head, ...]) -> OutputLoss:
    """(batch, all outputs) -> (batch,): added to each sample's loss."""
    views = cfg.augment.jsd_views
    if views == 1:
        return zero
    sizes, objectives = output_sizes(cfg, heads), loss_knobs.head_losses(cfg, heads)

    def loss(output: Tensor) -> Tensor:
        divergences = []
        for head, objective, block in zip(heads, objectives, output.float().split(sizes, dim=1), strict=True):
            if head.exclusive:
                logits = F.logsigmoid(block) if objective.name == "bce" else block
                log_p = F.log_softmax(logits, 1)[:, None]  # (batch, 1, classes)
            else:
                log_p = torch.stack([F.logsigmoid(block), F.logsigmoid(-block)], 2)  # (batch, labels, 2)
            divergences.append(jensen_shannon(log_p.unflatten(0, (-1, views))).mean(1))
        return WEIGHT * torch.stack(divergences).mean(0).repeat_interleave(views)

    return loss


def jensen_shannon(log_p: Tensor) -> Tensor:
    """(samples, views, labels, classes) -> (samples, labels): mean divergence of the views from their mean
    distribution."""
    log_mean = torch.logsumexp(log_p, 1, keepdim=True) - log(log_p.shape[1])
    return (log_p.exp() * (log_p - log_mean)).sum(3).mean(1)


def zero(output: Tensor) -> Tensor:
    return output.new_zeros(())
