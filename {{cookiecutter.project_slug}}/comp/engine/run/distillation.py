"""Distillation: beside its labels, a network is trained on a teacher's predictions for the same images, made
by the teacher's models of the same fold.

teacher_predictions.py writes them to a file of the fold. Here they become additional targets after the
labels, so whatever mixes images mixes them in the same way.
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
from comp.engine.errors import UserError
from comp.engine.run import distributed, model_selection, target_scaler
from comp.engine.store import artifacts
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import VALUES, Head, HeadLoss

if TYPE_CHECKING:
    from comp.engine.run.context import Context

FILE = "teacher_predictions.safetensors"


def validate(cfg: Config, heads: Sequence[Head]) -> None:
    if cfg.distill.teacher is not None and loss_knobs.metric_learning_loss(cfg, heads):
        raise UserError(
            "loss-incompatible",
            key="distill.teacher",
            what=f"loss {loss_knobs.head_losses(cfg, heads)[0].name} trains embeddings, "
            "and a teacher predicts classes",
            remedy="set loss.name: cross_entropy",
        )


def train_rows(context: Context, fold: int | str) -> Positions:
    """Training rows of the fold, in the order of the teacher's file."""
    return model_selection.fold_rows(context, fold)[0]


def teacher_targets(context: Context, fold: int | str, folder: Path) -> list[Tensor]:
    """One per head, for every row of the samples (0 outside of the training rows); empty without a
    teacher."""
    cfg, samples = context.cfg, context.samples
    if cfg.distill.teacher is None:
        return []
    stored = distributed.broadcast(_read(folder / FILE) if distributed.is_main() else {})
    rows = stored["rows"]
    assert np.array_equal(rows, train_rows(context, fold)), "the file is made for these training rows"
    values = [
        to_target(head, stored[head.name], cfg.distill.kind, cfg.distill.temperature)
        for head in samples.heads
    ]
    targets = []
    for value in target_scaler.standardize(cfg, samples, rows, values):
        dtype = np.float32 if value.dtype == np.float64 else value.dtype
        target = np.zeros((len(samples.frame), *value.shape[1:]), dtype)
        target[rows] = value
        targets.append(torch.from_numpy(target).to(context.device))
    return targets


def _read(file: Path) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load

    return load(artifacts.verified(file).read_bytes())


def to_target(head: Head, stored: NDArray[Any], kind: str, temperature: float) -> NDArray[Any]:
    """Stored predictions as a target: a probability per class, the most likely class, 0 or 1 per label, or
    values."""
    if head.spec.spaces is VALUES:
        values = stored.clip(0, len(head.classes) - 1) if head.classes else stored
        return np.asarray(head.spec.encode_target(values), np.float32)
    if kind == "soft":
        return head.spec.to_probability(stored.astype(np.float64) / temperature).astype(np.float32)
    hard = head.spec.to_label(head.spec.to_probability(stored.astype(np.float64)))
    return hard if head.exclusive else hard.astype(np.float32)


def distillation_loss(
    cfg: Config,
    samples: Samples,
    train_rows: Positions,
    label_loss: losses.MultiHeadLoss,
    standardized: bool = True,
) -> losses.MultiHeadLoss:
    """(output, targets of the labels followed by those of the teacher) -> (batch,). Hard predictions and
    values take the run's own loss; without a teacher, `label_loss` itself."""
    if cfg.distill.teacher is None:
        return label_loss
    heads, soft = samples.heads, cfg.distill.kind == "soft"
    head_losses = losses.head_losses(cfg, samples, train_rows, standardized)
    per_head = [
        _soft_loss(head, objective, cfg.distill.temperature)
        if soft and head.spec.spaces is not VALUES
        else own_loss
        for head, objective, own_loss in zip(
            heads, loss_knobs.head_losses(cfg, heads), head_losses, strict=True
        )
    ]
    teacher_loss, share = losses.mean_over_heads(cfg, heads, per_head), cfg.distill.weight

    def loss(output: Tensor, targets: list[Tensor]) -> Tensor:
        labels, teacher = targets[: len(heads)], targets[len(heads) :]
        return (1 - share) * label_loss(output, labels) + share * teacher_loss(output, teacher)

    return loss


def _soft_loss(head: Head, objective: HeadLoss, temperature: float) -> losses.Loss:
    """Kullback-Leibler divergence at a temperature, times its square, which keeps gradients as large as those
    of the labels."""

    def multiclass(output: Tensor, target: Tensor) -> Tensor:
        logits = F.logsigmoid(output) if objective.name == "bce" else output  # as predictions are decoded
        log_p = F.log_softmax(logits / temperature, 1)
        return F.kl_div(log_p, target, reduction="none").sum(1) * temperature**2

    def multilabel(output: Tensor, target: Tensor) -> Tensor:
        target = target.view_as(output)
        cross_entropy = F.binary_cross_entropy_with_logits(output / temperature, target, reduction="none")
        negative_entropy = torch.xlogy(target, target) + torch.xlogy(1 - target, 1 - target)
        return (cross_entropy + negative_entropy).mean(1) * temperature**2

    return multiclass if head.exclusive else multilabel


def changed_weights(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    """Weights with another hash than when the predictions were made. Weights deleted since are no reason to
    complain."""
    return [name for name in then if name in now and now[name] != then[name]]
