"""Merges the finished folds and seeds of a run into its predictions and its score. Torch is not imported."""

from __future__ import annotations

from typing import Any

from comp.engine.bank import merge
from comp.engine.config import experiments, run_members
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.run import fingerprint
from comp.engine.store import locks, paths


def merge_run(name: str, cfg: Config, *, refit: bool = False) -> dict[str, Any] | None:
    """The run's score, or None while folds are missing. `refit`: the refit on all rows was asked for, and is
    printed last."""
    fingerprint.validate_images(name, cfg, read=False)
    table = samples.load()
    split = folds.load(table)
    with locks.lock(paths.run_folder(name), "merging", wait=True):
        score = merge.merge_folds(name, cfg, table, split)
    command = fingerprint.resume_command(name)
    if refit and not experiments.refit_seeds(name):  # it was stopped by a time limit
        print(f"{name}: fold {run_members.REFIT} is missing\nnext: {command} --fold {run_members.REFIT}")
    elif refit or score is not None:
        merge.print_result(name, run_members.REFIT if refit else "")
    else:
        missing = experiments.missing_folds(name, cfg, split.count) or "another seed"
        print(f"{name}: no score yet, missing: {missing}\nnext: {command}")
    return score
