"""The layout of a project on disk: where each folder and file is. This module creates and writes nothing."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from comp.engine.errors import UserError


@cache
def root() -> Path:
    """The project's folder: COMP_ROOT, or the current folder or its nearest parent with configs/base.yaml."""
    chosen = os.environ.get("COMP_ROOT")
    candidates = [Path(chosen)] if chosen else [Path.cwd(), *Path.cwd().parents]
    for folder in candidates:
        if (folder / "configs" / "base.yaml").is_file():
            return folder.resolve()
    raise UserError(
        "project-missing",
        where=chosen or str(Path.cwd()),
        what="not inside a competition project (no configs/base.yaml here or above)",
    )


def path(*parts: str | Path) -> Path:
    """A path below the project's root."""
    return root().joinpath(*parts)


def relative(file: Path) -> str:
    """A path for messages: relative to the project's root, absolute outside it."""
    return str(file.relative_to(root())) if file.is_relative_to(root()) else str(file)


def samples_file() -> Path:
    return path("data", "samples.parquet")


def folds_file() -> Path:
    return path("data", "folds.parquet")


def pseudo_file(name: str) -> Path:
    return path("data", "pseudo", f"{name}.parquet")


def run_folder(experiment: str) -> Path:
    return path("runs", experiment)


def fold_folder(experiment: str, seed: int, fold: int | str) -> Path:
    return path("runs", experiment, f"seed{seed}", f"fold{fold}")


def member_folder(experiment: str, member: str) -> Path:
    return path("runs", experiment, "members", member)


def study_folder(study: str) -> Path:
    return path("studies", study)


def trial_run(study: str, number: int) -> str:
    """Name of a trial's run. It is hidden: `comp runs` and the bank list it only once it is exported."""
    return f".studies/{study}/{number:04d}"


def ensemble_folder(name: str) -> Path:
    return path("ensembles", name)


def submission_file(name: str) -> Path:
    return path("submissions", f"{name}.csv")
