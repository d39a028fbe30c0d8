"""Do the stored checkpoints of a submission still say what was stored? Their runs are opened, and a few rows predicted again."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comp import bank, folds, jobs, machine, samples, store
from comp.deliver.recheck import CHECKPOINTS, Checkpoint, drawn, recheck

if TYPE_CHECKING:
    from comp.train.loop import Material


def verify(name: str) -> None:
    table = samples.load()
    split = folds.load(table)
    head = table.heads[0]
    spoke = bank.load(name, "test", table, split).meta["weights"]
    there = [c for c in map(_checkpoint, spoke) if (store.fold_folder(*c) / "weights.safetensors").exists()]
    stored = {}
    for checkpoint in drawn(name, there, CHECKPOINTS):
        said = bank.read(store.fold_folder(*checkpoint) / "test.arrow", table, split)
        stored[checkpoint] = said.row, said.probability(head)

    @cache
    def material(run: str) -> Material:
        cfg = jobs.stored_config(
            run
        )  # torch is imported behind the next line, once all names are known to be right
        machine.settle(cfg.train.threads)
        return jobs.gather(cfg)

    def repredict(checkpoint: Checkpoint, rows: NDArray[np.integer]) -> NDArray[np.floating]:
        from comp.predict import infer

        weights = store.fold_folder(*checkpoint) / "weights.safetensors"
        again, _ = infer.predict(material(checkpoint.run), weights, rows.astype(np.int64))
        return head.row.probability(again[head.name].astype(np.float64))

    half = any(jobs.stored_config(c.run).train.amp != "fp32" for c in stored)
    print(recheck(name, stored, repredict, 1e-3 if half else 1e-5, table.frame["id"].tolist()))


def _checkpoint(weights: str) -> Checkpoint:
    """exp001/seed0/fold3, as predictions name the weights they come from."""
    run, seed, fold = weights.split("/")
    return Checkpoint(run, int(seed.removeprefix("seed")), fold.removeprefix("fold"))
