"""One writer per folder: locks with an owner and a heartbeat, and the temporary files of dead processes.

The lock of a dead process is taken over at once if the process can be checked (process.state). If it cannot,
because it is on another host or in another container, the lock is taken over only with --steal-lock and
STALE_AFTER seconds after its last heartbeat.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths, process

LOCK = ".lock"
STEAL = "COMP_STEAL_LOCK"  # environment variable of --steal-lock: for this process and those that it starts
HEARTBEAT = 60.0  # seconds between two heartbeats of a lock
STALE_AFTER = (
    600.0  # seconds without a heartbeat, until --steal-lock may take over a lock whose owner cannot be seen
)


class Owner(NamedTuple):
    """The other process that holds a lock."""

    folder: str
    description: str
    job: str
    stale: bool  # --steal-lock would take the lock over

    def __str__(self) -> str:
        return f"{self.folder}: {self.description}"


@contextmanager
def lock(folder: Path, doing: str, wait: bool = False, job: str = "") -> Iterator[None]:
    """Hold the folder's lock. If another live process has it, wait for it (`wait`) or raise UserError.

    `doing` describes the work, for the messages of other processes. `job` identifies work that a queue starts
    again after its process died: a lock with the same job is waited for until it is stale, then taken over.

    The lock is a file with a process id and not an flock, because loader processes inherit an flock and would
    hold it for seconds after their parent was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    printed = False
    text = "\n".join(
        [str(os.getpid()), process.own_id(), process.host(), time.strftime("%H:%M:%S"), doing, job, ""]
    )
    while other := _acquire(folder, text, job):
        if other.stale or not (wait or (job and other.job == job)):
            raise UserError(
                "folder-locked",
                where=other.folder,
                what=other.description,
                remedy="wait for it, or end it",
            )
        if not printed:
            print(f"{other}; waiting for it", flush=True)
            printed = True
        time.sleep(0.2)
    released = threading.Event()
    threading.Thread(target=_beat, args=(folder / LOCK, text, released), daemon=True).start()
    try:
        yield
    finally:
        released.set()
        if _read(folder / LOCK) == text:
            (folder / LOCK).unlink(missing_ok=True)


def _acquire(folder: Path, text: str, job: str) -> Owner | None:
    """Try to take the lock. None: this process has it now. Otherwise the process that has it."""
    with artifacts.flock(folder / f"{LOCK}.guard"):
        if other := _owner(folder, job):
            return other
        artifacts.write_text(folder / LOCK, text)  # atomic: others read it without the flock
    return None


def _beat(file: Path, text: str, released: threading.Event) -> None:
    while not released.wait(HEARTBEAT):
        try:
            now = _read(file)
            if now == text:
                os.utime(file)
        except OSError:
            continue  # the disk does not answer: this heartbeat is lost, the next one may succeed
        if now != text and not released.is_set():
            # This process was suspended, and another one took the lock over. Two writers would damage the
            # folder.
            print(
                f"{paths.relative(file.parent)}: its lock was taken over; this process ends",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def owner(folder: Path) -> str:
    """Describes the process that holds a folder's lock; empty if there is none."""
    return str(_owner(folder) or "")


def _owner(folder: Path, job: str = "") -> Owner | None:
    try:
        text, heartbeat = (folder / LOCK).read_text(), (folder / LOCK).stat().st_mtime
    except FileNotFoundError:
        return None
    # A lock file torn by a power cut has no valid process id and counts as free.
    pid, process_id, host, since, doing, other_job, *_ = [*text.split("\n"), "", "", "", "", "", ""]
    state = process.state(process_id, heartbeat)
    if state == "dead":
        return None
    where = paths.relative(folder)
    if state == "alive":
        return Owner(where, f"process {pid} is already {doing} since {since}", other_job, False)
    age = _clock(folder) - heartbeat
    stale = age >= STALE_AFTER
    if stale and (os.environ.get(STEAL) or (job and other_job == job)):
        return None
    silent = f"{age / 60:.0f} min" if age >= 120 else f"{max(age, 0):.0f} s"
    after = "" if stale else f" after {STALE_AFTER / 60:.0f} min without a heartbeat"
    return Owner(
        where,
        f"process {pid} on host {host} is already {doing} since {since}, last heartbeat {silent} ago; "
        f"whether it runs cannot be seen from here: if it is dead, "
        f"the same command with --steal-lock takes over{after}",
        other_job,
        stale,
    )


def _clock(folder: Path) -> float:
    """The time by the clock of the file system, which also dates the heartbeats: the clocks of two hosts may
    differ by minutes."""
    guard = folder / f"{LOCK}.guard"
    try:
        os.utime(guard)
        return guard.stat().st_mtime
    except OSError:  # a read-only disk, as for comp runs
        return time.time()


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


@contextmanager
def steal() -> Iterator[None]:
    """The effect of --steal-lock, for the commands in this context."""
    os.environ[STEAL] = "1"
    try:
        yield
    finally:
        del os.environ[STEAL]


def is_orphan(file: Path, include_unknown: bool = False) -> bool:
    """Whether a file is a temporary one of `artifacts.atomic` whose process is dead. `include_unknown`: also
    if the process cannot be checked from here and the file is older than STALE_AFTER seconds."""
    *_, process_id, suffix = ("", "", *file.name.split("."))
    if suffix != "part" or not process.ID.fullmatch(process_id):
        return False
    try:
        written = file.stat().st_mtime
    except FileNotFoundError:
        return False
    state = process.state(process_id, written)
    if state == "unknown" and include_unknown:
        return _clock(file.parent) - written >= STALE_AFTER
    return state == "dead"
