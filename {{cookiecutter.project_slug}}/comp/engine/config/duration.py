"""Parses and converts durations: 500 steps, 3 epochs, 10% of the run, or a plain number of epochs."""

from __future__ import annotations

import re
from typing import NamedTuple

FORMAT = re.compile(r"(\d+\.?\d*|\.\d+)\s*(steps?|epochs?|%)")


class Duration(NamedTuple):
    amount: float  # 0.1 of the run for 10%
    unit: str  # steps | epochs | share

    def in_steps(self, steps: int, steps_per_epoch: int) -> int:
        """Number of steps, in a run of `steps` steps."""
        return round(self.amount * {"steps": 1, "epochs": steps_per_epoch, "share": steps}[self.unit])

    def in_epochs(self, epochs: float) -> float | None:
        """Number of epochs, in a run of `epochs` epochs. None for a duration in steps."""
        return {"steps": None, "epochs": self.amount, "share": self.amount * epochs}[self.unit]


def parse(value: object) -> Duration:
    """Raises ValueError if the value is not a duration."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return Duration(float(value), "epochs")
    match = FORMAT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("should be like 500 steps, 3 epochs or 10%")
    amount, unit = float(match[1]), match[2]
    if unit != "%":
        return Duration(amount, f"{unit.rstrip('s')}s")
    if amount > 100:
        raise ValueError("should be at most 100%")
    return Duration(amount / 100, "share")
