"""Studies whose workers are killed at random SQL statements and log lines: no stored result is lost, no trial
runs twice."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import config
from optuna.trial import TrialState
from postgres import server

from comp.engine import hardware
from comp.engine.run import loading, tracking
from comp.engine.store import paths, process
from comp.engine.tune import search, study, trial
from comp.engine.tune.open_study import open_study
from comp.engine.tune.study import OpenStudy

SPACE = "search:\n  optim.lr: {low: 1e-3, high: 2e-2, log: true}\n  model.drop_rate: [0.0, 0.1]\nfolds: 2\n"
TINY = [
    "track=none",
    "machine.num_workers=0",
    "machine.progress=false",
    "train.epochs=2",
    "train.max_samples=32",
    "train.batch_size=16",
    "schedule.warmup=0",
]
WORKERS = 4
ENDLESS = 10**6
LONGEST = 400  # events until a worker dies: one to three trials, so that only some have stored their result


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def storage(request: pytest.FixtureRequest) -> Iterator[str | None]:
    with ExitStack() as stack:
        yield None if request.param == "sqlite" else stack.enter_context(server())


@pytest.fixture
def tuned(project: Path) -> Path:
    (project / "configs" / "tune").mkdir()
    (project / "configs" / "tune" / "s.yaml").write_text(SPACE)
    loading.load_context(config(*TINY))  # what is imported here need not be imported by every worker
    return project


def begun(work: Callable[[], object]) -> int:
    """Process id of a fork that runs `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    return child


def note(file: Path, **what: Any) -> None:
    """One append to a file: lines of several processes do not mix."""
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, (json.dumps(what) + "\n").encode())
    os.close(handle)


def dying(after: int) -> None:
    """Kill this process after `after` events: an SQL statement, a commit, a log line."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    left = after

    def count(*_: Any, **__: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", count)
    event.listen(Engine, "after_cursor_execute", count)
    event.listen(Engine, "commit", count)
    log = tracking.RunLogger.log

    def logged(self: Any, record: Any) -> None:
        count()
        log(self, record)

    tracking.RunLogger.log = logged  # type: ignore[method-assign]


def worker(storage: str | None, book: Path, total: int, after: int) -> Callable[[], None]:
    def work() -> None:
        began = time.monotonic()  # everything is imported
        opened = open_study("exp001", TINY, "s", storage, total)
        dying(after)
        original_tell, requeue = trial._tell, study.requeue_dead

        def requeued(opened: OpenStudy) -> list[int]:
            dead = requeue(opened)
            note(book, dead=dead, seconds=time.monotonic() - began)
            study.requeue_dead = requeue
            return dead

        study.requeue_dead = requeued

        def tell(opened: OpenStudy, which: Any, state: TrialState, values: list[float] | None = None) -> None:
            original_tell(opened, which, state, values)
            note(book, number=which.number, state=state.name, values=values)

        trial._tell = tell  # type: ignore[assignment]
        search._run_trials(opened, hardware.Stop(), float("inf"))

    return work


def looked_at(storage: str | None) -> OpenStudy:
    return open_study("exp001", TINY, "s", storage, ENDLESS)


def kill(storage: str | None, book: Path, kills: int) -> set[int]:
    """Start workers until `kills` of them were killed. Their process ids."""
    chance = random.Random(kills)
    living: set[int] = set()
    dead: set[int] = set()
    while len(dead) < kills:
        while len(living) < WORKERS and len(living) + len(dead) < kills:
            living.add(begun(worker(storage, book, ENDLESS, chance.randint(1, LONGEST))))
        child, status = os.wait()
        if child not in living:
            continue  # left over from a test before this one
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        living.remove(child)
        dead.add(child)
    return dead


def check(storage: str | None, book: Path, kills: int) -> None:
    looked_at(storage)
    dead = kill(storage, book, kills)
    spent = len(study.budgeted(looked_at(storage).study.get_trials()))
    last = [begun(worker(storage, book, spent + WORKERS, ENDLESS)) for _ in range(WORKERS)]
    assert [os.waitpid(child, 0)[1] for child in last] == [0] * WORKERS

    opened = looked_at(storage)
    trials = opened.study.get_trials()
    assert [t.number for t in trials] == list(range(len(trials))), "a number twice, or none"
    assert not [t.number for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    noted = [json.loads(line) for line in book.read_text().splitlines()]
    acknowledged = [line for line in noted if "number" in line]
    for event in acknowledged:
        frozen = trials[event["number"]]
        assert frozen.state.name == event["state"] and (event["values"] or frozen.values) == frozen.values, (
            event
        )
    assert len({event["number"] for event in acknowledged}) == len(acknowledged)

    first = [line for line in noted if "dead" in line]  # what each worker found dead at its first look
    slowest = max(line["seconds"] for line in first)
    print(
        f"{sum(len(line['dead']) for line in first)} dead trials found at the first look, at most "
        f"{slowest:.1f} s after the imports"
    )
    assert any(line["dead"] for line in first) and slowest < 15, first

    # A trial was handed on only by a process that had died, and only once.
    by_dead = [t for t in trials if t.state == TrialState.FAIL and "skipped" not in t.user_attrs]
    assert not [t.user_attrs["error"] for t in by_dead if "error" in t.user_attrs]
    assert {int(t.user_attrs["worker"].split("-")[3]) for t in by_dead if "worker" in t.user_attrs} <= dead
    successors = [t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs]
    assert len(set(successors)) == len(successors) and set(successors) == {t.number for t in by_dead}
    for t in trials:
        if "retry_of" in t.user_attrs:
            assert (
                trials[t.user_attrs["retry_of"]].params.items() <= t.params.items()
            )  # as far as it was drawn

    done = [t for t in trials if t.state == TrialState.COMPLETE]
    assert len(done) >= WORKERS and opened.study.best_value == max(t.values[0] for t in done)
    ended = [t for t in study.budgeted(trials) if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(ended) == spent + WORKERS, "the budget is the study's, whoever dies"


def test_six_kills(tuned: Path, tmp_path: Path) -> None:
    check(None, tmp_path / "book", 6)


@pytest.mark.slow
def test_thirty_kills(tuned: Path, storage: str | None, tmp_path: Path) -> None:
    check(storage, tmp_path / "book", 30)


def test_eight_workers_that_start_at_the_same_moment(tuned: Path, storage: str | None) -> None:
    """They create the tables at the same time, and each takes a trial of its own. While all live, none is
    queued again."""
    gate, taken = os.pipe(), os.pipe()
    hold = os.pipe()

    def work() -> None:
        os.close(gate[1])
        os.close(hold[1])
        os.read(gate[0], 1)  # until it is closed
        found = study.next_trial(looked_at(storage))
        assert found is not None
        os.write(taken[1], f"{found[0].number}\n".encode())
        os.read(hold[0], 1)

    children = [begun(work) for _ in range(8)]
    os.close(taken[1])
    os.close(gate[1])
    received = b""
    while received.count(b"\n") < 8:
        more = os.read(taken[0], 100)
        assert more, "one of them ended early"
        received += more
    assert sorted(map(int, received.split())) == list(range(8))
    opened = looked_at(storage)
    assert study.requeue_dead(opened) == [], "all of them live"
    os.close(hold[1])
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert study.requeue_dead(opened) == list(range(8)), (
        "all of them are dead now, and each has one successor"
    )
    assert study.requeue_dead(opened) == []


def test_a_process_of_another_machine_is_dead_without_heartbeats(
    tuned: Path, storage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy import text

    opened = looked_at(storage)
    with monkeypatch.context() as there:
        there.setattr(process, "own_id", lambda: f"00000000-00000000-1-{os.getpid()}-1")
        assert study.next_trial(opened) is not None
    assert study.requeue_dead(opened) == [], "it has beaten just now"
    with opened.storage.engine.begin() as connection:
        connection.execute(text("update trial_heartbeats set heartbeat = '2020-01-01 00:00:00'"))
    assert study.requeue_dead(opened) == [0]


@pytest.mark.slow  # where the extras are
def test_an_unreachable_database_is_a_one_line_error(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from comp.engine import cli

    pytest.importorskip("psycopg")
    nowhere = "postgresql://comp@/postgres?host=/nowhere"
    assert cli.main(["tune", "exp001", "--space", "s", "--storage", nowhere, *TINY]) == 2
    assert "--storage: cannot connect to the database: " in capsys.readouterr().err
    assert cli.main(["tune", "exp001", "--space", "s", "--storage", "mysql://x", *TINY]) == 2
    assert "must be postgresql://user@host/database" in capsys.readouterr().err
    assert not paths.study_folder("exp001-s").exists() or not list(
        paths.study_folder("exp001-s").glob("*.db")
    )
