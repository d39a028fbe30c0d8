"""Which process this is, told from every other one on every host, and whether another one still runs.

A process is known as `host-boot-namespace-pid-start`: digests of the host (its name and machine id) and of the boot id, the pid
namespace (a container has its own), the pid, and when it started, so that a reused pid is not taken for its dead namesake.
Whether it runs can be seen only from the same boot of the same host and in the same pid namespace. The cases of `state`, in order:

1. Same host, boot and namespace: alive or dead by pid and start.
2. An earlier boot of this very machine: dead. Host names repeat (containers, cloud images), so the name is not enough: the machine
   id must be the same, neither process may be in a container, and the last heartbeat must be older than this machine's boot. A
   living process on a clone of this machine renews its heartbeat every minute.
3. Anything else, such as another host or another container of this host: unknown. Age alone is no proof of death.

Where /proc is absent (macOS) there is neither boot id nor namespace; the start is psutil's create_time, the same within 2 s.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from functools import cache
from pathlib import Path
from typing import Literal

State = Literal["alive", "dead", "unknown"]

PROC = Path("/proc")
MACHINE = Path("/etc/machine-id")
INITIAL = "4026531836"  # the pid namespace outside of all containers: this number on every Linux kernel
NAME = re.compile(r"[0-9a-f]{8}-([0-9a-f]{8})?-[0-9]*-[1-9][0-9]*-[0-9]*")
SAME = 2  # seconds by which two readings of a create_time may differ


def me() -> str:
    return _name(os.getpid())


def place() -> str:
    """Where processes can see each other: one boot of one host, one pid namespace."""
    return me().rpartition("-")[0].rpartition("-")[0]


def host() -> str:
    return socket.gethostname()


def state(name: str, heartbeat: float | None = None) -> State:
    """Of a process that called itself so with `me`; `heartbeat` is the time of its last sign of life, if it gives any."""
    if not NAME.fullmatch(name):
        return "dead"  # torn by a power cut
    *where, pid, start = name.split("-")
    here = place().split("-")
    if where == here:
        return _running(int(pid), start)
    before = heartbeat is not None and heartbeat < _booted()
    if where[0] == here[0] and where[2] == here[2] == INITIAL and before:
        return "dead"
    return "unknown"


@cache
def _name(pid: int) -> str:
    """By pid, since a forked process inherits the cache."""
    host_ = _digest(f"{host()}\n{_read(MACHINE)}")
    boot = _digest(_read(PROC / "sys/kernel/random/boot_id"))
    return "-".join([host_, boot, _namespace(), str(pid), _start(pid) or ""])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8] if text else ""


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # absent, or not for us to read
        return ""


def _namespace() -> str:
    try:
        return os.readlink(PROC / "self/ns/pid").removeprefix("pid:[").removesuffix("]")
    except OSError:
        return ""


def _running(pid: int, start: str) -> State:
    now = _start(pid)
    if now is None:
        return "dead"
    if not now or not start:
        return "unknown"
    within = 0 if _read(PROC / "sys/kernel/random/boot_id") else SAME
    return "alive" if abs(int(now) - int(start)) <= within else "dead"


def _start(pid: int) -> str | None:
    """When a process of this pid namespace started: in clock ticks since boot, or in seconds since 1970 without /proc. None: there
    is no such process. Empty: there is one, and no more can be seen of it (another user's where /proc hides those, Linux
    without /proc)."""
    if not _exists(pid):
        return None
    try:
        mine = os.readlink(PROC / "self")
    except OSError:
        return _created(pid)
    if mine != str(os.getpid()) and pid != os.getpid():
        return ""  # /proc of the namespace outside: a pid there is another process
    stat = _read(PROC / ("self" if pid == os.getpid() else str(pid)) / "stat")
    if not stat:
        return "" if _exists(pid) else None
    status, *rest = stat.rpartition(")")[2].split()
    return None if status in "ZX" else rest[18]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def _created(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(round(process.create_time()))
    except (
        psutil.Error,
        OSError,
    ):  # on Linux psutil reads /proc, too; the process is there, as the caller found
        return ""


def _booted() -> float:
    return time.time() - float((_read(PROC / "uptime") or "inf").split()[0])
