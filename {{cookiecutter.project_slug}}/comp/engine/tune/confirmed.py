"""What --confirm found: scores of settings on seeds that no trial has seen, and what they say of the winner."""

from __future__ import annotations

import math
import statistics

from optuna.trial import TrialState

from comp.engine.bank import score
from comp.engine.store import artifacts, paths
from comp.engine.tune.study import Joined
from comp.engine.tune.trial import name_of

SEEDS = 3  # fresh ones for each setting
BEYOND = 2.0  # standard errors that a difference must be from 0


def fresh(joined: Joined) -> list[int]:
    first = joined.cfg.train.seeds[0]
    return [first + 1000 + i for i in range(1, SEEDS + 1)]


def scores(joined: Joined) -> dict[int, list[float]]:
    """Trial -> scores on fresh seeds, of those that were confirmed here."""
    found = {}
    for trial in joined.study.get_trials(deepcopy=False):
        if trial.state == TrialState.COMPLETE:
            file = paths.run_folder(name_of(joined, trial)) / "confirmed.json"
            if file.exists():
                found[trial.number] = artifacts.read_json(file)["scores"]
    return found


def verdict(joined: Joined, best: int, begun: int, fresh: dict[int, list[float]]) -> str:
    sign = score.metric_of(joined.cfg).sign
    gains = [sign * (a - b) for a, b in zip(fresh[best], fresh[begun], strict=True)]
    gain, error = statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
    word = "better" if gain > 0 else "worse"
    sure = f"{word}, beyond the noise of seeds" if abs(gain) > BEYOND * error else "within the noise of seeds"
    return (
        f"trial {best} against {joined.experiment} on {len(gains)} fresh seeds: {spread(fresh[best])} against "
        f"{spread(fresh[begun])}, {sign * gain:+.4f} ± {error:.4f}: {sure}"
    )


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
