"""comp train: plans a run, validates it, trains its folds one after the other or in parallel, and merges
them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comp.engine import hardware
from comp.engine.config import experiments
from comp.engine.run import fingerprint, launcher, loading, validate
from comp.engine.run import plan as plans
from comp.engine.run.merge_run import merge_run

if TYPE_CHECKING:
    from comp.engine.run.context import Context


def train(
    experiment: str,
    overrides: list[str],
    *,
    fold: str | None = None,
    seed: int | None = None,
    name: str | None = None,
    fresh: bool = False,
    debug: bool = False,
    profile: bool = False,
    on: str | None = None,
    time_limit: str | None = None,
    stop: hardware.Stop | None = None,
    any_seed: bool = False,
) -> None:
    """Every (seed, fold) that is not finished; then the score of the run. `stop`: default: one that ends
    after time_limit. `any_seed`: `seed` need not be one of train.seeds."""
    if stop is None:
        stop = hardware.Stop(hardware.parse_duration("--time-limit", time_limit) if time_limit else None)
    launcher.validate_options(on, profile=profile, limited=stop.limit is not None)
    plan = plans.make(
        experiment, overrides, fold=fold, seed=seed, name=name, fresh=fresh, debug=debug, any_seed=any_seed
    )
    with plan.loaded.locating():
        validate.training(plan.loaded, plan.name, plan.replaced)
    hardware.set_threads(plan.cfg.train.threads)
    context = loading.load_context(plan.cfg, plan.loaded)
    from comp.engine.run import estimate, execute, run_media

    todo = plan.todo(context.folds.count)
    fingerprint.claim(plan.name, plan.cfg, context.folds, plan.command, plan.replaced)
    missing = plans.unfinished(plan.name, todo)
    estimate.announce(context, plan.name, missing, len(todo))
    if on is None:
        execute.run_folds(context, plan.name, missing, stop=stop, profile=profile)
    else:
        _train_in_parallel(context, plan.name, missing, on, stop)
    if score := merge_run(plan.name, plan.cfg, refit=plan.refit):
        run_media.log_summary(context, plan.name, score)


def _train_in_parallel(
    context: Context, name: str, todo: list[tuple[int, experiments.Fold]], on: str, stop: hardware.Stop
) -> None:
    """Each fold in a process of its own. A fold whose process is killed may be continued by another one."""
    job = launcher.new_queue()
    jobs = [
        launcher.Job(f"{name} seed {s} fold {f}", "fold", {"name": name, "seed": s, "fold": f, "job": job})
        for s, f in todo
    ]
    if jobs:
        executor = launcher.make_executor(on, context.cfg.train.threads)
        print(f"{name}: {len(jobs)} folds, {min(executor.size, len(jobs))} at a time", flush=True)
        launcher.run_jobs_with_progress(jobs, executor, stop, name, "fold", context.cfg.machine.progress)


def run_part(name: str, seed: int, fold: experiments.Fold, job: str = "") -> None:
    """One fold of a run that another process has started, with the config stored there (worker.py)."""
    cfg = experiments.stored_config(name)
    fingerprint.validate_images(name, cfg)
    hardware.set_threads(cfg.train.threads)
    context = loading.load_context(cfg)
    from comp.engine.run import execute

    execute.run_fold(context, name, seed, fold, stop=hardware.Stop(), wait=True, job=job)
