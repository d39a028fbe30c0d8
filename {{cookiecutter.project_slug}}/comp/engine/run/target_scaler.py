"""Regression targets are standardized: each column by its mean and standard deviation in the training rows of
the fold.

In training mode the network's outputs are standardized values, as are the targets that the loss compares them
with. In evaluation mode a forward hook converts them to the unit of the target, so that callers here, exports
and Kaggle kernels get plain values. Mean and deviation are buffers of the network, as the pixel mean is
(normalize.py): stored with its weights and with every average of them.

A custom loss gets outputs and targets in the unit of the target; then the hook is active in both modes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from comp.engine.config.schema import Config
from comp.engine.data.samples import Positions, Samples
from comp.engine.run import pseudo_rows
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import VALUES, Head, HeadLoss

MEAN, DEVIATION = "target_mean", "target_std"  # names of the buffers
CLASS_LOSSES = ("bins", "cumulative", "soft_labels")  # network outputs are class scores, not values
Array = NDArray[np.float64]
OnDevice = Callable[[torch.device], Tensor]  # numbers of each target column, copied once to each device


def mean_and_std(head: Head, samples: Samples, rows: Positions) -> tuple[Array, Array]:
    """Mean and standard deviation of each target column. Missing values are left out; the deviation of a
    constant is 1."""
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


def training_targets(cfg: Config, samples: Samples, rows: Positions, device: torch.device) -> list[Tensor]:
    """Targets of each head for every row of the samples, standardized by the training rows."""
    values = [pseudo_rows.training_target(samples, head) for head in samples.heads]
    return [_to_tensor(each, device) for each in standardize(cfg, samples, rows, values)]


def _to_tensor(values: NDArray[np.generic], device: torch.device) -> Tensor:
    dtype = torch.long if np.issubdtype(values.dtype, np.integer) else torch.float32
    return torch.tensor(values, dtype=dtype, device=device)


def standardize(
    cfg: Config, samples: Samples, rows: Positions, targets: list[NDArray[np.generic]]
) -> list[NDArray[np.generic]]:
    """Targets of each head as the loss takes them.

    In float64: otherwise the unit of a target would change its rounding, and training amplifies the last
    digit.
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


# --- losses of standardized targets ------------------------------------------------------------------


def on_device(values: Array) -> OnDevice:
    return cache(lambda device: torch.tensor(values, dtype=torch.float32, device=device))


def standardized_loss(
    function: Callable[..., Tensor], std: OnDevice, power: int | None
) -> Callable[..., Tensor]:
    """The loss of standardized values. huber's delta is given in the unit of the target, so it is
    standardized too. `power`: multiply the result by this power of the deviation, to get it in the unit of
    the target."""

    def loss(output: Tensor, target: Tensor, **knobs: float) -> Tensor:
        deviation = std(output.device)  # (targets,)
        values = function(output, target, **{key: value / deviation for key, value in knobs.items()})
        return values if power is None else values * deviation**power

    return loss


def grade_weight(
    class_weight: Callable[[Tensor], Tensor], mean: OnDevice, std: OnDevice
) -> Callable[[Tensor], Tensor]:
    """Class weights of grades whose targets are standardized."""
    return lambda target: class_weight((target * std(target.device) + mean(target.device)).round())
