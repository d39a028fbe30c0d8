"""Where a study lives: SQLite in its folder, or PostgreSQL by a URL; and how its processes take turns."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import optuna

from comp import store
from comp.config import Refused

BEAT, GRACE = (
    10,
    180,
)  # seconds between two heartbeats; of silence until a process of another machine counts as dead


def address(name: str, storage: str | None) -> str:
    if storage is None:
        return f"sqlite:///{store.study_folder(name) / 'study.db'}"
    for scheme in ("postgresql://", "postgres://"):
        storage = (
            storage.replace(scheme, "postgresql+psycopg://", 1) if storage.startswith(scheme) else storage
        )
    if not storage.startswith(("sqlite:///", "postgresql+psycopg://")):
        raise Refused("--storage: wants postgresql://user@host/database, or nothing for SQLite in studies/")
    return storage


def connect(url: str) -> optuna.storages.RDBStorage:
    from sqlalchemy.exc import SQLAlchemyError

    # Eight processes write to one SQLite file: each waits its turn instead of giving up after five seconds.
    settings: dict[str, Any] = (
        {"connect_args": {"timeout": 120}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    )
    warnings.filterwarnings(
        "ignore", category=optuna.exceptions.ExperimentalWarning
    )  # heartbeat, group, multivariate
    warnings.filterwarnings("ignore", message="Heartbeat of storage")  # Heartbeat beats by itself
    try:
        return optuna.storages.RDBStorage(
            url, engine_kwargs=settings, heartbeat_interval=BEAT, grace_period=GRACE
        )
    except ImportError as error:
        raise Refused(
            f"--storage: PostgreSQL needs the extra postgres: pip install 'psycopg[binary]' ({error})"
        ) from None
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        raise Refused(f"--storage: the database does not answer: {reason}") from None


@contextmanager
def alone(folder: Path, storage: optuna.storages.RDBStorage | None) -> Iterator[None]:
    """One process at a time, on all machines that share the study. Released by a death, whatever its cause."""
    if storage is not None and storage.engine.dialect.name == "postgresql":
        from sqlalchemy import text

        key = {"key": int.from_bytes(folder.name.encode()[-7:].rjust(7, b"c"), "big")}
        with storage.engine.connect() as connection:
            connection.execute(text("select pg_advisory_lock(:key)"), key)
            try:
                yield
            finally:
                connection.execute(text("select pg_advisory_unlock(:key)"), key)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / (".begin" if storage is None else ".queue")).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@cache
def machine() -> str:
    """This machine since it was started; containers of one machine do not see each other's processes."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = os.readlink("/proc/self/ns/pid") if Path("/proc/self/ns/pid").exists() else ""
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''} {space}"
