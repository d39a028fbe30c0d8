"""Regression targets are standardized: each column by its mean and standard deviation in the training rows of the fold.

In training mode the network's outputs are standardized values, as are the targets that the loss compares them with. In evaluation
mode a forward hook converts them to the unit of the target, so that callers here, exports and Kaggle kernels get plain values. Mean
and deviation are buffers of the network, as the pixel mean is (normalize.py): stored with its weights and with every average of them.

A custom loss gets outputs and targets in the unit of the target; then the hook is active in both modes.
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

MEAN, DEVIATION = "target_mean", "target_std"  # names of the buffers
CLASS_LOSSES = ("bins", "cumulative", "soft_labels")  # network outputs are class scores, not values
Array = NDArray[np.float64]


def mean_and_std(head: Head, samples: Samples, rows: Positions) -> tuple[Array, Array]:
    """Mean and standard deviation of each target column. Missing values are left out; the deviation of a constant is 1."""
    values = samples.targets(head)[np.unique(rows)]
    known = ~np.isnan(values)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, values, 0.0).sum(axis=0) / count
    deviation = np.sqrt((np.where(known, values - mean, 0.0) ** 2).sum(axis=0) / count)
    constant = deviation <= np.finfo(np.float32).eps * np.abs(mean)  # no more than rounding
    return mean, np.where(constant, 1.0, deviation)


def is_scaled(head: Head, objective: HeadLoss) -> bool:
    """Whether the network outputs of a head are values, one per target column."""
    return head.spec.spaces is VALUES and objective.name not in CLASS_LOSSES


def register(cfg: Config, heads: tuple[Head, ...], module: nn.Module) -> None:
    """Add the buffers, one number per network output, and the hook that applies them."""
    pairs = list(zip(heads, loss_knobs.head_losses(cfg, heads), strict=True))
    if not any(is_scaled(head, objective) for head, objective in pairs):
        return
    width = sum(head.spec.num_outputs(head, objective) for head, objective in pairs)
    module.register_buffer(MEAN, torch.zeros(width))
    module.register_buffer(DEVIATION, torch.ones(width))
    module.register_forward_hook(to_target_units if cfg.loss.name == "loss" else to_target_units_in_eval)


def to_target_units(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """(batch, all outputs). Outputs that are no values have mean 0 and deviation 1."""
    return output * module.get_buffer(DEVIATION) + module.get_buffer(MEAN)  # float32, also under autocast


def to_target_units_in_eval(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output if module.training else to_target_units(module, inputs, output)


def fit(cfg: Config, module: nn.Module, samples: Samples, rows: Positions) -> None:
    """Fill the buffers from the training rows of the fold."""
    start = 0
    for head, objective in zip(samples.heads, loss_knobs.head_losses(cfg, samples.heads), strict=True):
        width = head.spec.num_outputs(head, objective)
        if is_scaled(head, objective):
            mean, deviation = mean_and_std(head, samples, rows)
            module.get_buffer(MEAN)[start : start + width] = torch.from_numpy(mean)
            module.get_buffer(DEVIATION)[start : start + width] = torch.from_numpy(deviation)
        start += width


def standardize(
    cfg: Config, samples: Samples, rows: Positions, targets: list[NDArray[np.generic]]
) -> list[NDArray[np.generic]]:
    """Targets of each head as the loss takes them.

    In float64: otherwise the unit of a target would change its rounding, and training amplifies the last digit.
    """
    standardized = []
    for head, objective, target in zip(
        samples.heads, loss_knobs.head_losses(cfg, samples.heads), targets, strict=True
    ):
        if is_scaled(head, objective) and objective.name != "loss":
            mean, deviation = mean_and_std(head, samples, rows)
            values = target.reshape(len(target), -1).astype(np.float64)
            target = ((values - mean) / deviation).reshape(target.shape)
        standardized.append(target)
    return standardized


def to_loss_units(cfg: Config, module: nn.Module, raw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Network outputs of evaluation mode converted to those of training mode, which the loss takes."""
    if cfg.loss.name == "loss" or not hasattr(module, MEAN):
        return raw
    mean, deviation = (module.get_buffer(name).cpu().double().numpy() for name in (MEAN, DEVIATION))
    return ((raw - mean) / deviation).astype(np.float32)
