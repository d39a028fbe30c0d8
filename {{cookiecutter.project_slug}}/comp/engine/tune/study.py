"""A study that any number of processes share: a queue of settings, in which those of dead processes are
queued again.

The queue changes under a lock (storage.exclusive). A trial stores which process runs it; when that process is
dead the trial is closed and a successor is queued with its parameters, intermediate values and folder, and
continues from the checkpoint. On the same machine a dead process is noticed at once (store/process.py), on
others when its heartbeat has been missing for minutes.

user_attrs of a trial:
    from       the experiment or the earlier study that the setting was taken from
    folder     number of the run's folder; a successor keeps it
    worker     id of the process that runs it
    retry_of   number of the trial that it succeeds
    deaths     how many times in a row its process died without any progress, and at which step
    stopped    it was stopped by the user or the time limit, which does not count as a death
    skipped    why it was not run (same setting as another, would run out of memory, over the budget)
    result     scores of a completed trial, and the line to print
    pruned_at  fold and step
    error      kind (memory, user_error, crash, killed) and message
    memory     what it ran out of memory with
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from comp.engine.config.schema import Config
from comp.engine.errors import UserError
from comp.engine.store import paths, process
from comp.engine.tune.space import Knob, Setting, Space, config_values, to_optuna, with_setting
from comp.engine.tune.storage import HEARTBEAT_INTERVAL, exclusive, ranked

MAX_DEATHS = 5  # in a row at the same step: the setting kills its process, most likely by its memory
MAX_DUPLICATES = 3  # samples in a row that were tried before, until an untried setting is drawn at random
MEMORY_KNOBS = ("data.size", "train.batch_size")  # memory grows with them, for the same network and precision

State = TrialState
STARTED = (State.RUNNING, State.COMPLETE, State.PRUNED, State.FAIL)


@dataclass(frozen=True)
class OpenStudy:
    """A study with everything that a process needs to work on it."""

    name: str
    experiment: str
    cfg: Config
    space: Space
    study: optuna.Study
    storage: optuna.storages.RDBStorage
    url: str  # of the storage
    folder: Path
    max_trials: int  # of the whole study, over all processes

    @property
    def n_folds(self) -> int:
        """Folds that a trial trains."""
        folds = self.cfg.competition.folds
        return self.space.folds or folds.k * folds.repeats

    @property
    def command(self) -> str:
        return f"comp tune {self.experiment} --space {self.space.name}"

    def config(self, setting: Setting) -> Config:
        """Of a trial: one seed; no progress bars, and no W&B run for each fold, since the trial has one of
        its own."""
        quiet = {"train.seeds": self.cfg.train.seeds[:1], "machine.progress": False, "track.mode": "none"}
        return with_setting(self.cfg, setting | quiet)

    def run_name(self, trial: Trial | FrozenTrial) -> str:
        return paths.trial_run(self.name, int(trial.user_attrs["folder"]))

    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def ranked(self) -> list[FrozenTrial]:
        """Completed trials, best first."""
        return ranked(self.study)


# --- liveness -----------------------------------------------------------------------------------------------


class Heartbeat:
    """Shows other machines that the process of this trial is alive."""

    def __init__(self, opened: OpenStudy, trial: Trial):
        self._storage, self._trial_id, self._end = opened.storage, trial._trial_id, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while True:
            try:
                self._storage.record_heartbeat(self._trial_id)
            except optuna.exceptions.StorageInternalError as error:  # the next one may succeed
                print(f"heartbeat: {str(error).splitlines()[0]}", flush=True)
            if self._end.wait(HEARTBEAT_INTERVAL):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()


# --- samplers, pruners and distributions --------------------------------------------------------------------


def sampler(space: Space) -> optuna.samplers.BaseSampler:
    """Without a seed: processes that share a study must not sample the same settings. `grid` is done by
    untried_setting."""
    conditions = any(knob.when for knob in space.knobs)
    samplers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "tpe": lambda: optuna.samplers.TPESampler(multivariate=True, group=conditions, constant_liar=True),
        "gp": optuna.samplers.GPSampler,
        "cmaes": optuna.samplers.CmaEsSampler,
        # Seeded: one sequence, which all processes share through the database.
        "qmc": lambda: optuna.samplers.QMCSampler(scramble=True, seed=0),
        "random": optuna.samplers.RandomSampler,
        "grid": optuna.samplers.RandomSampler,
    }
    try:
        return samplers[space.sampler]()
    except ImportError as error:
        raise UserError(
            "package-missing",
            key="sampler",
            what=f"{space.sampler} needs a package that is not installed",
            remedy=f"pip install {error.name}",
        ) from None


def pruner(space: Space, steps: int) -> optuna.pruners.BasePruner:
    """`steps`: reports of a whole trial, one for each epoch of each fold."""
    pruners: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(1, steps // 20)),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, steps // 16)),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(
            min_resource=max(1, steps // 16), max_resource=steps
        ),
        "wilcoxon": lambda: optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=3),
        "none": optuna.pruners.NopPruner,
    }
    return pruners[space.pruner]()


def distribution(knob: Knob) -> BaseDistribution:
    if knob.choices:
        return CategoricalDistribution([to_optuna(choice) for choice in knob.choices])
    assert knob.low is not None and knob.high is not None
    if knob.integer:
        return IntDistribution(int(knob.low), int(knob.high), log=knob.log, step=int(knob.step or 1))
    return FloatDistribution(knob.low, knob.high, log=knob.log, step=knob.step)


def suggest(space: Space, trial: Trial) -> Setting:
    setting: Setting = {}
    for knob in space.knobs:
        if knob.is_active(setting):
            setting[knob.key] = from_optuna(knob, trial._suggest(knob.key, distribution(knob)))
    return setting


def setting_of(space: Space, trial: FrozenTrial) -> Setting:
    by_key = {knob.key: knob for knob in space.knobs}
    return {key: from_optuna(by_key[key], value) for key, value in trial.params.items() if key in by_key}


def from_optuna(knob: Knob, value: Any) -> Any:
    """The inverse of to_optuna."""
    return next((c for c in knob.choices if to_optuna(c) == value), value) if knob.choices else value


# --- the queue ----------------------------------------------------------------------------------------------


def budgeted(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that count towards max_trials: not those that were skipped or succeeded by another, nor
    known settings that still wait in the queue."""
    succeeded = {t.user_attrs.get("retry_of") for t in trials}
    return [
        t
        for t in trials
        if "skipped" not in t.user_attrs
        and t.number not in succeeded
        and (t.state in STARTED or "retry_of" in t.user_attrs)
    ]


