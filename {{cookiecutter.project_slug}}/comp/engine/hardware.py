"""What this machine may spend. Threads are a knob of the run, since their number changes sums and so results."""

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

from comp.engine.errors import Refused

if TYPE_CHECKING:
    import torch


def set_threads(threads: int) -> None:
    """Fix the thread count of torch, OpenMP and OpenCV. Ray and torchrun set their own: overridden on purpose."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads beside a busy process cost a factor of ten
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would look for updates online at import
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def device(wanted: str) -> torch.device:
    import torch

    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise Refused(f"machine.device: {wanted}: torch finds no GPU here; auto takes what there is")
    if world_size() > 1 and wanted.startswith("cuda:"):
        raise Refused(
            f"machine.device: {wanted} is one GPU, and torchrun gives each process its own; leave it at auto"
        )
    if world_size() > 1 and wanted in ("auto", "cuda") and torch.cuda.is_available():
        mine, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if mine >= there:
            raise Refused(
                f"torchrun: {mine + 1} processes on a machine of {there} GPUs; --nproc-per-node {there}"
            )
        torch.cuda.set_device(mine)
        return torch.device("cuda", mine)
    if wanted != "auto":
        return torch.device(wanted)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def world_size() -> int:
    """How many torchrun has started, on all machines; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


# Ctrl+C; SLURM, Kubernetes and spot machines that want theirs back; "save and end", for whoever asks.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED = tuple(128 + number for number in STOPS)  # the exit codes of a process that they stopped
TOGETHER = 5.0  # seconds within which SIGTERM comes more than once: from torchrun and from SLURM, to a process and to its group


class _Received:
    number = 0  # of STOPS, the first
    at = 0.0


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 end the work as Ctrl+C does: by KeyboardInterrupt, which removes what is half-written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Received.number = 0
    before = {number: signal.signal(number, _interrupt) for number in STOPS[1:]}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    again = _Received.number and time.monotonic() - _Received.at < TOGETHER
    _note(number)
    if not again:  # what is half-written is being removed
        raise KeyboardInterrupt


def _note(number: int) -> None:
    _Received.number, _Received.at = _Received.number or number, time.monotonic()


def received() -> int:
    """The signal that asked this process to stop; Ctrl+C's where nobody noted another."""
    return _Received.number or signal.SIGINT


def exit_code() -> int:
    return 128 + received()


class Stopped(KeyboardInterrupt):
    """Stopped where everything is saved, and in all processes at the same place."""


class Stop:
    """A signal of STOPS asks while somebody looks (`listening`), and so does a time limit: the loop saves its state at the next
    step and ends. A second Ctrl+C does not wait; a second SIGTERM does, since schedulers send several."""

    MARGIN = 10.0  # seconds for the end itself: the last state, W&B, the table; a tenth of a limit shorter than 100 s

    def __init__(
        self, limit: float | None = None, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit, self.quiet, self.clock = limit, quiet, clock
        self.looked = self.began = clock()
        self.longest = 0.0  # seconds between two looks at the clock: no look, no end
        self._asked = False
        self.signalled = False
        self.out_of_time = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """For work that looks at `asked` every few seconds; elsewhere a signal ends the work at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        if _Received.number and signal.getsignal(signal.SIGTERM) is _interrupt:
            self._asked = self.signalled = (
                True  # it was raised where Python lets nothing be raised, as in a destructor
            )
        before = {number: signal.signal(number, self._ask) for number in STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """True from the moment when another stretch as long as the longest so far might not end in time."""
        if self.limit is not None and not self._asked:
            now = self.clock()
            self.longest, self.looked = max(self.longest, now - self.looked), now
            left = self.limit - min(self.MARGIN, self.limit / 10) - (now - self.began)
            self._asked = self.out_of_time = left < 1.2 * self.longest
        return self._asked

    @asked.setter
    def asked(self, asked: bool) -> None:
        self._asked = asked

    def _ask(self, number: int, frame: object) -> None:
        if self._asked and not self.out_of_time and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number != signal.SIGINT:
            _note(number)
        self._asked, self.signalled, self.out_of_time = True, True, False
        if number == signal.SIGINT and not self.quiet:
            print("\nstopping after this step; Ctrl+C again to stop at once", file=sys.stderr, flush=True)


def parse_duration(option: str, text: str) -> float:
    """Of 8h30m, 9h, 45m or 90s."""
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(f"(?:{number}h)?(?:{number}m)?(?:{number}s)?", text.strip().lower())
    hours, minutes, rest = (float(part or 0) for part in found.groups()) if found else (0.0, 0.0, 0.0)
    if not (total := 3600 * hours + 60 * minutes + rest) > 0:
        raise Refused(f"{option} {text!r}: a time like 8h30m, 9h, 90m or 600s")
    return total


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The GPUs that a process may be given, as CUDA_VISIBLE_DEVICES names them. Without torch, whose threads are not settled yet."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        ask = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        try:
            named = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.replace("\n", ",")
        except (OSError, subprocess.CalledProcessError):
            return []  # none, or none that works
    return [card.strip() for card in named.split(",") if card.strip()]
