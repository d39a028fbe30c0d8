"""Losses by name: (network output of a head, target, its knobs) -> one number a sample. `loss.name` in a config names one.

Targets are class codes (batch,), or shares for each class (batch, classes); 0, 1 or a share for each label; or values. Losses
that ask of each output by itself give (batch, outputs), so that yes and no can be weighed label by label.

Those of timm are not used: the versions that run on Kaggle return means only. The tests hold ours against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from comp.engine import pages
from comp.engine.config.schema import Config
from comp.engine.data import class_balance
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import Refused
from comp.engine.run import metric_learning, target_scaler
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import Head, HeadLoss, bin_centers
from comp.models import output_sizes

POWERS = {"mse": 2, "l1": 1, "huber": 2, "log_cosh": 2}  # of the target's unit: losses of values
TINY = 1e-8  # a power below 1 has no slope at 0
Loss = Callable[[Tensor, Tensor], Tensor]
Total = Callable[[Tensor, list[Tensor]], Tensor]


# --- one of many classes -------------------------------------------------------------------------------------------------


def class_targets(output: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """(batch, classes), whichever way the target came."""
    if target.ndim == 1:
        target = F.one_hot(target, output.shape[1]).to(output.dtype)
    return target * (1 - label_smoothing) + label_smoothing / output.shape[1]


def cross_entropy(output: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(output, target, reduction="none", label_smoothing=label_smoothing)


def kl(output: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """How far the answer is from a share for each class: cross entropy less what no model can get rid of."""
    return F.kl_div(
        F.log_softmax(output, 1), class_targets(output, target, label_smoothing), reduction="none"
    ).sum(1)


def jensen_shannon(output: Tensor, target: Tensor, label_smoothing: float, js_weight: float) -> Tensor:
    """Distance of answer and target from what lies between them, `js_weight` of it target. A label that is wrong costs at most
    so much. Scaled so that a small share gives cross entropy and one near 1 the absolute error."""
    truth, log_p = class_targets(output, target, label_smoothing), F.log_softmax(output, 1)
    between = torch.logaddexp(torch.log(js_weight * truth), math.log(1 - js_weight) + log_p)
    from_truth = (torch.xlogy(truth, truth) - truth * between).sum(1)
    from_answer = (log_p.exp() * (log_p - between)).sum(1)
    return (js_weight * from_truth + (1 - js_weight) * from_answer) / (
        -(1 - js_weight) * math.log(1 - js_weight)
    )


# --- each output by itself, or one of many: told by the target -----------------------------------------------------------


def _labels(output: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    return target.view_as(output) * (1 - label_smoothing) + 0.5 * label_smoothing


def _wrong(truth: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """The probability of what is not so."""
    return (truth * no + (1 - truth) * yes).clamp(min=TINY)


def bce(output: Tensor, target: Tensor, label_smoothing: float, target_threshold: float | None) -> Tensor:
    if target_threshold is not None:
        target = (target > target_threshold).to(output.dtype)
    return F.binary_cross_entropy_with_logits(
        output, _labels(output, target, label_smoothing), reduction="none"
    )


def bce_multiclass(
    output: Tensor, target: Tensor, label_smoothing: float, target_threshold: float | None
) -> Tensor:
    """Each class is asked for by itself, so none has to lose for another to win: mixed pictures hold two."""
    truth = class_targets(output, target, label_smoothing)
    return bce(output, truth, 0.0, target_threshold).mean(1)


def focal(
    output: Tensor, target: Tensor, label_smoothing: float, gamma: float, alpha: float | None
) -> Tensor:
    truth = _labels(output, target, label_smoothing)
    loss = F.binary_cross_entropy_with_logits(output, truth, reduction="none")
    loss = loss * _wrong(truth, output.sigmoid(), (-output).sigmoid()) ** gamma
    return loss if alpha is None else loss * (alpha * truth + (1 - alpha) * (1 - truth))


def focal_multiclass(
    output: Tensor, target: Tensor, label_smoothing: float, gamma: float, alpha: float | None
) -> Tensor:
    truth, log_p = class_targets(output, target, label_smoothing), F.log_softmax(output, 1)
    return -(truth * (1 - log_p.exp()).clamp(min=TINY) ** gamma * log_p).sum(1)


def poly(output: Tensor, target: Tensor, label_smoothing: float, epsilon: float) -> Tensor:
    truth = _labels(output, target, label_smoothing)
    wrong = _wrong(truth, output.sigmoid(), (-output).sigmoid())
    return F.binary_cross_entropy_with_logits(output, truth, reduction="none") + epsilon * wrong


def poly_multiclass(output: Tensor, target: Tensor, label_smoothing: float, epsilon: float) -> Tensor:
    truth, log_p = class_targets(output, target, label_smoothing), F.log_softmax(output, 1)
    return -(truth * log_p).sum(1) + epsilon * (1 - (truth * log_p.exp()).sum(1))


def asymmetric(
    output: Tensor, target: Tensor, label_smoothing: float, gamma: float, gamma_pos: float, clip: float
) -> Tensor:
    """Easy no's count less than easy yes's, and those below `clip` nothing: of many labels most are no."""
    truth = _labels(output, target, label_smoothing)
    yes, no = output.sigmoid(), ((-output).sigmoid() + clip).clamp(max=1)
    loss = truth * yes.clamp(min=TINY).log() + (1 - truth) * no.clamp(min=TINY).log()
    wrong = 1 - (truth * yes + (1 - truth) * no)
    return -loss * wrong.clamp(min=TINY) ** (gamma_pos * truth + gamma * (1 - truth))


# --- values and grades ---------------------------------------------------------------------------------------------------


def mse(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target.view_as(output), reduction="none")


def l1(output: Tensor, target: Tensor) -> Tensor:
    return F.l1_loss(output, target.view_as(output), reduction="none")


def huber(output: Tensor, target: Tensor, delta: float | Tensor) -> Tensor:
    """torch's takes one delta for all targets."""
    away = (output - target.view_as(output)).abs()
    return torch.where(away < delta, 0.5 * away**2, delta * (away - 0.5 * delta))


