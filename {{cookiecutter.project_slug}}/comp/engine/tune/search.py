"""Work through the trials of a study until its budget is spent, in this process or in several."""

from __future__ import annotations

import datetime
import time

import optuna
from optuna.trial import TrialState

from comp.engine import hardware
from comp.engine.errors import UserError
from comp.engine.store import paths
from comp.engine.tune import live, report, study, trial
from comp.engine.tune.open_study import open_study
from comp.engine.tune.space import Setting
from comp.engine.tune.study import OpenStudy

KEEP_WEIGHTS = 10  # best trials whose weights are kept, so that they can be exported as runs
MAX_FAILURES = 3  # in a row, after which the search ends: the cause is probably not the setting


def search(
    experiment: str,
    overrides: list[str],
    *,
    space: str,
    trials: int | None,
    hours: float | None,
    until: str | None,
    storage: str | None,
    on: str | None = None,
) -> None:
    deadline = _deadline(hours, until)
    opened = open_study(experiment, overrides, space, storage, trials)
    hardware.set_threads(opened.cfg.train.threads)
    stop = hardware.Stop()
    try:
        if on is None:
            _run_trials(opened, stop, deadline)
        else:
            _run_workers(opened, stop, deadline, on, overrides, storage)
    except KeyboardInterrupt:
        if not _ended_by_deadline(stop, deadline):
            raise
    live.show(opened, deadline, now=True)
    live.release()
    report.write(opened)
    report.print_summary(opened)


def worker(
    experiment: str,
    overrides: list[str],
    space: str,
    storage: str | None,
    trials: int,
    deadline: float | None,
) -> None:
    """One of several processes that work on a study (engine/worker.py). The process that started them prints
    the result."""
    opened = open_study(experiment, overrides, space, storage, trials)
    hardware.set_threads(opened.cfg.train.threads)
    end, stop = float("inf") if deadline is None else deadline, hardware.Stop()
    try:
        _run_trials(opened, stop, end)
    except KeyboardInterrupt:
        if not _ended_by_deadline(stop, end):
            raise


def _ended_by_deadline(stop: hardware.Stop, deadline: float) -> bool:
    """And not by a signal."""
    return stop.requested and not stop.signalled and time.time() >= deadline


def _run_workers(
    opened: OpenStudy,
    stop: hardware.Stop,
    deadline: float,
    on: str,
    overrides: list[str],
    storage: str | None,
) -> None:
    """Start processes that join the study, as further ones that are typed by hand do, until no trial is
    left."""
    from comp.engine.run import launcher

    def print_line(line: str) -> None:
        live.release()
        print(line, end="", flush=True)

    arguments = {
        "experiment": opened.experiment,
        "overrides": overrides,
        "space": opened.space.name,
        "storage": storage,
        "trials": opened.max_trials,
        "deadline": None if deadline == float("inf") else deadline,
    }
    executor = launcher.make_executor(on, opened.cfg.train.threads, print_line)
    if executor.machines > 1 and storage is None:
        raise UserError(
            "storage-url",
            where=f"--on {on}",
            what=f"{executor.machines} machines cannot share a study in SQLite",
            remedy="use --storage postgresql://user@host/database",
        )
    jobs = [
        launcher.Job(f"{opened.name} worker {i}", "trials", arguments)
        for i in range(min(executor.size, opened.max_trials))
    ]
    launcher.run_jobs(jobs, executor, stop, lambda left: live.show(opened, deadline))


def _run_trials(opened: OpenStudy, stop: hardware.Stop, deadline: float) -> None:
    failures = 0
    while not stop.requested and time.time() < deadline:
        taken = study.next_trial(opened)
        if taken is None:
            return
        current, setting = taken
        live.show(opened, deadline, now=True)
        began = time.monotonic()
        state = trial.run(opened, current, setting, stop, deadline)
        _print_result(opened, current.number, state, setting, time.monotonic() - began)
        failures = failures + 1 if state == TrialState.FAIL else 0
        if failures == MAX_FAILURES:
            error = _frozen(opened, current.number).user_attrs.get("error", {})
            traceback = paths.run_folder(opened.run_name(current)) / "error.txt"
            raise UserError(
                "trials-failed",
                where=opened.name,
                what=f"{MAX_FAILURES} trials in a row failed, the last with: {error.get('message')}",
                remedy=f"see {paths.relative(traceback)}",
            )
        if state == TrialState.COMPLETE:
            trial.keep_best_weights(opened, KEEP_WEIGHTS)
    if stop.requested:
        raise KeyboardInterrupt(
            f"{opened.name}: ended trials are saved, the others continue with the same command"
        )


def _print_result(
    opened: OpenStudy, number: int, state: TrialState, setting: Setting, seconds: float
) -> None:
    live.release()
    attrs = _frozen(opened, number).user_attrs
    if state == TrialState.COMPLETE:
        result = attrs.get("result", {}).get("text", "")
    elif state == TrialState.PRUNED:
        result = f"pruned in fold {attrs.get('pruned_at', {'fold': '?'})['fold']}"
    else:
        error = attrs.get("error", {"kind": "?", "message": "taken over by another process"})
        result = f"failed ({error['kind']}): {error['message']}"
    print(f"trial {number}: {result}, {live.duration(seconds)}, {live.setting_text(setting)}", flush=True)


def _frozen(opened: OpenStudy, number: int) -> optuna.trial.FrozenTrial:
    return opened.trials()[number]


def _deadline(hours: float | None, until: str | None) -> float:
    """Seconds since the epoch; infinity without a limit."""
    if hours is not None and until is not None:
        raise UserError("option-conflict", where="--hours", what="cannot be combined with --until")
    if hours is not None:
        if not hours > 0:
            raise UserError("option-value", where=f"--hours {hours}", what="must be above 0")
        return time.time() + hours * 3600
    if until is None:
        return float("inf")
    try:
        at = datetime.datetime.strptime(until, "%H:%M").time()
    except ValueError:
        raise UserError(
            "option-value",
            where=f"--until {until}",
            what="not a time of day",
            remedy="write it like 07:30",
        ) from None
    now = datetime.datetime.now()
    then = datetime.datetime.combine(now.date(), at)
    return (then if then > now else then + datetime.timedelta(days=1)).timestamp()
