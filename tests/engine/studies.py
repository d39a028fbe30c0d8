"""Shared by the tests of studies: a small space, an experiment that trains in a second, one trial."""

from __future__ import annotations

from pathlib import Path

from optuna.trial import TrialState

from comp.engine import hardware
from comp.engine.tune import study, trial
from comp.engine.tune.open_study import open_study
from comp.engine.tune.study import OpenStudy

SPACE = (
    "search:\n  optim.lr: {low: 1e-3, high: 2e-2, log: true}\n  model.drop_rate: [0.0, 0.1]\n"
    "folds: 2\ntrials: 3\n"
)
SMALL = ["track=none", "machine.num_workers=0", "train.epochs=2", "train.max_samples=64", "schedule.warmup=0"]
FOREVER = float("inf")


def with_space(project: Path) -> Path:
    (project / "configs" / "tune").mkdir()
    (project / "configs" / "tune" / "s.yaml").write_text(SPACE)
    return project


def join(trials: int | None = None, *more: str, space: str = "s") -> OpenStudy:
    return open_study("exp001", [*SMALL, *more], space, None, trials)


def states(opened: OpenStudy) -> list[str]:
    return [t.state.name for t in opened.study.get_trials(deepcopy=False)]


def run(opened: OpenStudy) -> TrialState:
    taken = study.next_trial(opened)
    assert taken is not None
    return trial.run(opened, *taken, hardware.Stop(), FOREVER)
