"""Where the time of a training run goes: comp train --profile."""

from __future__ import annotations

import time

import torch


class Profiler:
    """Seconds per phase of the training loop, summed over all steps.

    When enabled, each lap synchronizes the device, so that asynchronous GPU work is counted in the phase that
    launched it. This makes a run slightly slower. Disabled, every method returns at once.
    """

    def __init__(self, device: torch.device, enabled: bool = False):
        self.device = device
        self.enabled = enabled
        self.seconds: dict[str, float] = {}  # phase -> seconds
        self._last = time.perf_counter()

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to a phase."""
        if not self.enabled:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def table(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        lines = [
            f"{phase:22} {s:8.1f} s  {s / total:4.0%}  {'#' * round(40 * s / total)}"
            for phase, s in self.seconds.items()
        ]
        loading = self.seconds.get("data loading", 0.0) / total
        verdict = (
            "the network waits for the loader: augment=fast, a smaller data.cache_scale or more "
            "machine.num_workers"
            if loading > 0.15
            else "the network takes most of the time, not the loader"
        )
        return "\n".join([*lines, verdict])
