"""On random labels the CV score must be chance: the whole pipeline, from sampling to the score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import config

from comp.engine.data import make_folds, prepare, samples
from comp.engine.run import runner
from comp.engine.store import artifacts

# As long as configs/exp001.yaml trains, pictures in memory.
QUIET = [
    "track=none", "machine.num_workers=0", "machine.progress=false", "machine.gpu_cache_mb=1000", "train.epochs=6",
]  # fmt: skip
RUNS = {"last": [], "chosen": ["select.name=best", "select.on=inner"]}


@pytest.mark.slow
def test_random_labels_score_chance(project: Path) -> None:
    """1,000 rows, 10 draws of labels, the default config and the best epoch by inner rows: the mean CV
    accuracy is within 3 standard errors of 0.1."""
    raw = project / "data/raw/train.csv"
    table = pd.read_csv(raw, dtype=str).head(1000)
    scores: dict[str, list[float]] = {name: [] for name in RUNS}
    for seed in range(10):
        table["label"] = np.random.default_rng(seed).integers(0, 10, len(table)).astype(str)
        table.to_csv(raw, index=False)
        cfg = config()
        prepare.prepare(cfg)
        make_folds.make(cfg, samples.load(), remake=True)
        for name, more in RUNS.items():
            runner.train("exp001", [*QUIET, *more], name=name, fresh=True)
            scores[name].append(artifacts.read_json(project / f"runs/{name}/score.json")["oof"])
    for name, each in scores.items():
        error = np.std(each, ddof=1) / np.sqrt(len(each))
        print(f"{name}: {np.mean(each):.4f}, standard error {error:.4f}")
        assert abs(np.mean(each) - 0.1) < 3 * error, (name, np.mean(each), error)
