"""comp predict: merges the folds of a run, predicts it again with other views, or scores the held-out
rows."""

from __future__ import annotations

from comp.engine import hardware
from comp.engine.bank import merge
from comp.engine.config import experiments, run_members
from comp.engine.errors import UserError
from comp.engine.run import fingerprint, loading
from comp.engine.run.merge_run import merge_run


def predict(
    experiment: str | None, *, tta: str | None = None, space: str | None = None, last_look: bool = False
) -> None:
    """`experiment`: a run (exp001), or its refit on all rows (exp001:full)."""
    if experiment is None:
        what = "the name of a run is missing"
        raise UserError("run-missing", where="comp predict", what=what, remedy="comp predict exp001")
    name, _, member = experiment.partition(":")
    if member not in ("", run_members.REFIT):
        what = f"takes a run, or its refit: {name} or {name}:{run_members.REFIT}"
        raise UserError("run-unknown", where=f"comp predict {experiment}", what=what)
    cfg = experiments.stored_config(name)
    if member and not experiments.refit_seeds(name):
        raise experiments.missing_predictions(experiment, "test predictions")
    if last_look and member:
        what = "the refit was trained on all other rows; only the models of the folds are scored"
        remedy = f"comp predict {name} --last-look"
        raise UserError("member-unfit", where="--last-look", what=what, remedy=remedy)
    if tta is None and space is None and not last_look:
        merge_run(name, cfg, refit=bool(member))
        return
    fingerprint.validate_images(name, cfg)
    hardware.set_threads(cfg.train.threads)
    context = loading.load_context(cfg)
    from comp.engine.run import holdout, repredict

    if last_look:
        print(f"{name}: {holdout.score_holdout(context, name)}")
        return
    views = [view.strip() for view in tta.split(",")] if tta else cfg.predict.tta
    for made in repredict.predict(
        context, name, views, space or cfg.predict.averaging_space, refit_only=bool(member)
    ):
        merge.print_result(name, made)
