"""How long something of a training run lasts: 500 steps, 3 epochs, 10%, or a plain number of epochs. Converted here alone."""

from __future__ import annotations

import re
from typing import NamedTuple

FORM = re.compile(r"(\d+\.?\d*|\.\d+)\s*(steps?|epochs?|%)")


class Duration(NamedTuple):
    amount: float  # 0.1 of the run for 10%
    unit: str  # steps | epochs | share

    def in_steps(self, steps: int, steps_per_epoch: int) -> int:
        """Of a run of so many steps."""
        return round(self.amount * {"steps": 1, "epochs": steps_per_epoch, "share": steps}[self.unit])

    def in_epochs(self, epochs: float) -> float | None:
        """Of a run of so many epochs; None when that takes knowing how many steps an epoch has."""
        return {"steps": None, "epochs": self.amount, "share": self.amount * epochs}[self.unit]


def parse(value: object) -> Duration:
    """ValueError where it is none."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return Duration(float(value), "epochs")
    match = FORM.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("should be like 500 steps, 3 epochs or 10%")
    amount, unit = float(match[1]), match[2]
    if unit != "%":
        return Duration(amount, f"{unit.rstrip('s')}s")
    if amount > 100:
        raise ValueError("should be at most 100%")
    return Duration(amount / 100, "share")
