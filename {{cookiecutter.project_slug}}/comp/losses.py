"""Losses by name: `loss.name` in a config names a function of this page. The variants *_multiclass are not
names: `focal` uses focal_multiclass where a sample has one of many classes.

A loss is a function (network output of a head, target, *, its knobs) -> (batch,). Targets are class codes
(batch,), or a share per class (batch, classes); 0, 1 or a share per label; or values. Losses that treat each
output separately return (batch, outputs), so that class weights apply label by label.

timm's losses are not used because the versions on Kaggle return only means. The tests compare ours with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comp.engine import pages
from comp.engine.config.schema import Config
from comp.engine.data import class_balance
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import UserError
from comp.engine.run import metric_learning, target_scaler
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import Head, HeadLoss, bin_centers
from comp.models import output_sizes

POWERS = {"mse": 2, "l1": 1, "huber": 2, "log_cosh": 2}  # regression losses: power of the target's unit
TINY = 1e-8  # a power below 1 has an infinite gradient at 0
Loss = Callable[[Tensor, Tensor], Tensor]
MultiHeadLoss = Callable[[Tensor, list[Tensor]], Tensor]


# --- one of many classes -----------------------------------------------------------------------------


def class_targets(output: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """(batch, classes), from class codes or from shares."""
    if target.ndim == 1:
        target = F.one_hot(target, output.shape[1]).to(output.dtype)
    return target * (1 - label_smoothing) + label_smoothing / output.shape[1]


def cross_entropy(output: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(output, target, reduction="none", label_smoothing=label_smoothing)


def kl(output: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Kullback-Leibler divergence from a share per class: cross-entropy minus the entropy of the target."""
    truth = class_targets(output, target, label_smoothing)
    return F.kl_div(F.log_softmax(output, 1), truth, reduction="none").sum(1)


def jensen_shannon(output: Tensor, target: Tensor, label_smoothing: float, js_weight: float) -> Tensor:
    """Divergence of prediction and target from their mixture, `js_weight` of it target. Bounded, so a wrong
    label costs little. Scaled: cross-entropy for a small weight, the absolute error for one near 1."""
    truth, log_p = class_targets(output, target, label_smoothing), F.log_softmax(output, 1)
    log_mixture = torch.logaddexp(torch.log(js_weight * truth), math.log(1 - js_weight) + log_p)
    from_truth = (torch.xlogy(truth, truth) - truth * log_mixture).sum(1)
    from_prediction = (log_p.exp() * (log_p - log_mixture)).sum(1)
    return (js_weight * from_truth + (1 - js_weight) * from_prediction) / (
        -(1 - js_weight) * math.log(1 - js_weight)
    )


# --- each output separately; for one of many classes, the variant *_multiclass -----------------------


