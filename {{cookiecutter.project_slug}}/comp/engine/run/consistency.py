"""augment.jsd_views: a picture stands several times in a batch, augmented anew each time, and what is said of it should be the same.

In the epoch's list its views are neighbours, and whatever cuts a batch keeps neighbours together. So the epoch is that many times as long,
draws stay functions of their place in it, and nothing else need know.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from comp.engine.config.schema import Config
from comp.engine.errors import Refused
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import VALUES, Head
from comp.models import output_sizes

WEIGHT = 12.0  # AugMix (Hendrycks et al. 2020), as timm's JsdCrossEntropy
OutputLoss = Callable[[Tensor], Tensor]


def validate(cfg: Config, heads: tuple[Head, ...]) -> None:
    if cfg.augment.jsd_views == 1:
        return
    if value := next((head.name for head in heads if head.spec.spaces is VALUES), ""):
        raise Refused(
            f"augment.jsd_views: {value} is a value, and the divergence is one of probabilities; set it to 1"
        )
    if loss_knobs.metric_learning_loss(cfg, heads):
        raise Refused("augment.jsd_views: embeddings have no probabilities that could agree; set it to 1")


def consistency_loss(cfg: Config, heads: tuple[Head, ...]) -> OutputLoss:
    """(batch, all outputs) -> (batch,): what is added to each sample's loss."""
    views = cfg.augment.jsd_views
    if views == 1:
        return zero
    sizes, whole = output_sizes(cfg, heads), loss_knobs.head_losses(cfg, heads)

    def apart(output: Tensor) -> Tensor:
        each = []
        for head, which, block in zip(heads, whole, output.float().split(sizes, dim=1), strict=True):
            if head.exclusive:
                log_p = F.log_softmax(F.logsigmoid(block) if which.name == "bce" else block, 1)[
                    :, None
                ]  # (batch, 1, classes)
            else:
                log_p = torch.stack([F.logsigmoid(block), F.logsigmoid(-block)], 2)  # (batch, labels, 2)
            each.append(jensen_shannon(log_p.unflatten(0, (-1, views))).mean(1))
        return WEIGHT * torch.stack(each).mean(0).repeat_interleave(views)

    return apart


def jensen_shannon(log_p: Tensor) -> Tensor:
    """(samples, views, questions, answers) -> (samples, questions): the mean distance of the views from what lies between them."""
    between = torch.logsumexp(log_p, 1, keepdim=True) - log(log_p.shape[1])
    return (log_p.exp() * (log_p - between)).sum(3).mean(1)


def zero(output: Tensor) -> Tensor:
    return output.new_zeros(())
