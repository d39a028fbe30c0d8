"""One trial: an ordinary run with the knobs of its setting, in runs/.studies/<study>/<number>. Like any other
run it continues from its checkpoint after it was killed."""

from __future__ import annotations

import math
import time
import traceback
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from comp.engine import hardware
from comp.engine.errors import UserError
from comp.engine.run import loading, tracking
from comp.engine.store import artifacts, paths
from comp.engine.tune import live, objective
from comp.engine.tune.space import Setting
from comp.engine.tune.study import Heartbeat, OpenStudy, memory_use


def run(
    opened: OpenStudy, trial: Trial, setting: Setting, stop: hardware.Stop, deadline: float
) -> TrialState:
    """Run the trial to its end. The study is told the result last, after everything about it is stored in
    user_attrs."""
    from comp.engine.run.distributed import Pruned

    folder = paths.run_folder(opened.run_name(trial))
    attrs: dict[str, Any] = {}
    values = None
    try:
        with Heartbeat(opened, trial):
            values, result = evaluate(opened, trial, setting, stop, deadline)
            attrs = {"result": result}
    except Pruned:
        state = TrialState.PRUNED
    except KeyboardInterrupt:
        trial.set_user_attr("stopped", True)
        _tell(opened, trial, TrialState.FAIL)
        raise
    except Exception as error:  # the search continues; the error is stored with its traceback
        state = TrialState.FAIL
        kind = error_kind(error)
        attrs = {"error": {"kind": kind, "message": str(error).strip().split("\n")[0][:300]}}
        if kind == "memory":
            attrs["memory"] = memory_use(opened.cfg, setting)
        artifacts.write_text(folder / "error.txt", traceback.format_exc())
    else:
        state = TrialState.COMPLETE
    for key, value in attrs.items():
        trial.set_user_attr(key, value)
    _tell(opened, trial, state, values)
    if state != TrialState.COMPLETE:
        drop_weights(opened, trial)
    return state


def _tell(opened: OpenStudy, trial: Trial, state: TrialState, values: list[float] | None = None) -> None:
    try:
        opened.study.tell(trial, values, state=state)
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError, RuntimeError) as error:
        # This process was suspended for so long that another machine took the trial; its successor has the
        # folder and result.
        if opened.storage.get_trial(trial._trial_id).state == TrialState.RUNNING:
            raise
        print(f"trial {trial.number}: was taken over by another process meanwhile ({error})")


def error_kind(error: Exception) -> str:
    """memory, user_error or crash."""
    import torch

    text = str(error).lower()
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "memory"
    if isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text):
        return "memory"
    return "user_error" if isinstance(error, UserError) else "crash"


def evaluate(
    opened: OpenStudy, trial: Trial, setting: Setting, stop: hardware.Stop, deadline: float
) -> tuple[list[float], dict[str, Any]]:
    """Train the folds: (values of the objectives, result)."""
    from comp.engine.run import execute  # imports torch

    cfg, name = opened.config(setting), opened.run_name(trial)
    seed = cfg.train.seeds[0]
    context = loading.start_run(name, cfg, opened.command)
    folder = paths.run_folder(name)
    (folder / "error.txt").unlink(missing_ok=True)
    log_file = folder / "log.jsonl"
    log = tracking.open_log(
        folder,
        run_id=f"{opened.name}-{opened.study.user_attrs['token']}-{folder.name}",
        name=f"{opened.name}/{folder.name}",
        group=opened.name,
        job_type="trial",
        config=cfg.model_dump() | {"trial": trial.number, "setting": setting},
        settings=opened.cfg.track,
        resume_at=log_file.stat().st_size if log_file.exists() else None,
    )
    with log:
        reporter = EpochReporter(opened, trial, log, cfg.train.epochs, stop, deadline)
        for fold in range(opened.n_folds):
            reporter.begin(fold)
            # job=name: a successor may take the folder, because its predecessor is dead or was silent for
            # minutes.
            execute.run_fold(
                context, name, seed, fold, stop=stop, on_epoch=reporter.epoch, search=True, job=name
            )
            reporter.end(last_epoch(name, seed, fold))
            if stop.requested and fold + 1 < opened.n_folds:
                raise KeyboardInterrupt(f"trial {trial.number} is saved after fold {fold}")
        result = objective.cv_score(opened, context, name, seed)
        values = [result["value"]]
        if "time" in opened.space.objectives:
            result["ms_per_image"] = objective.ms_per_image(context)
            values.append(result["ms_per_image"])
        log.summary(result)
    return values, result


