"""What a study does just now: a small table that stays in place on a terminal, one line a trial elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState

if TYPE_CHECKING:
    from comp.engine.tune.study import Joined

EVERY = 2.0  # seconds between two looks at the database
State = TrialState

_next = 0.0
_drawn = 0  # lines on the terminal that the next table writes over


def show(joined: Joined, until: float, now: bool = False) -> None:
    global _next, _drawn  # noqa: PLW0603  one terminal, one table
    if not sys.stdout.isatty() or (time.monotonic() < _next and not now):
        return
    _next = time.monotonic() + EVERY
    width = shutil.get_terminal_size().columns
    lines = [line[: width - 1] for line in table(joined, until)]
    up = f"\x1b[{_drawn}A\x1b[J" if _drawn else ""
    print(up + "\n".join(lines), flush=True)
    _drawn = len(lines)


def leave() -> None:
    """What is printed next stands below the table."""
    global _drawn  # noqa: PLW0603
    _drawn = 0


def table(joined: Joined, until: float) -> list[str]:
    from comp.engine.tune.study import counted, setting_of

    trials = joined.study.get_trials(deepcopy=False)
    spent = counted(trials)
    of = {state: [t for t in spent if t.state == state] for state in State}
    done = of[State.COMPLETE]
    lines = [f"{joined.name}: {len(done)} done, {len(of[State.PRUNED])} pruned, {len(of[State.FAIL])} failed, "
             f"{len(of[State.RUNNING])} running, {len(spent)} of {joined.total}; {left(joined, until)}"]  # fmt: skip
    if done:
        sign = -1 if joined.study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
        best = min(done, key=lambda t: sign * t.values[0])
        lines.append(
            f"  best     {best.number:4d}  {best.values[0]:.4f}  {words(setting_of(joined.space, best))}"
        )
    for trial in of[State.RUNNING]:
        step = max(trial.intermediate_values, default=None)
        at = f"{trial.intermediate_values[step]:.4f}" if step is not None else "     -"
        place = "" if step is None else f"  (step {step})"
        lines.append(f"  running  {trial.number:4d}  {at}  {words(setting_of(joined.space, trial))}{place}")
    return lines


def left(joined: Joined, until: float) -> str:
    """By the pace of the trials that ended, and by the clock where a time is set."""
    trials = joined.study.get_trials(deepcopy=False)
    from comp.engine.tune.study import counted

    ended = [t for t in counted(trials) if t.datetime_complete and t.datetime_start]
    guesses = []
    if ended:
        first = min(t.datetime_start for t in ended if t.datetime_start)
        last = max(t.datetime_complete for t in ended if t.datetime_complete)
        pace = (last - first).total_seconds() / len(ended)
        guesses.append(pace * max(0, joined.total - len(ended)))
    if until < float("inf"):
        guesses.append(until - time.time())
    return f"about {duration(min(guesses))} left" if guesses else "no trial has ended yet"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, int(seconds)), 60)
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes >= 60 else f"{minutes}m{seconds:02d}"


def words(setting: dict[str, object]) -> str:
    return " ".join(f"{key}={v:.3g}" if isinstance(v, float) else f"{key}={v}" for key, v in setting.items())
