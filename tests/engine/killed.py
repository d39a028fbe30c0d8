"""Runs a function in a process that kills itself at its n-th event: a file opened for writing, a rename, a
removal, a line of output. So a test can kill at every point that changes the disk, without timing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import forked

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def killed(work: Callable[[], object], event: int) -> bool:
    """Whether it came to its n-th event, counted from 0, and died there."""
    status = forked(lambda: (_watch(event), work()))
    assert status in (0, signal.SIGKILL), f"it failed by itself: {status}"
    return status == signal.SIGKILL


def events(work: Callable[[], object], note: Path) -> int:
    """How many it has. The work is done."""

    def counted() -> None:
        seen = _watch(None)
        work()
        note.write_text(str(seen[0]))

    assert forked(counted) == 0
    return int(note.read_text())


def _watch(last: int | None) -> list[int]:
    seen = [0]

    def step() -> None:
        if seen[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1

    def hook(event: str, about: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and about[2] & WRITES and about[0] != os.devnull):
            step()

    written = sys.stdout.write

    def told(text: str) -> int:
        if text.strip():
            step()
        return written(text)

    sys.addaudithook(hook)
    sys.stdout.write = told  # type: ignore[method-assign]
    return seen
