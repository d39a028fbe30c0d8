"""comp submit NAME --dry-run: everything that comp submit does before it sends."""

from __future__ import annotations

from pathlib import Path

from comp import submission
from comp.engine.bank import bank, merge
from comp.engine.config import resolve, run_members
from comp.engine.data import folds, samples
from comp.engine.deliver import recheck
from comp.engine.ensemble import members
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths


def dry_run(name: str) -> Path:
    recheck.recheck(name)
    return write(name)


def write(name: str) -> Path:
    """submissions/NAME.csv, validated."""
    # Not the run's own config: how a file is written may be corrected after training, and an ensemble has no
    # config.
    cfg = resolve.load(paths.root(), "base").config
    table = samples.load()
    score_file = paths.ensemble_folder(name) / "score.json"
    if score_file.exists() and members.stale(name, artifacts.read_json(score_file)):
        raise UserError(
            "ensemble-stale",
            where=name,
            what="its file or one of its members changed after it was made",
            remedy=f"run comp ensemble {name} again",
        )
    prediction = bank.load(name, "test", table, folds.load(table))
    if run_members.cv_address(name) != name:
        print(f"{name}: {merge.describe_cv(name)}")
    return submission.write(cfg, table, name, prediction)
