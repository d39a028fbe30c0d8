"""One trial: an ordinary run with some knobs of its own. It lies in runs/.studies/<study>/<number> and, killed, goes on
from its checkpoint like any other run."""

from __future__ import annotations

import math
import shutil
import time
import traceback
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from comp.engine import hardware
from comp.engine.bank import bank, predictions, score
from comp.engine.config.schema import Config
from comp.engine.errors import Refused, UserError
from comp.engine.run import execute, loading, tracking
from comp.engine.store import artifacts, paths
from comp.engine.tune import live
from comp.engine.tune.space import Setting, applied
from comp.engine.tune.study import Heartbeat, Joined, memory_of

if TYPE_CHECKING:
    from comp.engine.run.context import Context

TIMED = 5  # passes whose median is the time of inference


def config_of(joined: Joined, setting: Setting) -> Config:
    """Of one seed, without bars and without W&B runs for each fold: the trial has a run of its own."""
    quiet = {"train.seeds": joined.cfg.train.seeds[:1], "machine.progress": False, "track.mode": "none"}
    return applied(joined.cfg, setting | quiet)


def count_of(joined: Joined) -> int:
    folds = joined.cfg.competition.folds
    return joined.space.folds or folds.k * folds.repeats


def run(joined: Joined, trial: Trial, setting: Setting, stop: hardware.Stop, until: float) -> TrialState:
    """To its end, which is told to the study last of all. What ends a trial early says so in its user_attrs first."""
    from comp.engine.run.distributed import Pruned

    folder = paths.run_folder(name_of(joined, trial))
    attrs: dict[str, Any] = {}
    values = None
    try:
        with Heartbeat(joined, trial):
            values, facts = objective(joined, trial, setting, stop, until)
            attrs = {"result": facts}
    except Pruned:
        state = TrialState.PRUNED
    except KeyboardInterrupt:
        trial.set_user_attr("stopped", True)
        _tell(joined, trial, TrialState.FAIL)
        raise
    except Exception as error:  # the night goes on: recorded as what it is, with its traceback
        state = TrialState.FAIL
        kind = kind_of(error)
        attrs = {"error": {"kind": kind, "message": str(error).strip().split("\n")[0][:300]}}
        if kind == "memory":
            attrs["memory"] = memory_of(joined.cfg, setting)
        artifacts.write_text(folder / "error.txt", traceback.format_exc())
    else:
        state = TrialState.COMPLETE
    for key, value in attrs.items():
        trial.set_user_attr(key, value)
    _tell(joined, trial, state, values)
    if state != TrialState.COMPLETE:
        drop_weights(joined, trial)
    return state


def _tell(joined: Joined, trial: Trial, state: TrialState, values: list[float] | None = None) -> None:
    try:
        joined.study.tell(trial, values, state=state)
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError, RuntimeError) as error:
        # Suspended for so long that another machine took it up; its successor has the folder and the result.
        if joined.storage.get_trial(trial._trial_id).state == TrialState.RUNNING:
            raise
        print(f"trial {trial.number}: was taken up by another process meanwhile ({error})")


def kind_of(error: Exception) -> str:
    import torch

    text = str(error).lower()
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "memory"
    if isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text):
        return "memory"
    return "refused" if isinstance(error, UserError) else "crash"


def name_of(joined: Joined, trial: Trial | FrozenTrial) -> str:
    return paths.trial_run(joined.name, int(trial.user_attrs["folder"]))


def objective(
    joined: Joined, trial: Trial, setting: Setting, stop: hardware.Stop, until: float
) -> tuple[list[float], dict[str, Any]]:
    cfg, name = config_of(joined, setting), name_of(joined, trial)
    context = loading.start_run(name, cfg, f"comp tune {joined.experiment} --space {joined.space.name}")
    folder = paths.run_folder(name)
    (folder / "error.txt").unlink(missing_ok=True)
    log_file = folder / "log.jsonl"
    log = tracking.open_log(
        folder,
        run_id=f"{joined.name}-{joined.study.user_attrs['birth']}-{folder.name}",
        name=f"{joined.name}/{folder.name}",
        group=joined.name,
        job_type="trial",
        config=cfg.model_dump() | {"trial": trial.number, "setting": setting},
        settings=joined.cfg.track,
        resume_at=log_file.stat().st_size if log_file.exists() else None,
    )
    with log:
        watch = Watch(joined, trial, log, cfg, stop, until)
        for number in range(count_of(joined)):
            watch.begin(number)
            # A successor has the run's folder because its predecessor is dead, or was silent for minutes: the same job.
            execute.run_fold(
                context,
                name,
                cfg.train.seeds[0],
                number,
                stop=stop,
                on_epoch=watch.epoch,
                search=True,
                job=name,
            )
            watch.end(last_epoch(name, cfg.train.seeds[0], number))
            if stop.requested and number + 1 < count_of(joined):
                raise KeyboardInterrupt(f"trial {trial.number} is saved behind fold {number}")
        facts = scored(joined, name, context)
        values = [facts["value"]]
        if "time" in joined.space.objectives:
            facts["ms_per_image"] = milliseconds(context)
            values.append(facts["ms_per_image"])
        log.summary(facts)
    return values, facts


