"""The progress of a study: a table that is redrawn in place on a terminal; elsewhere search.py prints one
line a trial."""

from __future__ import annotations

import shutil
import sys
import time

from optuna.trial import TrialState

from comp.engine.tune.study import OpenStudy, budgeted, setting_of

INTERVAL = 2.0  # seconds between two queries of the database
State = TrialState
WORDS = {State.COMPLETE: "done", State.PRUNED: "pruned", State.FAIL: "failed", State.RUNNING: "running"}

_next = 0.0  # time of the next query
_drawn = 0  # lines on the terminal that the next table replaces


def show(opened: OpenStudy, deadline: float, now: bool = False) -> None:
    global _next, _drawn  # noqa: PLW0603  one terminal, one table
    if not sys.stdout.isatty() or (time.monotonic() < _next and not now):
        return
    _next = time.monotonic() + INTERVAL
    width = shutil.get_terminal_size().columns
    lines = [line[: width - 1] for line in table(opened, deadline)]
    up = f"\x1b[{_drawn}A\x1b[J" if _drawn else ""
    print(up + "\n".join(lines), flush=True)
    _drawn = len(lines)


def release() -> None:
    """What is printed next goes below the table and does not replace it."""
    global _drawn  # noqa: PLW0603
    _drawn = 0


def table(opened: OpenStudy, deadline: float) -> list[str]:
    trials = budgeted(opened.trials())
    by_state = {state: [t for t in trials if t.state == state] for state in State}
    counts = ", ".join(f"{len(by_state[state])} {word}" for state, word in WORDS.items())
    spent = f"{len(trials)} of {opened.max_trials}"
    lines = [f"{opened.name}: {counts}, {spent}; {time_left(opened, deadline)}"]
    if by_state[State.COMPLETE]:
        best = opened.ranked()[0]
        setting = setting_text(setting_of(opened.space, best))
        lines.append(f"  best     {best.number:4d}  {best.values[0]:.4f}  {setting}")
    for trial in by_state[State.RUNNING]:
        step = max(trial.intermediate_values, default=None)
        score = f"{trial.intermediate_values[step]:.4f}" if step is not None else "     -"
        progress = "" if step is None else f"  (step {step})"
        setting = setting_text(setting_of(opened.space, trial))
        lines.append(f"  running  {trial.number:4d}  {score}  {setting}{progress}")
    return lines


def time_left(opened: OpenStudy, deadline: float) -> str:
    """Estimated from the trials that have ended, and at most until the deadline."""
    ended = [t for t in budgeted(opened.trials()) if t.datetime_complete and t.datetime_start]
    estimates = []
    if ended:
        first = min(t.datetime_start for t in ended if t.datetime_start)
        last = max(t.datetime_complete for t in ended if t.datetime_complete)
        per_trial = (last - first).total_seconds() / len(ended)
        estimates.append(per_trial * max(0, opened.max_trials - len(ended)))
    if deadline < float("inf"):
        estimates.append(deadline - time.time())
    return f"about {duration(min(estimates))} left" if estimates else "no trial has ended yet"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, int(seconds)), 60)
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes >= 60 else f"{minutes}m{seconds:02d}"


def setting_text(setting: dict[str, object]) -> str:
    return " ".join(f"{key}={v:.3g}" if isinstance(v, float) else f"{key}={v}" for key, v in setting.items())
