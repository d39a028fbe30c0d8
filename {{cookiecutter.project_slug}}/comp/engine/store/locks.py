"""One writer per folder: locks with an owner and a heartbeat, and the temporary files of dead processes.

Where another process can be seen (process.state), a dead one's lock is taken over at once. Where it cannot
(another host or container), only with --steal-lock, after STALE_AFTER seconds without a heartbeat.
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
    """Hold the folder's lock. Another live process's lock is waited for with `wait`, otherwise raises
    UserError.

    `doing` describes the work for the message of the others. `job` identifies work that a queue hands out
    again when its process has died: a lock with the same job is waited for until it is stale, then taken
    over.

    The owner is a process id in a file, not an flock: loader processes inherit a flock, and would hold it for
    seconds after their parent was killed.
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
    """None when the lock belongs to this process now, otherwise its owner."""
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
            # This process was suspended for so long that another took the lock over. Two writers would damage
            # the folder.
            print(
                f"{paths.relative(file.parent)}: its lock was taken over; this process ends",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def owner(folder: Path) -> str:
    """A sentence about the process that holds a folder's lock; empty when none does."""
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
        "whether it runs "
        f"cannot be seen from here: if it is dead, the same command with --steal-lock takes over{after}",
        other_job,
        stale,
    )


def _clock(folder: Path) -> float:
    """Now by the clock of the file system, which also stamps the heartbeats: the clocks of two hosts may
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
    """--steal-lock."""
    os.environ[STEAL] = "1"
    try:
        yield
    finally:
        del os.environ[STEAL]


def is_orphan(file: Path, include_unknown: bool = False) -> bool:
    """Whether a file is a temporary one of `artifacts.atomic` whose process is dead. With `include_unknown`
    also of a process that cannot be seen from here, when nothing was written to the file for STALE_AFTER
    seconds."""
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
