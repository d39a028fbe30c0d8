"""On labels that mean nothing the CV must say so: the whole road, from the first draw to the score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import config

from comp import jobs, samples, store
from comp.prepare import assign, tables

QUIET = [
    "track=none",
    "machine.workers=0",
    "machine.progress=false",
    "machine.resident=1000",
]


@pytest.mark.slow
def test_random_labels_score_chance(project: Path) -> None:
    """1,000 rows, 10 draws of labels, the default configuration: mean CV within 3 standard errors of one in ten."""
    raw = project / "data/raw/train.csv"
    table = pd.read_csv(raw, dtype=str).head(1000)
    scores = []
    for seed in range(10):
        table["label"] = np.random.default_rng(seed).integers(0, 10, len(table)).astype(str)
        table.to_csv(raw, index=False)
        cfg = config()
        tables.prepare(cfg)
        assign.make(cfg, samples.load(), remake=True)
        jobs.train("exp001", QUIET, name="random", fresh=True)
        scores.append(store.read_json(project / "runs/random/score.json")["oof"])
    error = np.std(scores, ddof=1) / np.sqrt(len(scores))
    assert abs(np.mean(scores) - 0.1) < 3 * error, (np.mean(scores), error)
