"""Threads, devices, processes, signals and time limits of this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from comp.engine.errors import UserError

if TYPE_CHECKING:
    import torch


def set_threads(threads: int) -> None:
    """Sets the thread count of torch, OpenMP and OpenCV, a knob of the run since it changes the order of sums
    and so results. Overrides what Ray and torchrun set. Call it before torch is imported: OpenMP reads its
    variables once."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads slow a busy machine down tenfold
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # at import it would connect to look for updates
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def device(name: str) -> torch.device:
    """Of machine.device."""
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        what, remedy = f"{name}: torch finds no GPU", "auto takes the device that is available"
        raise UserError("device-missing", key="machine.device", what=what, remedy=remedy)
    if world_size() > 1 and name.startswith("cuda:"):
        what = f"{name} is one GPU, and each process of torchrun needs its own"
        raise UserError("device-shared", key="machine.device", what=what, remedy="set it to auto")
    if world_size() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            what, remedy = (
                f"{local_rank + 1} processes on a machine with {gpus} GPUs",
                f"--nproc-per-node {gpus}",
            )
            raise UserError("device-missing", where="torchrun", what=what, remedy=remedy)
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def world_size() -> int:
    """Processes of torchrun, on all machines; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


# Ctrl+C; SLURM, Kubernetes and spot machines before they end; "save and stop", for your own scripts.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP_EXIT_CODES = tuple(128 + number for number in STOP_SIGNALS)
# Further SIGTERMs within so many seconds are one: torchrun and SLURM send it to a process and its group.
REPEATED_WITHIN = 5.0


class _Received:
    number = 0  # of STOP_SIGNALS, the first one that was received
    at = 0.0


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise KeyboardInterrupt, as Ctrl+C does, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Received.number = 0
    before = {number: signal.signal(number, _interrupt) for number in STOP_SIGNALS[1:]}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    repeated = _Received.number and time.monotonic() - _Received.at < REPEATED_WITHIN
    _record(number)
    if not repeated:  # temporary files are being removed already
        raise KeyboardInterrupt


def _record(number: int) -> None:
    _Received.number, _Received.at = _Received.number or number, time.monotonic()


def received_signal() -> int:
    """The signal that stops this process; default: SIGINT."""
    return _Received.number or signal.SIGINT


def exit_code() -> int:
    return 128 + received_signal()


class Stopped(KeyboardInterrupt):
    """Everything is saved. With torchrun all processes raise it at the same place."""


class Stop:
    """Requested by a signal while `listening`, or by a time limit: the training loop then saves its state
    after the current step, and stops. A second Ctrl+C stops at once; a second SIGTERM does not, since
    schedulers send several."""

    MARGIN = 10.0  # seconds to save, to finish W&B and to print; of limits below 100 s a tenth

    def __init__(
        self, limit: float | None = None, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit, self.quiet, self.clock = limit, quiet, clock
        self.checked = self.started = clock()
        self.longest = 0.0  # seconds between two checks of `requested`
        self._requested = False
        self.signalled = False
        self.out_of_time = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """For work that checks `requested` every few seconds. Elsewhere a signal interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        if _Received.number and signal.getsignal(signal.SIGTERM) is _interrupt:
            # The KeyboardInterrupt was lost: Python ignores exceptions in destructors.
            self._requested = self.signalled = True
        before = {number: signal.signal(number, self._request) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """With a limit: true as soon as another interval as long as the longest so far might not end in
        time."""
        if self.limit is not None and not self._requested:
            now = self.clock()
            self.longest, self.checked = max(self.longest, now - self.checked), now
            left = self.limit - min(self.MARGIN, self.limit / 10) - (now - self.started)
            self._requested = self.out_of_time = left < 1.2 * self.longest
        return self._requested

    @requested.setter
    def requested(self, requested: bool) -> None:
        self._requested = requested

    def _request(self, number: int, frame: object) -> None:
        if self._requested and not self.out_of_time and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number != signal.SIGINT:
            _record(number)
        self._requested, self.signalled, self.out_of_time = True, True, False
        if number == signal.SIGINT and not self.quiet:
            print("\nstopping after this step; Ctrl+C again to stop at once", file=sys.stderr, flush=True)


def parse_duration(option: str, text: str) -> float:
    """Seconds of 8h30m, 9h, 45m or 90s. `option`: for the error."""
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(f"(?:{number}h)?(?:{number}m)?(?:{number}s)?", text.strip().lower())
    hours, minutes, rest = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    if not (total := 3600 * hours + 60 * minutes + rest) > 0:
        raise UserError(
            "duration-invalid", where=f"{option} {text!r}", what="must be like 8h30m, 9h, 90m or 600s"
        )
    return total


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. Does not import torch, so that
    set_threads can follow."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        try:
            names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.replace(
                "\n", ","
            )
        except (OSError, subprocess.CalledProcessError):
            return []  # no GPU, or no driver
    return [gpu.strip() for gpu in names.split(",") if gpu.strip()]