def _labels(output: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    return target.view_as(output) * (1 - label_smoothing) + 0.5 * label_smoothing


def _error(truth: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Predicted probability of the wrong answer."""
    return (truth * negative + (1 - truth) * positive).clamp(min=TINY)


def bce(output: Tensor, target: Tensor, label_smoothing: float, target_threshold: float | None) -> Tensor:
    if target_threshold is not None:
        target = (target > target_threshold).to(output.dtype)
    truth = _labels(output, target, label_smoothing)
    return F.binary_cross_entropy_with_logits(output, truth, reduction="none")


def bce_multiclass(
    output: Tensor, target: Tensor, label_smoothing: float, target_threshold: float | None
) -> Tensor:
    """One binary loss per class: mixed images may have two classes, and neither has to lower the other."""
    truth = class_targets(output, target, label_smoothing)
    return bce(output, truth, 0.0, target_threshold).mean(1)


def focal(
    output: Tensor, target: Tensor, label_smoothing: float, gamma: float, alpha: float | None
) -> Tensor:
    truth = _labels(output, target, label_smoothing)
    loss = F.binary_cross_entropy_with_logits(output, truth, reduction="none")
    loss = loss * _error(truth, output.sigmoid(), (-output).sigmoid()) ** gamma
    return loss if alpha is None else loss * (alpha * truth + (1 - alpha) * (1 - truth))


def focal_multiclass(
    output: Tensor, target: Tensor, label_smoothing: float, gamma: float, alpha: float | None
) -> Tensor:
    truth, log_p = class_targets(output, target, label_smoothing), F.log_softmax(output, 1)
    return -(truth * (1 - log_p.exp()).clamp(min=TINY) ** gamma * log_p).sum(1)


def poly(output: Tensor, target: Tensor, label_smoothing: float, epsilon: float) -> Tensor:
    truth = _labels(output, target, label_smoothing)
    error = _error(truth, output.sigmoid(), (-output).sigmoid())
    return F.binary_cross_entropy_with_logits(output, truth, reduction="none") + epsilon * error


def poly_multiclass(output: Tensor, target: Tensor, label_smoothing: float, epsilon: float) -> Tensor:
    truth, log_p = class_targets(output, target, label_smoothing), F.log_softmax(output, 1)
    return -(truth * log_p).sum(1) + epsilon * (1 - (truth * log_p.exp()).sum(1))


def asymmetric(
    output: Tensor, target: Tensor, label_smoothing: float, gamma: float, gamma_pos: float, clip: float
) -> Tensor:
    """Focal with a larger gamma for negatives; negatives below a probability of `clip` cost nothing. For many
    rare labels."""
    truth = _labels(output, target, label_smoothing)
    positive, negative = output.sigmoid(), ((-output).sigmoid() + clip).clamp(max=1)
    loss = truth * positive.clamp(min=TINY).log() + (1 - truth) * negative.clamp(min=TINY).log()
    error = 1 - (truth * positive + (1 - truth) * negative)
    return -loss * error.clamp(min=TINY) ** (gamma_pos * truth + gamma * (1 - truth))


# --- values and grades -------------------------------------------------------------------------------


def mse(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target.view_as(output), reduction="none")


def l1(output: Tensor, target: Tensor) -> Tensor:
    return F.l1_loss(output, target.view_as(output), reduction="none")


def huber(output: Tensor, target: Tensor, delta: float | Tensor) -> Tensor:
    """torch's version takes one delta for all targets."""
    error = (output - target.view_as(output)).abs()
    return torch.where(error < delta, 0.5 * error**2, delta * (error - 0.5 * delta))


def log_cosh(output: Tensor, target: Tensor) -> Tensor:
    """Squared near 0, absolute far away, smooth in between."""
    error = output - target.view_as(output)
    return error + F.softplus(-2 * error) - math.log(2)


def bins(output: Tensor, target: Tensor, label_smoothing: float, bins: int, range: list[float]) -> Tensor:
    """Cross-entropy over bins. A value is split between the two nearest bin centers, so that their mean is
    the value."""
    centers = torch.as_tensor(
        bin_centers({"bins": bins, "range": range}), dtype=output.dtype, device=output.device
    )
    values = target.reshape(len(output), -1, 1).clamp(centers[0], centers[-1])  # (batch, targets, 1)
    truth = (1 - (values - centers).abs() / (centers[1] - centers[0])).clamp(min=0)  # (batch, targets, bins)
    truth = truth * (1 - label_smoothing) + label_smoothing / bins
    return -(truth * F.log_softmax(output.view(len(output), -1, bins), 2)).sum(2)


def cumulative(output: Tensor, target: Tensor) -> Tensor:
    """Ordinal: output k is the logit of a grade above k."""
    above = (target[:, None] > torch.arange(output.shape[1], device=output.device)).to(output.dtype)
    return F.binary_cross_entropy_with_logits(output, above, reduction="none").sum(1)


def soft_labels(output: Tensor, target: Tensor, sigma: float) -> Tensor:
    """Ordinal: one output per grade; the target is a Gaussian of width `sigma` around the true grade."""
    grades = torch.arange(output.shape[1], device=output.device, dtype=output.dtype)
    truth = F.softmax(-0.5 * ((grades - target[:, None]) / sigma) ** 2, 1)
    return -(truth * F.log_softmax(output, 1)).sum(1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (
        metric_learning.arcface, metric_learning.contrastive, metric_learning.triplet,
        cross_entropy, kl, jensen_shannon, bce, bce_multiclass, focal, focal_multiclass, poly,
        poly_multiclass, asymmetric, mse, l1, huber, log_cosh, bins, cumulative, soft_labels,
    )
}  # fmt: skip


# --- the loss of a run -------------------------------------------------------------------------------


def build_loss(
    cfg: Config, samples: Samples, train_rows: Positions, standardized: bool = True
) -> MultiHeadLoss:
    """(output, targets) -> (batch,). `standardized`: of standardized targets, to minimize; otherwise in their
    units, to log."""
    return mean_over_heads(cfg, samples.heads, head_losses(cfg, samples, train_rows, standardized))


def head_losses(
    cfg: Config, samples: Samples, train_rows: Positions, standardized: bool = True
) -> list[Loss]:
    return [
        _head_loss(cfg, head, objective, samples, train_rows, standardized)
        for head, objective in zip(samples.heads, loss_knobs.head_losses(cfg, samples.heads), strict=True)
    ]


def has_scaled_targets(cfg: Config, heads: tuple[Head, ...]) -> bool:
    """Whether targets are standardized, so that the logged loss differs from the minimized one."""
    return any(objective.name in POWERS for objective in loss_knobs.head_losses(cfg, heads))


def mean_over_heads(cfg: Config, heads: tuple[Head, ...], losses: list[Loss]) -> MultiHeadLoss:
    """(batch, all outputs), one target per head -> (batch,)"""
    sizes = output_sizes(cfg, heads)

    def loss(output: Tensor, targets: list[Tensor]) -> Tensor:
        blocks = output.float().split(sizes, dim=1)
        values = [
            head_loss(block, target) for head_loss, block, target in zip(losses, blocks, targets, strict=True)
        ]
        return torch.stack(values).mean(0)

    return loss


def reduce(per_sample_loss: Tensor, ohem: float) -> Tensor:
    """(batch,) -> scalar: the mean over all samples, or with ohem < 1 over that share of samples with the
    highest loss."""
    if ohem < 1:
        count = max(1, round(ohem * len(per_sample_loss)))
        per_sample_loss = per_sample_loss.topk(count, sorted=False).values
    return per_sample_loss.mean()


def _head_loss(
    cfg: Config, head: Head, objective: HeadLoss, samples: Samples, train_rows: Positions, standardized: bool
) -> Loss:
    """One head's loss with its knobs and class weights: (batch, outputs of the head), target -> (batch,)"""
    if objective.name == "loss":
        return _custom_loss()
    multiclass = f"{objective.name}_multiclass"
    function = LOSSES[multiclass if head.exclusive and multiclass in LOSSES else objective.name]
    class_weight = class_balance.class_weights(cfg, head, samples, train_rows)
    knobs: dict[str, Any] = dict(objective.knobs)
    if objective.name == "arcface":
        count = class_balance.class_counts(head, samples, train_rows)
        knobs["margin"] = metric_learning.class_margins(count, knobs["margin"], knobs.pop("margin_rare"))
        del knobs["sub_centers"]  # a knob of the network
    if objective.name == "bins":
        loss_knobs.validate_range(objective, head, samples.targets(head)[train_rows])
    if objective.name in POWERS:
        mean, std = map(target_scaler.on_device, target_scaler.mean_and_std(head, samples, train_rows))
        power = None if standardized else POWERS[objective.name]
        function = target_scaler.standardized_loss(function, std, power)
        if class_weight is not None:
            class_weight = target_scaler.grade_weight(class_weight, mean, std)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        values = function(output, target, **knobs)
        if class_weight is not None:
            values = values * class_weight(target).view_as(values)
        return values if values.ndim == 1 else values.mean(1)

    return loss


def _custom_loss() -> Loss:
    loss = pages.get("loss")
    if loss is None:
        raise UserError(
            "loss-unknown",
            where="comp/competition.py",
            key="loss.name",
            what="loss: no such function",
            remedy="define loss(output, target)",
        )

    def validated(output: Tensor, target: Tensor) -> Tensor:
        """A scalar would be broadcast over the sample weights, and train as if it were one loss a sample."""
        values: Tensor = loss(output, target)
        if values.shape != (len(output),):
            raise UserError(
                "loss-shape",
                where="comp/competition.py",
                key="loss",
                what=f"returns {tuple(values.shape)} for a batch of {len(output)}, not ({len(output)},)",
                remedy='return one loss a sample, as F.cross_entropy(output, target, reduction="none")',
            )
        return values

    return validated
