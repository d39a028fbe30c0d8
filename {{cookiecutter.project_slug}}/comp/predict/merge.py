"""From folds and seeds to members: runs/<exp>/{oof,test}.arrow, runs/<exp>/members/<member>/…, and the run's score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from comp import bank, score, store
from comp.config import Config
from comp.folds import Folds
from comp.samples import Samples


def finished(experiment: str, seed: int, folds: list[int | str]) -> list[int | str]:
    """The folds of a seed whose predictions are all there."""
    def done(fold: int | str) -> bool:
        folder = store.fold_folder(experiment, seed, fold)
        return all(store.sealed(folder / f"{kind}.arrow") for kind in (("test",) if fold == "full" else ("oof", "test")))
    return [fold for fold in folds if done(fold)]


def run(experiment: str, cfg: Config, samples: Samples, folds: Folds) -> dict[str, Any] | None:
    """Merge every complete seed. None while no seed has all its folds."""
    numbers: list[int | str] = list(range(folds.count))
    seeds = [seed for seed in cfg.train.seeds if len(finished(experiment, seed, numbers)) == folds.count]
    full = [seed for seed in cfg.train.seeds if finished(experiment, seed, ["full"])]
    for seed in full:
        _write(experiment, cfg, samples, folds, [seed], ["full"], store.member_folder(experiment, "full"))
    if not seeds:
        return None
    if len(seeds) > 1:
        for seed in seeds:
            _write(experiment, cfg, samples, folds, [seed], numbers, store.member_folder(experiment, f"seed{seed}"))
    return _write(experiment, cfg, samples, folds, seeds, numbers, store.run_folder(experiment))
