"""Losses, looked at for many steps at once: each look makes the CPU wait for the GPU. Nothing is saved before it was looked at,
so that NaN and inf never reach a checkpoint, and each look can say at which step and with which samples they began."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from comp.engine.data.samples import Positions, Samples
from comp.engine.run import distributed, tracking
from comp.engine.run.distributed import CollectiveError

EVERY = 25  # steps between two looks
NAMED = 5  # samples that an error lists
REMEDY = "lower optim.lr, clip with optim.clip_grad, or train.amp=fp32"


class Step(NamedTuple):
    number: int
    lr: float
    samples: list[Positions]  # of each pass
    each: list[Tensor]  # the loss of each of them
    losses: list[Tensor]  # of each pass its part of the step's loss: they add up to it
    norms: list[Tensor]  # of the gradient, where clipping measures it anyway


class NanGuard:
    def __init__(self, log: tracking.RunLogger, samples: Samples, scaled: bool, pass_size: int):
        self.log, self.samples, self.pass_size = log, samples, pass_size
        self.scaled = scaled  # fp16: its scaler leaves out a step whose gradient overflows, and goes on with a smaller scale
        self.steps: list[Step] = []

    def begin(self, number: int, rate: float) -> None:
        self.steps.append(Step(number, rate, [], [], [], []))

    def again(self) -> None:
        """The step in hand starts anew."""
        number, rate, *_ = self.steps.pop()
        self.begin(number, rate)

    def note(self, samples: Positions, each: Tensor, loss: Tensor) -> None:
        step = self.steps[-1]
        step.samples.append(samples)
        step.each.append(each.detach())
        step.losses.append(loss.detach())

    def note_gradient(self, norm: Tensor) -> None:
        self.steps[-1].norms.append(norm.detach())

    @property
    def due(self) -> bool:
        return len(self.steps) >= EVERY

    def look(self, pass_size: int) -> list[float]:
        """One record a step; their losses. `pass_size` is logged when it has changed."""
        steps, self.steps = self.steps, []
        sums = torch.stack([torch.stack(step.losses).sum() for step in steps]).float()
        norms = torch.stack([step.norms[0].float() if step.norms else sums.new_zeros(()) for step in steps])
        seen = torch.stack([sums, norms]).cpu()
        values, lengths = distributed.all_reduce(seen[0]).tolist(), seen[1].tolist()
        for step, value, length in zip(steps, values, lengths, strict=True):
            if not math.isfinite(value):
                self._refuse(step, f"the loss is {value}", broken=True)
            if not math.isfinite(length) and not self.scaled:
                self._refuse(step, f"the gradient is {length}")
            self.log.log({"step": step.number, "loss": value, "lr": step.lr})
        if pass_size != self.pass_size:
            self.log.log({"step": steps[-1].number, "pass_size": pass_size})
            self.pass_size = pass_size
        if self.scaled and len(steps) == EVERY and not any(map(math.isfinite, lengths)):
            self._refuse(steps[0], f"fp16 overflows {EVERY} times on end, first")
        return list(values)

    def weights(self, module: nn.Module, step: int) -> None:
        """Before they are saved: a gradient may break them in the very step before, and without clipping nobody measures it."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in module.parameters()]))
        if not bool(norms.isfinite().all()):
            raise CollectiveError(
                f"the weights are NaN or inf behind step {step}: {REMEDY}; the last checkpoint is from before"
            )

    def _refuse(self, step: Step, what: str, broken: bool = False) -> None:
        """`broken`: only those samples are named whose own loss is not finite."""
        rows = np.concatenate(step.samples)
        if broken:
            rows = rows[~torch.cat(step.each).isfinite().cpu().numpy()]
        rows = np.concatenate(distributed.all_gather(rows))
        raise CollectiveError(
            f"{what} at step {step.number}{list_samples(self.samples, rows)}: {REMEDY}; the last checkpoint is from before"
        )


def list_samples(samples: Samples, rows: Positions) -> str:
    """Which samples, in words. Where it is all of a batch, the rate was at fault rather than they."""
    if not len(rows):
        return ""
    ids = samples.frame["id"].iloc[rows[:NAMED]]
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f", samples {', '.join(ids)}{more}"