class Watch:
    """Sees every epoch of every fold of a trial, reports it, and ends the trial when the pruner has seen enough.

    Reported is the mean of the finished folds and the current one, at a step that counts epochs over all folds: two trials
    compare at the same epoch of the same fold. Where a trial's epochs are searched, or the pruner wants whole folds
    (Wilcoxon), only folds are reported.
    """

    def __init__(
        self,
        joined: Joined,
        trial: Trial,
        log: tracking.RunLogger,
        cfg: Config,
        stop: hardware.Stop,
        until: float,
    ):
        self.joined, self.trial, self.log, self.cfg, self.stop, self.until = (
            joined,
            trial,
            log,
            cfg,
            stop,
            until,
        )
        self.by_fold = (
            "train.epochs" in {k.key for k in joined.space.knobs} or joined.space.pruner == "wilcoxon"
        )
        self.number, self.done = 0, list[float]()
        frozen = joined.storage.get_trial(trial._trial_id)
        self.reported = set(frozen.intermediate_values)
        self.logged = {line["step"] for line in tracking.read(log.folder / "log.jsonl") if "epoch" in line}

    def begin(self, number: int) -> None:
        self.number = number

    def epoch(self, report: dict[str, Any]) -> None:
        step, value = self.number * self.cfg.train.epochs + report["epoch"], watched(report)
        mean = (sum(self.done) + value) / (len(self.done) + 1)
        if step not in self.logged:
            told = {k: v for k, v in report.items() if k.startswith("valid")}
            self.log.log({"epoch": step, "step": step, "fold": self.number, **told, "mean": mean})
        if not self.by_fold and report["epoch"] < self.cfg.train.epochs:
            self.judge(step, mean)
        live.show(self.joined, self.until)
        if time.time() > self.until:
            self.stop.requested = True

    def end(self, report: dict[str, Any]) -> None:
        value = watched(report)
        self.done.append(value)
        mean = sum(self.done) / len(self.done)
        if self.joined.space.pruner == "wilcoxon":
            self.judge(self.number, value)
        else:
            self.judge(self.number + 1 if self.by_fold else (self.number + 1) * self.cfg.train.epochs, mean)

    def judge(self, step: int, value: float) -> None:
        from comp.engine.run.distributed import Pruned

        if len(self.joined.space.objectives) > 1 or not math.isfinite(value):
            return  # Optuna prunes by one number only
        if step not in self.reported:
            self.trial.report(value, step)
        last = len(self.done) == count_of(self.joined)  # it is paid for: let it count
        if not last and self.trial.should_prune():
            self.trial.set_user_attr("pruned_at", {"fold": self.number, "step": step})
            self.log.summary({"pruned_at": step})
            raise Pruned


def watched(report: dict[str, Any]) -> float:
    values = [value for key, value in report.items() if key.startswith("valid_metric")]
    return sum(values) / len(values) if values else float("nan")


def last_epoch(name: str, seed: int, number: int) -> dict[str, Any]:
    log = paths.fold_folder(name, seed, number) / "log.jsonl"
    return [line for line in tracking.read(log) if "epoch" in line][-1]


def scored(joined: Joined, name: str, context: Context) -> dict[str, Any]:
    """The same number as the run would have, over the folds that were trained."""
    seed, facts = context.cfg.train.seeds[0], (context.samples, context.folds)
    sets = [
        bank.read(paths.fold_folder(name, seed, number) / "oof.arrow", *facts)
        for number in range(count_of(joined))
    ]
    whole = predictions.merge(sets, *facts, context.cfg.predict.averaging_space)
    record = score.evaluate(context.cfg, *facts, whole)
    value = record["oof"] if record["oof"] is not None else record["mean"]
    if value is None:
        raise Refused(score.summary(record))
    kept = {key: record[key] for key in ("mean", "std", "n", "folds")}
    return {"value": value, **kept, "text": score.summary(record)}


def milliseconds(context: Context) -> float:
    """An image through the network and its views, warm, without reading it: the median of some passes."""
    import numpy as np
    import torch

    from comp import models
    from comp.engine.run import views

    cfg, device = context.cfg, context.device
    module = models.build(cfg, context.samples.heads, pretrained=False).to(device).eval()
    rows = min(cfg.predict.batch_size, 64)
    batch = torch.zeros(rows, cfg.data.channels, cfg.data.size, cfg.data.size, device=device)
    times = []
    with torch.inference_mode():
        for _ in range(TIMED + 1):
            began = time.perf_counter()
            float(module(batch).sum())  # the sum makes the CPU wait for a GPU
            times.append(time.perf_counter() - began)
    return float(np.median(times[1:])) / rows * 1000 * len(views.views(cfg.predict.tta))


def drop_weights(joined: Joined, trial: Trial | FrozenTrial) -> None:
    """Weights and states are what costs space; logs and predictions stay."""
    folder = paths.run_folder(name_of(joined, trial))
    for fold in folder.glob("seed*/fold*"):
        for file in [
            *fold.glob("state-*.pt"),
            *fold.glob("**/weights.safetensors"),
            *fold.glob("epoch-*.safetensors"),
        ]:
            file.unlink(missing_ok=True)
            artifacts.remove_from_manifest(file)


def keep_best(joined: Joined, n: int) -> None:
    """The weights of all but the best trials go: a search of hundreds must not fill the disk."""
    done = [t for t in joined.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    for trial in ranked(joined, done)[n:]:
        drop_weights(joined, trial)


def ranked(joined: Joined, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Best first, by the first objective."""
    sign = -1 if joined.study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
    return sorted(trials, key=lambda t: (sign * t.values[0], t.number))


def trash(name: str) -> None:
    shutil.rmtree(paths.run_folder(name), ignore_errors=True)
