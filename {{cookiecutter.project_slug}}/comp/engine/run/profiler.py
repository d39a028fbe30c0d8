"""Where the time of a training run goes: comp train --profile."""

from __future__ import annotations

import time

import torch


class Profiler:
    """Seconds per phase of the training loop, summed over all steps.

    When enabled, each lap synchronizes the device, so that asynchronous GPU work is counted in the phase that launched it.
    This makes a run slightly slower. Disabled, every method returns at once.
    """

    def __init__(self, device: torch.device, enabled: bool = False):
        self.device = device
        self.enabled = enabled
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        if not self.enabled:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    def table(self) -> str:
        whole = sum(self.laps.values()) or 1.0
        lines = [
            f"{name:22} {s:8.1f} s  {s / whole:4.0%}  {'#' * round(40 * s / whole)}"
            for name, s in self.laps.items()
        ]
        waiting = self.laps.get("waiting for pictures", 0.0) / whole
        verdict = (
            "the loader holds the network up: augment=fast, a smaller data.cache_scale, or more machine.num_workers"
            if waiting > 0.15
            else "the network is what takes the time, not the loader"
        )
        return "\n".join([*lines, verdict])
