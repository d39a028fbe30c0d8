"""The weights of one fold: its pseudo-labels and teacher predictions first, then the training loop in all
processes of a torchrun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from comp import train
from comp.engine.config.experiments import Fold
from comp.engine.config.schema import Config
from comp.engine.hardware import Stop
from comp.engine.run import distributed, loading, pseudo_rows, teacher_predictions
from comp.engine.run.context import Context
from comp.engine.run.profiler import Profiler
from comp.engine.run.tracking import RunLogger
from comp.engine.store import artifacts


def train_weights(
    context: Context,
    seed: int,
    fold: Fold,
    folder: Path,
    log: RunLogger,
    *,
    stop: Stop,
    profiler: Profiler | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Does nothing when folder/weights.safetensors is finished."""
    if artifacts.manifest_entry(folder / "weights.safetensors"):
        return
    fold_context = pseudo_rows.fold_context(context, fold)
    teacher_predictions.prepare(fold_context, loading.load_context, fold, folder, stop)
    with distributed.collective(_order(context.cfg, seed, fold)):
        train.train_fold(
            fold_context, seed, fold, folder, log, stop=stop, profiler=profiler, on_epoch=on_epoch
        )


def _order(cfg: Config, seed: int, fold: Fold) -> dict[str, Any]:
    """What the other processes receive (torchrun.py). Progress bars and W&B are for the first one only."""
    config = cfg.model_dump()
    config["machine"]["progress"], config["track"]["mode"] = False, "none"
    return {"config": config, "seed": seed, "fold": fold}
