"""What this machine may spend. Threads are a knob of the run, since their number changes sums and so results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from comp.refused import Refused

if TYPE_CHECKING:
    import torch


def settle(threads: int) -> None:
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
    if wanted != "auto":
        return torch.device(wanted)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def processes() -> int:
    """How many train this one model together: torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Stop:
    """Ctrl+C asks: the loop saves its state at the next step and ends. A second Ctrl+C does not wait."""

    def __init__(self) -> None:
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step; Ctrl+C again to stop at once", file=sys.stderr, flush=True)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cards() -> list[str]:
    """The GPUs that a process may be given, as CUDA_VISIBLE_DEVICES names them. Without torch, whose threads are not settled yet."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        ask = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        try:
            named = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.replace("\n", ",")
        except (OSError, subprocess.CalledProcessError):
            return []  # none, or none that works
    return [card.strip() for card in named.split(",") if card.strip()]
