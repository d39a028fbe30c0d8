"""Unique ids of processes across hosts, and whether the process with a given id still runs.

An id is `host-boot-namespace-pid-start`: digests of the host (name and machine id) and of the boot id, the
pid namespace (each container has its own), the pid, and the start time, which distinguishes the process from
a later one with the same pid. Only processes of the same host, boot and pid namespace can be looked up. The
cases of `state`, in order:

1. Same host, boot and namespace: alive or dead by pid and start time.
2. An earlier boot of the same machine: dead. Host names repeat (containers, cloud images), so the name is not
   enough: the machine id must be equal, neither process may be in a container, and the last heartbeat must be
   older than this boot. A live process on a clone of this machine renews its heartbeat every minute.
3. Anything else, such as another host or another container of this host: unknown. Age alone does not prove
   death.

Without /proc (macOS) there is neither boot id nor namespace; the start time is psutil's create_time, equal
within 2 s.
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
MACHINE_ID = Path("/etc/machine-id")
INITIAL_NAMESPACE = (
    "4026531836"  # the pid namespace outside of all containers: this number on every Linux kernel
)
ID = re.compile(r"[0-9a-f]{8}-([0-9a-f]{8})?-[0-9]*-[1-9][0-9]*-[0-9]*")
START_TOLERANCE = 2  # seconds by which two readings of a create_time may differ


def own_id() -> str:
    return _id(os.getpid())


def pid_scope() -> str:
    """Processes with the same scope can see each other: one boot of one host, one pid namespace."""
    return own_id().rpartition("-")[0].rpartition("-")[0]


def host() -> str:
    return socket.gethostname()


def state(process_id: str, heartbeat: float | None = None) -> State:
    """The state of the process with this id; `heartbeat` is the mtime of the last file it touched, if any."""
    if not ID.fullmatch(process_id):
        return "dead"  # a file torn by a power cut
    *scope, pid, start = process_id.split("-")
    own_scope = pid_scope().split("-")
    if scope == own_scope:
        return _local_state(int(pid), start)
    before_boot = heartbeat is not None and heartbeat < _boot_time()
    if scope[0] == own_scope[0] and scope[2] == own_scope[2] == INITIAL_NAMESPACE and before_boot:
        return "dead"
    return "unknown"


@cache
def _id(pid: int) -> str:
    """Cached by pid, since a forked process inherits the cache."""
    host_ = _digest(f"{host()}\n{_read(MACHINE_ID)}")
    boot = _digest(_read(PROC / "sys/kernel/random/boot_id"))
    return "-".join([host_, boot, _namespace(), str(pid), _start_time(pid) or ""])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8] if text else ""


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # absent, or no permission
        return ""


def _namespace() -> str:
    try:
        return os.readlink(PROC / "self/ns/pid").removeprefix("pid:[").removesuffix("]")
    except OSError:
        return ""


def _local_state(pid: int, start: str) -> State:
    now = _start_time(pid)
    if now is None:
        return "dead"
    if not now or not start:
        return "unknown"
    tolerance = 0 if _read(PROC / "sys/kernel/random/boot_id") else START_TOLERANCE
    return "alive" if abs(int(now) - int(start)) <= tolerance else "dead"


def _start_time(pid: int) -> str | None:
    """Start time of a process of this pid namespace, in clock ticks since boot; without /proc in seconds
    since 1970.

    None: there is no such process. Empty: it exists, but its start time cannot be read (another user's
    process under a restricted /proc, Linux without /proc).
    """
    if not _exists(pid):
        return None
    try:
        self_pid = os.readlink(PROC / "self")
    except OSError:
        return _create_time(pid)
    if self_pid != str(os.getpid()) and pid != os.getpid():
        return ""  # /proc belongs to the outer namespace, where the same pid is another process
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
        return True  # another user's process
    return True


def _create_time(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(round(process.create_time()))
    except (
        psutil.Error,
        OSError,
    ):  # on Linux psutil reads /proc, too; the caller has seen that the process exists
        return ""


def _boot_time() -> float:
    return time.time() - float((_read(PROC / "uptime") or "inf").split()[0])