def next_trial(opened: OpenStudy) -> tuple[Trial, Setting] | None:
    """The next trial of the study, or None if the budget is spent or every setting has been tried."""
    with exclusive(opened.folder, opened.url):
        requeue_dead(opened)
        for duplicates in itertools.count():
            trials = opened.trials()
            retries = any(t.state == State.WAITING and "retry_of" in t.user_attrs for t in trials)
            budget_spent = len(budgeted(trials)) >= opened.max_trials
            if budget_spent and not retries:
                return None
            waiting = any(t.state == State.WAITING for t in trials)
            if (opened.space.sampler == "grid" or duplicates >= MAX_DUPLICATES) and not waiting:
                untried = untried_setting(opened.space, trials)
                if untried is None:
                    print("every setting of the space has been tried")
                    return None
                opened.study.enqueue_trial({key: to_optuna(value) for key, value in untried.items()})
            trial = opened.study.ask()
            setting = suggest(opened.space, trial)
            # The first heartbeat: without one the death of another machine would not be noticed.
            opened.storage.record_heartbeat(trial._trial_id)
            trial.set_user_attr("worker", process.own_id())
            reason = None if "retry_of" in trial.user_attrs else skip_reason(opened, trial, setting)
            if budget_spent and reason is None and "retry_of" not in trial.user_attrs:
                reason = _queue_again(opened, trial, setting)
            if reason is None:
                if "folder" not in trial.user_attrs:
                    trial.set_user_attr("folder", trial.number)
                return trial, setting
            trial.set_user_attr("skipped", reason)
            opened.study.tell(trial, state=State.FAIL)
    raise AssertionError


def _queue_again(opened: OpenStudy, trial: Trial, setting: Setting) -> str:
    """Optuna's queue returned a known setting before a successor although the budget is spent: it waits for a
    larger one."""
    params = {key: to_optuna(value) for key, value in setting.items()}
    opened.study.enqueue_trial(params, user_attrs={"from": trial.user_attrs.get("from", "")})
    return "over the budget; queued again"


