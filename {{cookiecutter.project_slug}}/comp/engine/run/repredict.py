"""Predict a finished run, or its refit, again with other views, from its stored weights. The result is a
member of its own."""

from __future__ import annotations

from dataclasses import replace

from comp import predict as infer
from comp.engine import hardware
from comp.engine.bank import bank, merge, predictions
from comp.engine.config import experiments, run_members
from comp.engine.run import views as tta
from comp.engine.run.context import Context
from comp.engine.store import artifacts, locks, paths


def predict(context: Context, run: str, views: list[str], space: str, refit_only: bool = False) -> list[str]:
    """Returns the names of the new members: of the folds, of the refit on all rows, or of both. Each fold is
    stored by itself, so a killed call resumes after its last finished fold."""
    tta.views(views)
    cfg = context.cfg
    inside = f"tta-{'-'.join(views)}" + ("" if space == cfg.predict.averaging_space else f"-{space}")
    cfg = cfg.model_copy(
        update={"predict": cfg.predict.model_copy(update={"tta": views, "averaging_space": space})}
    )
    context = replace(context, cfg=cfg)
    count = context.folds.count
    cv = [] if refit_only else [(s, n) for s in experiments.complete_seeds(run, count) for n in range(count)]
    refits = [(seed, run_members.REFIT) for seed in experiments.refit_seeds(run)]
    parts_of: dict[str, list[merge.Part]] = {inside: [*cv], run_members.refit_member(inside): [*refits]}
    members = {name: parts for name, parts in parts_of.items() if parts}
    if not members:
        raise experiments.missing_predictions(
            f"{run}:{run_members.REFIT}" if refit_only else run, "predictions"
        )
    for name, parts in members.items():  # of all of them, before the first one starts
        artifacts.require_space(_nbytes(context, name, parts), f"runs/{run}/members/{name}")
    stop = hardware.Stop()
    for name, parts in members.items():
        doing = f"predicting {run}:{name}"
        with locks.lock(paths.member_folder(run, name), doing), stop.listening():
            _predict_member(context, run, name, parts, inside, stop)
    return list(members)


def _predict_member(
    context: Context, run: str, name: str, parts: list[merge.Part], inside: str, stop: hardware.Stop
) -> None:
    samples, folds = context.samples, context.folds
    for seed, fold in parts:
        for kind in _kinds(name):
            infer.predict_fold(context, run, seed, fold, kind, inside, stop=stop)
            if stop.requested:
                raise KeyboardInterrupt(f"{kind} of seed {seed} fold {fold} is done")
    merge.merge_member(run, name, context.cfg, samples, folds, parts, inside=[inside])


def _kinds(name: str) -> tuple[str, ...]:
    return ("test",) if run_members.is_refit(name) else ("oof", "test")


def _nbytes(context: Context, name: str, parts: list[merge.Part]) -> int:
    """Each fold by itself, and the mean of them."""
    samples = context.samples
    rows = sum(len(predictions.rows_of(kind, samples, context.folds)) for kind in _kinds(name))
    return bank.nbytes(samples, (1 + len(parts)) * rows)