def log_cosh(output: Tensor, target: Tensor) -> Tensor:
    """Squared near 0, absolute far away, smooth in between."""
    away = output - target.view_as(output)
    return away + F.softplus(-2 * away) - math.log(2)


def bins(output: Tensor, target: Tensor, label_smoothing: float, bins: int, range: list[float]) -> Tensor:
    """A value is shared between the two centres beside it, so that the mean that is read off is the value itself."""
    places = torch.as_tensor(
        bin_centers({"bins": bins, "range": range}), dtype=output.dtype, device=output.device
    )
    values = target.reshape(len(output), -1, 1).clamp(places[0], places[-1])  # (batch, targets, 1)
    truth = (1 - (values - places).abs() / (places[1] - places[0])).clamp(min=0)  # (batch, targets, bins)
    truth = truth * (1 - label_smoothing) + label_smoothing / bins
    return -(truth * F.log_softmax(output.view(len(output), -1, bins), 2)).sum(2)


def cumulative(output: Tensor, target: Tensor) -> Tensor:
    """Ordinal: output k asks whether the grade is above k."""
    above = (target[:, None] > torch.arange(output.shape[1], device=output.device)).to(output.dtype)
    return F.binary_cross_entropy_with_logits(output, above, reduction="none").sum(1)


def soft_labels(output: Tensor, target: Tensor, sigma: float) -> Tensor:
    """Ordinal: an output a grade, and the grades beside the true one are right a little."""
    grades = torch.arange(output.shape[1], device=output.device, dtype=output.dtype)
    near = F.softmax(-0.5 * ((grades - target[:, None]) / sigma) ** 2, 1)
    return -(near * F.log_softmax(output, 1)).sum(1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (
        metric_learning.arcface, metric_learning.contrastive, metric_learning.triplet, cross_entropy, kl, jensen_shannon, bce, bce_multiclass, focal, focal_multiclass, poly, poly_multiclass, asymmetric,
        mse, l1, huber, log_cosh, bins, cumulative, soft_labels,
    )
}  # fmt: skip


# --- of a run ------------------------------------------------------------------------------------------------------------


def build_loss(cfg: Config, samples: Samples, taught: Positions, standardised: bool = True) -> Total:
    """`standardised`: what is minimised; otherwise in the units of the targets, to be read."""
    return mean_over_heads(cfg, samples.heads, head_losses(cfg, samples, taught, standardised))