def untried_setting(space: Space, trials: list[FrozenTrial]) -> Setting | None:
    """A setting that no trial has: in grid order if all knobs are finite, otherwise at random."""
    tried = {
        _comparable(setting_of(space, t)) for t in trials
    }  # skipped ones too: they would be skipped again
    if all(knob.grid is not None for knob in space.knobs):
        settings: dict[Any, Setting] = {}
        for values in itertools.islice(itertools.product(*(knob.grid or [] for knob in space.knobs)), 20_000):
            point = dict(zip((knob.key for knob in space.knobs), values, strict=True))
            if (setting := space.restrict(point)) is not None:
                settings.setdefault(_comparable(setting), setting)
        return next((setting for key, setting in settings.items() if key not in tried), None)
    rng = random.Random()
    return next((s for _ in range(1000) if _comparable(s := space.sample(rng)) not in tried), None)


def skip_reason(opened: OpenStudy, trial: Trial, setting: Setting) -> str | None:
    """Why this setting need not be run; None if it should."""
    use = memory_use(opened.cfg, setting)
    for other in budgeted(opened.trials()):
        if other.number == trial.number:
            continue
        if _comparable(setting_of(opened.space, other)) == _comparable(setting):
            return f"the same setting as trial {other.number}"
        exceeded = other.user_attrs.get("memory")
        if (
            exceeded
            and use["like"] == exceeded["like"]
            and all(mine >= theirs for mine, theirs in zip(use["sizes"], exceeded["sizes"], strict=True))
        ):
            return f"trial {other.number} ran out of memory, and this one is no smaller"
    return None


def memory_use(cfg: Config, setting: Mapping[str, Any]) -> dict[str, Any]:
    """What determines the memory of a trial: comparable trials have equal `like`, and among them memory grows
    with `sizes`."""
    values = config_values(cfg) | dict(setting)
    like = [values["model.name"], values["train.amp"], values["data.channels"], process.pid_scope()]
    return {"like": like, "sizes": [values[key] for key in MEMORY_KNOBS]}


def requeue_dead(opened: OpenStudy) -> list[int]:
    """Close the trials of dead processes and queue their successors; the numbers of the closed ones. If it is
    killed between the two steps, the next call does the second."""
    study, storage = opened.study, opened.storage
    stale = set(storage._get_stale_trial_ids(study._study_id))
    for trial in study.get_trials(deepcopy=False, states=(State.RUNNING,)):
        if _is_dead(trial, stale):
            try:
                storage.set_trial_state_values(trial._trial_id, State.FAIL)
            except optuna.exceptions.UpdateFinishedTrialError:
                pass  # it ended meanwhile
    trials = opened.trials()
    succeeded = {t.user_attrs.get("retry_of") for t in trials}
    queued = []
    for trial in trials:
        explained = trial.user_attrs.keys() & {"skipped", "error"}
        if trial.state != State.FAIL or explained or trial.number in succeeded:
            continue
        _queue_successor(opened, trial)
        queued.append(trial.number)
    return queued


def _is_dead(trial: FrozenTrial, stale: set[int]) -> bool:
    # A trial without a worker was asked for by a process that died before it stored its id: both happen under
    # the lock.
    state = process.state(trial.user_attrs.get("worker", ""))
    return state == "dead" or (state == "unknown" and trial._trial_id in stale)


def _queue_successor(opened: OpenStudy, dead: FrozenTrial) -> None:
    before = dead.user_attrs.get("deaths", {})
    step = max(dead.intermediate_values, default=-1)
    deaths = (before.get("times", 0) if before.get("step") == step else 0) + (
        "stopped" not in dead.user_attrs
    )
    attrs = {key: value for key, value in dead.user_attrs.items() if key not in ("worker", "stopped")}
    attrs |= {"retry_of": dead.number, "deaths": {"step": step, "times": deaths}}
    give_up = deaths >= MAX_DEATHS
    if give_up:
        message = f"{deaths} processes died at the same step of it, most likely for lack of memory"
        attrs |= {
            "error": {"kind": "killed", "message": message},
            "memory": memory_use(opened.cfg, setting_of(opened.space, dead)),
        }
    system = {
        k: v for k, v in dead.system_attrs.items() if k in ("fixed_params",) or k.startswith("hyperband")
    }
    opened.study.add_trial(
        optuna.trial.create_trial(
            state=State.FAIL if give_up else State.WAITING,
            params=dead.params,
            distributions=dead.distributions,
            user_attrs=attrs,
            system_attrs=system,
            intermediate_values=dead.intermediate_values,
        )
    )


def _comparable(setting: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Hashable; equal for floats that differ only by rounding."""
    return tuple(
        sorted(
            (key, f"{v:.12g}" if isinstance(v, float) else str(to_optuna(v))) for key, v in setting.items()
        )
    )
