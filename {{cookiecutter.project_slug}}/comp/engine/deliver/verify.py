"""Do the stored checkpoints of a submission still say what was stored? Their runs are opened, and a few rows predicted again."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comp.engine import hardware
from comp.engine.bank import bank
from comp.engine.config import experiments, run_members
from comp.engine.data import folds, samples
from comp.engine.deliver.recheck import CHECKPOINTS, Checkpoint, drawn, recheck
from comp.engine.run import loading
from comp.engine.store import paths

WEIGHTS = "weights.safetensors"

if TYPE_CHECKING:
    from comp.engine.run.context import Context


def verify(name: str) -> None:
    """For a member of other views, the predictions under those views; for a blend, its members' under their own."""
    table = samples.load()
    split = folds.load(table)
    said = bank.load(name, "test", table, split).meta
    member = run_members.cv_member(name.partition(":")[2])
    inside = member if member.startswith("tta-") else ""
    there = [c for c in map(_checkpoint, said["weights"]) if (paths.fold_folder(*c) / WEIGHTS).exists()]
    stored = {}
    for checkpoint in drawn(name, there, CHECKPOINTS):
        part = bank.read(paths.fold_folder(*checkpoint) / inside / "test.arrow", table, split)
        stored[checkpoint] = part.row, np.hstack([part.probability(head) for head in table.heads])

    @cache
    def context(run: str) -> Context:
        cfg = experiments.stored_config(run)
        if inside:
            views = {"tta": said["tta"], "averaging_space": said["space"]}
            cfg = cfg.model_copy(update={"predict": cfg.predict.model_copy(update=views)})
        # Eight pictures are not worth a cache of all of them: decoded on the fly they are the same pixels.
        here = {"num_workers": 0, "gpu_cache_mb": 0}
        cfg = cfg.model_copy(
            update={
                "data": cfg.data.model_copy(update={"cache": False}),
                "machine": cfg.machine.model_copy(update=here),
            }
        )
        hardware.set_threads(cfg.train.threads)
        return loading.load_context(cfg)

    def repredict(checkpoint: Checkpoint, rows: NDArray[np.integer]) -> NDArray[np.floating]:
        from comp import predict  # torch comes with it, so only once all names are known to be right

        weights = paths.fold_folder(*checkpoint) / WEIGHTS
        again, _ = predict.predict(context(checkpoint.run), weights, rows.astype(np.int64))
        return np.hstack([h.spec.to_probability(again[h.name].astype(np.float64)) for h in table.heads])

    def tolerance(checkpoint: Checkpoint) -> float:
        return 1e-5 if experiments.stored_config(checkpoint.run).train.amp == "fp32" else 1e-3

    print(recheck(name, stored, repredict, tolerance, table.frame["id"].tolist()))
    if gone := len(said["weights"]) - len(there):
        print(f"{gone} of its checkpoints are gone and could not be asked")


def _checkpoint(weights: str) -> Checkpoint:
    """exp001/seed0/fold3, or exp001/seed0/fold3/snap2, as predictions name the weights they come from."""
    run, seed, fold = weights.split("/", 2)
    return Checkpoint(run, int(seed.removeprefix("seed")), fold.removeprefix("fold"))
