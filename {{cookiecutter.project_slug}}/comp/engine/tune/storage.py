"""Where a study lives: SQLite in its folder, or PostgreSQL by a URL; and how its processes take turns."""

from __future__ import annotations

import fcntl
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from comp.engine.errors import Refused
from comp.engine.store import paths, secrets

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

BEAT, GRACE = (
    10,
    180,
)  # seconds between two heartbeats; of silence until a process of another machine counts as dead


def address(name: str, storage: str | None) -> str:
    if storage is None:
        return f"sqlite:///{paths.study_folder(name) / 'study.db'}"
    for scheme in ("postgresql://", "postgres://"):
        if storage.startswith(scheme):
            return storage.replace(scheme, "postgresql+psycopg://", 1)
    raise Refused(
        f"--storage {secrets.redact(storage)}: wants postgresql://user@host/database, or nothing for SQLite in studies/"
    )


def connect(url: str) -> optuna.storages.RDBStorage:
    # Eight processes write to one SQLite file: each waits its turn instead of giving up after five seconds.
    settings: dict[str, Any] = (
        {"connect_args": {"timeout": 120}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    )
    warnings.filterwarnings(
        "ignore", category=optuna.exceptions.ExperimentalWarning
    )  # heartbeat, group, multivariate
    warnings.filterwarnings("ignore", message="Heartbeat of storage")  # Heartbeat beats by itself
    with _answering():
        return optuna.storages.RDBStorage(
            url, engine_kwargs=settings, heartbeat_interval=BEAT, grace_period=GRACE
        )


@contextmanager
def alone(folder: Path, url: str, doing: str = "queue") -> Iterator[None]:
    """One process at a time, on all machines that share the study. Released by a death, whatever its cause."""
    if url.startswith("sqlite"):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{doing}").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        return
    from sqlalchemy import text

    # The tables belong to all studies of a database, a queue to one.
    name = "tables" if doing == "begin" else f"{folder.name} {doing}"
    key = {"key": int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")}
    with _answering():
        connection = _engine(url).connect().execution_options(isolation_level="AUTOCOMMIT")
    with connection:  # which holds the lock, so its end is the lock's
        connection.execute(text("select pg_advisory_lock(:key)"), key)
        yield


@cache
def _engine(url: str) -> Engine:
    """For locks alone. Without a pool: what is closed is closed, and a forked process shares nothing."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    return create_engine(url, poolclass=NullPool)


@contextmanager
def _answering() -> Iterator[None]:
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except ImportError as error:
        raise Refused(
            f"--storage: PostgreSQL needs the extra postgres: pip install 'psycopg[binary]' ({error})"
        ) from None
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        raise Refused(f"--storage: the database does not answer: {secrets.redact(reason)}") from None
