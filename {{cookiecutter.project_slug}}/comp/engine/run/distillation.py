"""Distillation: beside its labels a network learns from what a teacher says of the same pictures, as each fold's own models say it.

predict/lessons.py asks the teacher once and leaves a file with the fold; here it becomes targets that follow the labels. What mixes
pictures mixes these targets alike, since to the loop they are just more targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from comp import losses
from comp.engine.config.schema import Config
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import Refused
from comp.engine.run import distributed, metric_learning, model_selection, target_scaler
from comp.engine.store import artifacts
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import VALUES, Head, HeadLoss

if TYPE_CHECKING:
    from comp.engine.run.context import Context

FILE = "lessons.safetensors"


def validate(cfg: Config, heads: Sequence[Head]) -> None:
    if cfg.distill.teacher is not None and loss_knobs.metric_learning_loss(cfg, heads):
        raise Refused(
            f"distill.teacher: loss {loss_knobs.head_losses(cfg, heads)[0].name} puts pictures near each other, and a teacher speaks of classes; "
            "loss.name: cross_entropy listens"
        )


def train_rows(context: Context, number: int | str) -> Positions:
    """The rows that teach this fold, in the order of the file."""
    return metric_learning.drop_unknown_class(
        context.cfg, context.samples, model_selection.fold_rows(context, number)[0]
    )


def teacher_targets(context: Context, number: int | str, folder: Path) -> list[Tensor]:
    """One a head, for every row of the samples; none where there is no teacher."""
    cfg, samples = context.cfg, context.samples
    if cfg.distill.teacher is None:
        return []
    found = distributed.broadcast(_read(folder / FILE) if distributed.is_main() else {})
    rows = found["rows"]
    assert np.array_equal(rows, train_rows(context, number)), "lessons are made for the rows that teach"
    said_of = [
        to_target(head, found[head.name], cfg.distill.kind, cfg.distill.temperature) for head in samples.heads
    ]
    out = []
    for said in target_scaler.standardize(cfg, samples, rows, said_of):
        kind = np.float32 if said.dtype == np.float64 else said.dtype
        every = np.zeros((len(samples.frame), *said.shape[1:]), kind)
        every[rows] = said
        out.append(torch.from_numpy(every).to(context.device))
    return out


def _read(file: Path) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load

    return load(artifacts.verified(file).read_bytes())


def to_target(head: Head, stored: NDArray[Any], kind: str, temperature: float) -> NDArray[Any]:
    """What a prediction is as a target: shares of classes, the likeliest class, 0 and 1 for each label, or values."""
    if head.spec.spaces is VALUES:
        return np.asarray(
            head.spec.encode_target(stored.clip(0, len(head.classes) - 1) if head.classes else stored),
            np.float32,
        )
    if kind == "soft":
        return head.spec.to_probability(stored.astype(np.float64) / temperature).astype(np.float32)
    hard = head.spec.to_label(head.spec.to_probability(stored.astype(np.float64)))
    return hard if head.exclusive else hard.astype(np.float32)


def distillation_loss(
    cfg: Config, samples: Samples, taught: Positions, own: losses.Total, standardised: bool = True
) -> losses.Total:
    """(output, labels and then what the teacher says) -> (batch,). A hard answer and a value are learned by the run's own loss."""
    if cfg.distill.teacher is None:
        return own
    heads, soft = samples.heads, cfg.distill.kind == "soft"
    both = zip(
        heads,
        loss_knobs.head_losses(cfg, heads),
        losses.head_losses(cfg, samples, taught, standardised),
        strict=True,
    )
    each = [
        _soft(head, which, cfg.distill.temperature) if soft and head.spec.spaces is not VALUES else hard
        for head, which, hard in both
    ]
    told, share = losses.mean_over_heads(cfg, heads, each), cfg.distill.weight

    def loss(output: Tensor, targets: list[Tensor]) -> Tensor:
        return (1 - share) * own(output, targets[: len(heads)]) + share * told(output, targets[len(heads) :])

    return loss


def _soft(head: Head, which: HeadLoss, temperature: float) -> losses.Loss:
    """Kullback-Leibler divergence at a temperature, times its square, so that gradients are as large as those of the labels."""

    def exclusive(output: Tensor, target: Tensor) -> Tensor:
        said = F.logsigmoid(output) if which.name == "bce" else output  # as it is read off
        log_p = F.log_softmax(said / temperature, 1)
        return F.kl_div(log_p, target, reduction="none").sum(1) * temperature**2

    def labels(output: Tensor, target: Tensor) -> Tensor:
        target = target.view_as(output)
        apart = F.binary_cross_entropy_with_logits(output / temperature, target, reduction="none")
        both = torch.xlogy(target, target) + torch.xlogy(1 - target, 1 - target)
        return (apart + both).mean(1) * temperature**2

    return exclusive if head.exclusive else labels


def changed_weights(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    """Weights that taught and are others now. What was cleaned away since is no fault: it has spoken."""
    return [name for name in then if name in now and now[name] != then[name]]
