"""The refit on all data is on the schedule that CV used: the same epochs, so the same rates by share of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_training import TINY

from comp import bank, folds, jobs, samples, store, track


def test_the_refit_sees_all_rows_for_as_many_epochs_and_has_no_oof(project: Path) -> None:
    told = [*TINY, "train.limit=null", "train.batch_size=64", "train.epochs=2", "predict.batch_size=256"]
    for which in ("1", "full"):
        jobs.train("exp001", told, fold=which, name="x")
    table = samples.load()
    split = folds.load(table)
    rows = {fold: len(split.split(fold)[0]) for fold in (1, "full")}
    assert rows["full"] == len(table.positions("train")) > rows[1]
    rates = {}
    for fold, count in rows.items():
        log = [line for line in track.read(store.fold_folder("x", 0, fold) / "log.jsonl") if "rate" in line]
        assert len(log) == 2 * (count // 64)
        rates[fold] = [line["rate"] for line in log]
    for share in (0, 0.25, 0.5, 0.75):
        one, full = (rates[fold][round(share * len(rates[fold]))] for fold in rates)
        assert full == pytest.approx(one, rel=0.1)
    assert bank.find("x:full", "test").exists()
    assert not (store.fold_folder("x", 0, "full") / "oof.arrow").exists()
