"""NaN and inf in losses, gradients and weights, found before they reach a checkpoint and reported with their
step and samples.

Reading a loss makes the CPU wait for the GPU, so losses are checked for many steps at once, and always before
anything is saved.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from comp.engine.data.samples import Positions, Samples
from comp.engine.run import distributed, tracking
from comp.engine.run.distributed import CollectiveError

CHECK_EVERY = 25  # steps between two checks
MAX_IDS = 5  # samples that an error lists
REMEDY = (
    "lower optim.lr, set optim.clip_grad, or use train.amp=bf16 or fp32 instead of fp16; no NaN was saved"
)


class Step(NamedTuple):
    step: int
    lr: float
    rows: list[Positions]  # of each micro-batch
    sample_losses: list[Tensor]  # of each micro-batch, (batch,)
    losses: list[Tensor]  # of each micro-batch its part of the step's loss: they add up to it
    grad_norms: list[Tensor]  # measured only where gradients are clipped


class NanGuard:
    """Collects the losses of steps and checks them every CHECK_EVERY steps."""

    def __init__(self, log: tracking.RunLogger, samples: Samples, fp16: bool, micro_batch_size: int):
        self.log, self.samples, self.micro_batch_size = log, samples, micro_batch_size
        self.fp16 = fp16  # GradScaler skips a step whose gradient overflows and lowers its scale
        self.steps: list[Step] = []

    def start_step(self, step: int, lr: float) -> None:
        self.steps.append(Step(step, lr, [], [], [], []))

    def restart_step(self) -> None:
        """Discard what was recorded of the current step, which is computed again in smaller micro-batches."""
        step, lr, *_ = self.steps.pop()
        self.start_step(step, lr)

    def record(self, rows: Positions, per_sample_loss: Tensor, loss: Tensor) -> None:
        current = self.steps[-1]
        current.rows.append(rows)
        current.sample_losses.append(per_sample_loss.detach())
        current.losses.append(loss.detach())

    def record_grad_norm(self, norm: Tensor) -> None:
        self.steps[-1].grad_norms.append(norm.detach())

    @property
    def due(self) -> bool:
        return len(self.steps) >= CHECK_EVERY

    def check(self, micro_batch_size: int) -> list[float]:
        """Check and log the steps since the last check; returns their losses. `micro_batch_size` is logged
        when it has changed."""
        steps, self.steps = self.steps, []
        losses = torch.stack([torch.stack(step.losses).sum() for step in steps]).float()
        norms = torch.stack(
            [step.grad_norms[0].float() if step.grad_norms else losses.new_zeros(()) for step in steps]
        )
        both = torch.stack([losses, norms]).cpu()  # (2, steps), one transfer
        loss_values, norm_values = distributed.all_reduce(both[0]).tolist(), both[1].tolist()
        for step, loss, norm in zip(steps, loss_values, norm_values, strict=True):
            if not math.isfinite(loss):
                self._raise(step, "loss-not-finite", f"the loss is {loss}", only_nan_losses=True)
            if not math.isfinite(norm) and not self.fp16:
                self._raise(step, "gradient-not-finite", f"the gradient norm is {norm}")
            self.log.log({"step": step.step, "loss": loss, "lr": step.lr})
        if micro_batch_size != self.micro_batch_size:
            self.log.log({"step": steps[-1].step, "micro_batch_size": micro_batch_size})
            self.micro_batch_size = micro_batch_size
        if self.fp16 and len(steps) == CHECK_EVERY and not any(map(math.isfinite, norm_values)):
            self._raise(
                steps[0], "fp16-overflow", f"fp16 overflows in {CHECK_EVERY} consecutive steps, from here on"
            )
        return list(loss_values)

    def check_weights(self, module: nn.Module, step: int) -> None:
        """Before weights are saved: the last step may have broken them, and without clipping no gradient norm
        shows it."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in module.parameters()]))
        if not bool(norms.isfinite().all()):
            raise CollectiveError(
                "weights-not-finite", where=f"step {step}", what="the weights are NaN or inf", remedy=REMEDY
            )

    def _raise(self, step: Step, code: str, what: str, only_nan_losses: bool = False) -> None:
        """`only_nan_losses`: list only samples whose own loss is not finite."""
        rows = np.concatenate(step.rows)
        if only_nan_losses:
            rows = rows[~torch.cat(step.sample_losses).isfinite().cpu().numpy()]
        rows = np.concatenate(distributed.all_gather(rows))
        raise nan_error(code, f"step {step.step}", what, self.samples, rows)


def nan_error(code: str, where: str, what: str, samples: Samples, rows: Positions) -> CollectiveError:
    """Lists the samples. If it is a whole batch, the learning rate is the cause rather than the samples."""
    return CollectiveError(code, where=where, what=what + list_samples(samples, rows), remedy=REMEDY)


def list_samples(samples: Samples, rows: Positions) -> str:
    """Like `, samples a, b and 3 more`; empty without rows."""
    if not len(rows):
        return ""
    ids = samples.frame["id"].iloc[rows[:MAX_IDS]]
    more = f" and {len(rows) - MAX_IDS} more" if len(rows) > MAX_IDS else ""
    return f", samples {', '.join(ids)}{more}"
