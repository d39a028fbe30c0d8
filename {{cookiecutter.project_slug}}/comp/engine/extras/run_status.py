"""The state of a run or ensemble on disk, for comp runs and comp bank: its score with marks, its folds, and
the time it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from comp.engine.bank import score
from comp.engine.config import experiments, run_members
from comp.engine.config.schema import Config
from comp.engine.run import tracking
from comp.engine.store import artifacts, locks, paths

PAUSE = 600  # seconds: a longer gap in a log is the time between two starts, not training
Record = dict[str, Any]  # score.json


def read_record(folder: Path) -> Record | None:
    """score.json of a run, member or ensemble; None: not scored yet."""
    file = folder / "score.json"
    record: Record | None = (
        artifacts.read_json(artifacts.verified(file)) if artifacts.manifest_entry(file) else None
    )
    return record


def score_cells(record: Record | None) -> list[str]:
    """mean ± std over folds, and the score over all OOF rows."""
    if record is None:
        return ["-", "-"]
    return [score.mean_std(record), "-" if record["oof"] is None else f"{record['oof']:.4f}"]


def score_marks(record: Record | None) -> list[str]:
    """The marks of a score, and whether the samples or folds are no longer those it was computed on."""
    if record is None:
        return []
    current = {"samples": paths.samples_file(), "folds": paths.folds_file()}
    other = [
        f"other {what}"
        for what, file in current.items()
        if (artifacts.manifest_entry(file) or {}).get("hash") != record["made_for"][what]
    ]
    return [*record["marks"], *other[:1]]


def is_started(folder: Path) -> bool:
    """Whether a run has saved anything or is training. A start that failed before leaves only a config."""
    files = (file for pattern in ("seed*/fold*/*", "members/*/*", "*") for file in folder.glob(pattern))
    suffixes = (".arrow", ".safetensors", ".pt", ".npy")
    return any(file.suffix in suffixes for file in files) or bool(_lock_owners(folder))


def _lock_owners(folder: Path) -> list[str]:
    return [held for lock in folder.glob("seed*/fold*/.lock") if (held := locks.owner(lock.parent))]


def folds_and_marks(folder: Path, cfg: Config, record: Record | None) -> tuple[str, list[str]]:
    """`8/10 of 2 seeds`, and the marks of the run: those of its score, unfinished, training now, has
    :full."""
    name, count = folder.name, experiments.fold_count(cfg)
    by_seed = {seed: _predicted_folds(name, seed, count) for seed in experiments.seeds(name)}
    by_seed = dict.fromkeys(cfg.train.seeds, 0) | {seed: n for seed, n in by_seed.items() if n}
    done, total = sum(by_seed.values()), count * len(by_seed)
    marks = score_marks(record)
    if done < total:
        marks.append("unfinished")
    if _lock_owners(folder):
        marks.append("training now")
    if artifacts.manifest_entry(paths.member_folder(name, run_members.REFIT) / "test.arrow"):
        marks.append(f"has :{run_members.REFIT}")
    return f"{done}/{total}" + (f" of {len(by_seed)} seeds" if len(by_seed) > 1 else ""), marks


def _predicted_folds(run: str, seed: int, folds: int) -> int:
    files = (paths.fold_folder(run, seed, fold) / "oof.arrow" for fold in range(folds))
    return sum(artifacts.manifest_entry(file) is not None for file in files)


def training_time(folder: Path) -> str:
    """By the clocks in the logs of all folds."""
    seconds = 0.0
    for log in folder.glob("seed*/fold*/log.jsonl"):
        clocks = [line["clock"] for line in tracking.read(log) if "clock" in line]
        seconds += sum(gap for gap in np.diff(clocks) if 0 < gap < PAUSE)
    if not seconds:
        return "-"
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours}h{minutes:02d}" if hours else f"{minutes}m{int(seconds % 60):02d}"
