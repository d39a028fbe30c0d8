"""The database of a study: SQLite in its folder, or PostgreSQL by a URL; and the lock that its processes
share."""

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
from optuna.trial import FrozenTrial, TrialState

from comp.engine.errors import UserError
from comp.engine.store import paths, secrets

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

HEARTBEAT_INTERVAL = 10  # seconds
GRACE_PERIOD = 180  # seconds without a heartbeat until a process of another machine counts as dead


def url_of(name: str, storage: str | None) -> str:
    if storage is None:
        return f"sqlite:///{paths.study_folder(name) / 'study.db'}"
    for scheme in ("postgresql://", "postgres://"):
        if storage.startswith(scheme):
            return storage.replace(scheme, "postgresql+psycopg://", 1)
    raise UserError(
        "storage-url",
        where=f"--storage {secrets.redact(storage)}",
        what="must be postgresql://user@host/database",
        remedy="without --storage it is SQLite in studies/",
    )


def connect(url: str) -> optuna.storages.RDBStorage:
    # Many processes write to one SQLite file: they wait instead of failing after the default of five seconds.
    settings: dict[str, Any] = (
        {"connect_args": {"timeout": 120}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    )
    # Heartbeat, group and multivariate are experimental in Optuna; heartbeats are sent by study.Heartbeat.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage")
    with _connection_errors():
        return optuna.storages.RDBStorage(
            url, engine_kwargs=settings, heartbeat_interval=HEARTBEAT_INTERVAL, grace_period=GRACE_PERIOD
        )


def all_studies(storage: str | None = None) -> list[tuple[optuna.storages.RDBStorage, str]]:
    """(database, name) of every study: one SQLite file in each folder of studies/, and those of the URL
    `storage`."""
    files = sorted(paths.path("studies").glob("*/study.db"))
    databases = [connect(f"sqlite:///{file}") for file in files]
    if storage is not None:
        databases.append(connect(storage))
    return [(database, name) for database in databases for name in optuna.get_all_study_names(database)]


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """By the first objective; study.best_trial takes only studies with one."""
    return next(iter(ranked(study)), None)


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """Completed trials, best first by the first objective."""
    sign = -1 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(completed, key=lambda t: (sign * t.values[0], t.number))


@contextmanager
def exclusive(folder: Path, url: str, name: str = "queue") -> Iterator[None]:
    """One process at a time, on all machines that share the study. Released when the process ends, however it
    ends."""
    if url.startswith("sqlite"):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{name}").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        return
    from sqlalchemy import text

    # Tables are shared by all studies of a database, a queue belongs to one.
    lock = "tables" if name == "tables" else f"{folder.name} {name}"
    key = {"key": int.from_bytes(hashlib.sha256(lock.encode()).digest()[:7], "big")}
    with _connection_errors():
        connection = _lock_engine(url).connect().execution_options(isolation_level="AUTOCOMMIT")
    with connection:  # the lock belongs to the connection and ends with it
        connection.execute(text("select pg_advisory_lock(:key)"), key)
        yield


@cache
def _lock_engine(url: str) -> Engine:
    """Only for locks. Without a pool, so that a closed connection is closed and a forked process shares
    none."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    return create_engine(url, poolclass=NullPool)


@contextmanager
def _connection_errors() -> Iterator[None]:
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except ImportError as error:
        raise UserError(
            "package-missing",
            where="--storage",
            what=f"PostgreSQL needs the extra postgres ({error})",
            remedy="pip install 'psycopg[binary]'",
        ) from None
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        raise UserError(
            "storage-unreachable",
            where="--storage",
            what=f"cannot connect to the database: {secrets.redact(reason)}",
        ) from None