class EpochReporter:
    """Reports every epoch of every fold of a trial to Optuna, and ends the trial if the pruner decides so.

    Reported is the mean over the finished folds and the current one; the step counts epochs over all folds,
    so that trials are compared at the same epoch of the same fold. If train.epochs is searched, or the pruner
    compares folds (Wilcoxon), one value is reported for each fold.
    """

    def __init__(
        self,
        opened: OpenStudy,
        trial: Trial,
        log: tracking.RunLogger,
        epochs: int,
        stop: hardware.Stop,
        deadline: float,
    ):
        self.opened, self.trial, self.log, self.epochs = opened, trial, log, epochs
        self.stop, self.deadline = stop, deadline
        self.by_fold = (
            "train.epochs" in {k.key for k in opened.space.knobs} or opened.space.pruner == "wilcoxon"
        )
        self.fold, self.scores = 0, list[float]()  # the current fold; scores of the finished ones
        # What was reported and logged before the trial was killed is not repeated.
        frozen = opened.storage.get_trial(trial._trial_id)
        self.reported = set(frozen.intermediate_values)
        self.logged = {line["step"] for line in tracking.read(log.folder / "log.jsonl") if "epoch" in line}

    def begin(self, fold: int) -> None:
        self.fold = fold

    def epoch(self, record: dict[str, Any]) -> None:
        step, value = self.fold * self.epochs + record["epoch"], valid_metric(record)
        mean = (sum(self.scores) + value) / (len(self.scores) + 1)
        if step not in self.logged:
            valid = {k: v for k, v in record.items() if k.startswith("valid")}
            self.log.log({"epoch": step, "step": step, "fold": self.fold, **valid, "mean": mean})
        if not self.by_fold and record["epoch"] < self.epochs:
            self.report(step, mean)
        live.show(self.opened, self.deadline)
        if time.time() > self.deadline:
            self.stop.requested = True

    def end(self, record: dict[str, Any]) -> None:
        value = valid_metric(record)
        self.scores.append(value)
        mean = sum(self.scores) / len(self.scores)
        if self.opened.space.pruner == "wilcoxon":
            self.report(self.fold, value)
        else:
            self.report(self.fold + 1 if self.by_fold else (self.fold + 1) * self.epochs, mean)

    def report(self, step: int, value: float) -> None:
        from comp.engine.run.distributed import Pruned

        if len(self.opened.space.objectives) > 1 or not math.isfinite(value):
            return  # Optuna prunes studies with one objective only
        if step not in self.reported:
            self.trial.report(value, step)
        complete = len(self.scores) == self.opened.n_folds  # all folds are trained: not pruned any more
        if not complete and self.trial.should_prune():
            self.trial.set_user_attr("pruned_at", {"fold": self.fold, "step": step})
            self.log.summary({"pruned_at": step})
            raise Pruned


def valid_metric(record: dict[str, Any]) -> float:
    """Mean over targets."""
    values = [value for key, value in record.items() if key.startswith("valid_metric")]
    return sum(values) / len(values) if values else float("nan")


def last_epoch(name: str, seed: int, fold: int) -> dict[str, Any]:
    log = paths.fold_folder(name, seed, fold) / "log.jsonl"
    return [line for line in tracking.read(log) if "epoch" in line][-1]


def drop_weights(opened: OpenStudy, trial: Trial | FrozenTrial) -> None:
    """Delete weights and optimizer states, which take the disk space; logs and predictions stay."""
    folder = paths.run_folder(opened.run_name(trial))
    for fold in folder.glob("seed*/fold*"):
        for file in [
            *fold.glob("state-*.pt"),
            *fold.glob("**/weights.safetensors"),
            *fold.glob("epoch-*.safetensors"),
        ]:
            file.unlink(missing_ok=True)
            artifacts.remove_from_manifest(file)


def keep_best_weights(opened: OpenStudy, n: int) -> None:
    """Drop the weights of all but the best n trials, since a search of hundreds would fill the disk."""
    for trial in opened.ranked()[n:]:
        drop_weights(opened, trial)
