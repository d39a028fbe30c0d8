"""Targets that are values are learned standardised, each column by its mean and deviation in the training part of the fold.

In training mode the network's outputs are in deviations from the mean, as is what the loss compares them with; in evaluation mode a
hook on it turns them into the unit of the target, so whatever calls it, here, exported or on Kaggle, need not know. The two numbers
of a column are buffers of the network, as the pixel mean is (normal.py): they are in its weights and in every average of them.

A loss of your own gets outputs and targets in the unit of the target; there the hook is on in both modes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from comp.engine.config.schema import Config
from comp.engine.data.samples import Positions, Samples
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import VALUES, Head, HeadLoss

MEAN, DEVIATION = "target_mean", "target_std"
OF_CLASSES = ("bins", "cumulative", "soft_labels")  # their outputs are scores of classes, not values
Numbers = NDArray[np.float64]


def mean_and_std(head: Head, samples: Samples, rows: Positions) -> tuple[Numbers, Numbers]:
    """Mean and deviation of each target column. Missing values do not count; the deviation of a constant is 1."""
    values = samples.targets(head)[np.unique(rows)]
    known = ~np.isnan(values)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, values, 0.0).sum(axis=0) / count
    deviation = np.sqrt((np.where(known, values - mean, 0.0) ** 2).sum(axis=0) / count)
    constant = deviation <= np.finfo(np.float32).eps * np.abs(mean)  # no more than rounding
    return mean, np.where(constant, 1.0, deviation)


def is_scaled(head: Head, chosen: HeadLoss) -> bool:
    """Whether the outputs of a head are values, one for each of its target columns."""
    return head.spec.spaces is VALUES and chosen.name not in OF_CLASSES


def register(cfg: Config, heads: tuple[Head, ...], module: nn.Module) -> None:
    """Places for the numbers, one an output of the network, and the hook that applies them."""
    every = list(zip(heads, loss_knobs.head_losses(cfg, heads), strict=True))
    if not any(is_scaled(head, chosen) for head, chosen in every):
        return
    width = sum(head.spec.num_outputs(head, chosen) for head, chosen in every)
    module.register_buffer(MEAN, torch.zeros(width))
    module.register_buffer(DEVIATION, torch.ones(width))
    module.register_forward_hook(to_target_units if cfg.loss.name == "loss" else to_target_units_in_eval)


def to_target_units(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """(batch, all outputs). What is no value has mean 0 and deviation 1."""
    return output * module.get_buffer(DEVIATION) + module.get_buffer(MEAN)  # float32, also under autocast


def to_target_units_in_eval(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output if module.training else to_target_units(module, inputs, output)


def fit(cfg: Config, module: nn.Module, samples: Samples, rows: Positions) -> None:
    """Fill the places from the rows that train the fold."""
    at = 0
    for head, chosen in zip(samples.heads, loss_knobs.head_losses(cfg, samples.heads), strict=True):
        width = head.spec.num_outputs(head, chosen)
        if is_scaled(head, chosen):
            mean, deviation = mean_and_std(head, samples, rows)
            module.get_buffer(MEAN)[at : at + width] = torch.from_numpy(mean)
            module.get_buffer(DEVIATION)[at : at + width] = torch.from_numpy(deviation)
        at += width


def standardize(
    cfg: Config, samples: Samples, rows: Positions, targets: list[NDArray[np.generic]]
) -> list[NDArray[np.generic]]:
    """Targets of each head as the loss takes them. In float64, so that no unit rounds otherwise than another: a network amplifies
    the last digit."""
    out = []
    for head, chosen, target in zip(
        samples.heads, loss_knobs.head_losses(cfg, samples.heads), targets, strict=True
    ):
        if is_scaled(head, chosen) and chosen.name != "loss":
            mean, deviation = mean_and_std(head, samples, rows)
            values = target.reshape(len(target), -1).astype(np.float64)
            target = ((values - mean) / deviation).reshape(target.shape)
        out.append(target)
    return out


def to_loss_units(cfg: Config, module: nn.Module, raw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs of evaluation mode as those of training mode, which the loss takes."""
    if cfg.loss.name == "loss" or not hasattr(module, MEAN):
        return raw
    mean, deviation = (module.get_buffer(name).cpu().double().numpy() for name in (MEAN, DEVIATION))
    return ((raw - mean) / deviation).astype(np.float32)
