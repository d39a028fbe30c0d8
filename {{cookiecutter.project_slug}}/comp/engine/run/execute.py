"""From a config to finished predictions, one (seed, fold) after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from comp import predict
from comp.engine.config import experiments, run_members
from comp.engine.config.experiments import Fold
from comp.engine.hardware import Stop, Stopped
from comp.engine.run import fingerprint, run_media, tracking
from comp.engine.run.context import Context
from comp.engine.run.profiler import Profiler
from comp.engine.run.train_weights import train_weights
from comp.engine.store import locks, paths


def run_folds(
    context: Context, name: str, todo: list[tuple[int, Fold]], *, stop: Stop, profile: bool = False
) -> None:
    """A time limit ends it after a fold or within one, with everything saved."""
    profiler = Profiler(context.device, profile)
    try:
        for seed, fold in todo:
            run_fold(context, name, seed, fold, stop=stop, profiler=profiler)
            if stop.requested:
                raise Stopped(f"seed {seed} fold {fold} is done")
    except Stopped as stopped:
        if not stop.out_of_time:
            raise
        print(f"time limit: {stopped}")
    if profile:
        print(profiler.table())


def run_fold(
    context: Context,
    name: str,
    seed: int,
    fold: Fold,
    *,
    stop: Stop,
    profiler: Profiler | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,  # of a search: may raise distributed.Pruned
    search: bool = False,
    wait: bool = False,
    job: str = "",
) -> None:
    """Trains a fold of runs/<name> and predicts with it; what is finished already is not done again.

    search: without plots and test predictions, which a search does not need.
    wait: for the lock of another process that trains this fold, and is about to end.
    job: of a queue that starts an interrupted job again (see locks.lock).
    """
    if _finished(name, seed, fold, search):
        return
    fingerprint.validate_uncached_images(name, context.cfg, context.loader.dataset.images)
    folder = paths.fold_folder(name, seed, fold)
    with locks.lock(folder, f"training seed {seed} fold {fold}", wait=wait, job=job), stop.listening():
        if _finished(name, seed, fold, search):  # by the process that held the lock
            return
        started = time.perf_counter()
        refit = fold == run_members.REFIT
        with tracking.open_fold_log(name, seed, fold, context.cfg) as log:
            if not search:
                run_media.log_inputs(context, log, name)
            train_weights(context, seed, fold, folder, log, stop=stop, profiler=profiler, on_epoch=on_epoch)
            if not refit:
                predict.predict_fold(context, name, seed, fold, "oof", stop=stop)
            if not refit and not search:
                run_media.log_results(context, log, folder)
            log.finish()
            if search:
                return
            # The run itself comes last: with its predictions the fold is finished.
            for inside in [*run_members.extra_weights(context.cfg), ""]:
                for kind in ("test",) if refit else ("oof", "test"):
                    predict.predict_fold(context, name, seed, fold, kind, inside, stop=stop)
    seconds = time.perf_counter() - started
    print(f"{name} seed {seed} fold {fold}: {run_media.last_epoch(folder)}, {seconds:.0f} s")


def _finished(name: str, seed: int, fold: Fold, search: bool) -> bool:
    if experiments.finished_folds(name, seed, [fold]):
        return True
    return search and bool(experiments.finished_folds(name, seed, [fold], ("oof",)))