def head_losses(cfg: Config, samples: Samples, taught: Positions, standardised: bool = True) -> list[Loss]:
    return [
        _named(cfg, head, loss, samples, taught, standardised)
        for head, loss in zip(samples.heads, loss_knobs.head_losses(cfg, samples.heads), strict=True)
    ]


def has_scaled_targets(cfg: Config, heads: tuple[Head, ...]) -> bool:
    """Whether what is minimised is not what is read, since there are values among the targets."""
    return any(loss.name in POWERS for loss in loss_knobs.head_losses(cfg, heads))


def mean_over_heads(cfg: Config, heads: tuple[Head, ...], losses: list[Loss]) -> Total:
    """The mean over heads of each head's loss: (batch, all outputs), one target a head -> (batch,)"""
    sizes = output_sizes(cfg, heads)

    def loss(output: Tensor, targets: list[Tensor]) -> Tensor:
        blocks = output.float().split(sizes, dim=1)
        each = [one(block, target) for one, block, target in zip(losses, blocks, targets, strict=True)]
        return torch.stack(each).mean(0)

    return loss


def reduce(each: Tensor, hardest: float) -> Tensor:
    """(batch,), weighted -> the number that is back-propagated: the mean over all samples, or over the share with the
    highest loss."""
    if hardest < 1:
        each = each.topk(max(1, round(hardest * len(each))), sorted=False).values
    return each.mean()


def _named(
    cfg: Config, head: Head, chosen: HeadLoss, samples: Samples, taught: Positions, standardised: bool
) -> Loss:
    if chosen.name == "loss":
        hook = pages.get("loss")
        if hook is None:
            raise Refused("loss.name: loss: comp/competition.py defines no loss(output, target)")
        return hook
    of_classes = f"{chosen.name}_multiclass"
    function = LOSSES[of_classes if head.exclusive and of_classes in LOSSES else chosen.name]
    weigh = class_balance.class_weights(cfg, head, samples, taught)
    knobs = dict(chosen.knobs)
    if chosen.name == "arcface":
        count = class_balance.class_counts(head, samples, taught)
        knobs["margin"] = metric_learning.class_margins(count, knobs["margin"], knobs.pop("margin_rare"))
        del knobs["sub_centers"]  # of the network
    if chosen.name == "bins":
        _within(chosen, head, samples.targets(head)[taught])
    if chosen.name in POWERS:
        mean, unit = map(_on_device, target_scaler.mean_and_std(head, samples, taught))
        function = _in_deviations(function, unit, None if standardised else POWERS[chosen.name])
        weigh = None if weigh is None else _by_grade(weigh, mean, unit)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        each = function(output, target, **knobs)
        if weigh is not None:
            each = each * weigh(target).view_as(each)
        return each if each.ndim == 1 else each.mean(1)

    return loss


def _on_device(values: NDArray[np.float64]) -> Callable[[torch.device], Tensor]:
    return cache(lambda device: torch.tensor(values, dtype=torch.float32, device=device))


def _in_deviations(
    function: Callable[..., Tensor], unit: Callable[[torch.device], Tensor], back: int | None
) -> Callable[..., Tensor]:
    """The loss of standardised values. huber's delta is told in the unit of the target. `back`: the power of that unit which the loss
    is in, to read it in that unit."""

    def loss(output: Tensor, target: Tensor, **knobs: float) -> Tensor:
        one = unit(output.device)  # (targets,)
        each = function(output, target, **{key: value / one for key, value in knobs.items()})
        return each if back is None else each * one**back

    return loss


def _by_grade(
    weigh: Callable[[Tensor], Tensor],
    mean: Callable[[torch.device], Tensor],
    unit: Callable[[torch.device], Tensor],
) -> Callable[[Tensor], Tensor]:
    """Weights of classes, of grades that are learned standardised."""
    return lambda target: weigh((target * unit(target.device) + mean(target.device)).round())


def _within(chosen: HeadLoss, head: Head, values: np.ndarray) -> None:
    low, high = chosen.knobs["range"]
    if values.min() < low or values.max() > high:
        raise Refused(
            f"loss.range: {low:g} to {high:g} leaves out targets of {head.name}, which go from {values.min():g} to {values.max():g}"
        )
