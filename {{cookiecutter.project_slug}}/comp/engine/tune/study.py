"""A study that any number of processes share: settings are handed out, and those of dead processes handed out again.

What changes the queue happens one process at a time (`alone`). A trial carries who works on it; when that process is dead
the trial is closed and a successor with its parameters, reports and folder is queued, which goes on from the checkpoint.
Where processes can see each other (comp/engine/store/process.py) one is known to be dead at once, however busy the cores are; elsewhere by its
heartbeat, and only after minutes of silence.

user_attrs of a trial:
    folder     number under which its run lies; a successor keeps it
    worker     process that works on it
    retry_of   number of the trial that it succeeds
    deaths     how often in a row its process died without getting any further
    skipped    why it was not run (the same as another, would run out of memory, over the budget)
    error      kind (memory, refused, crash, killed) and message
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
from comp.engine.errors import Refused
from comp.engine.store import process
from comp.engine.tune.space import Setting, Space, label
from comp.engine.tune.storage import BEAT, alone

DEATHS = 5  # in a row at the same place: the setting kills its process (memory, most likely)
AGAIN = 3  # known settings in a row, until one is drawn at random from those that are not
MEMORY = (
    "data.size",
    "train.batch_size",
)  # the greater, the more memory; compared for the same network and precision

State = TrialState
RAN = (State.RUNNING, State.COMPLETE, State.PRUNED, State.FAIL)


@dataclass(frozen=True)
class Joined:
    """A study as this process sees it."""

    name: str
    experiment: str
    cfg: Config
    space: Space
    study: optuna.Study
    storage: optuna.storages.RDBStorage
    url: str  # of the storage
    folder: Path
    total: int  # trials of the whole study


# --- liveness ------------------------------------------------------------------------------------------------------------


class Heartbeat:
    """Tells other machines that this trial is alive."""

    def __init__(self, joined: Joined, trial: Trial):
        self._storage, self._trial, self._end = joined.storage, trial._trial_id, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        while True:
            try:
                self._storage.record_heartbeat(self._trial)
            except optuna.exceptions.StorageInternalError as error:  # the next one may get through
                print(f"heartbeat: {str(error).splitlines()[0]}", flush=True)
            if self._end.wait(BEAT):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()


# --- samplers and pruners, by name ---------------------------------------------------------------------------------------


def sampler(space: Space) -> optuna.samplers.BaseSampler:
    """Unseeded: processes that join must not draw the same settings. The grid is dealt out by `untried`."""
    conditions = any(knob.when for knob in space.knobs)
    made: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "tpe": lambda: optuna.samplers.TPESampler(multivariate=True, group=conditions, constant_liar=True),
        "gp": optuna.samplers.GPSampler,
        "cmaes": optuna.samplers.CmaEsSampler,
        "qmc": lambda: optuna.samplers.QMCSampler(scramble=True, seed=0),  # one sequence, whoever asks
        "random": optuna.samplers.RandomSampler,
        "grid": optuna.samplers.RandomSampler,
    }
    try:
        return made[space.sampler]()
    except ImportError as error:
        raise Refused(f"sampler: {space.sampler} needs a package: pip install {error.name}") from None


def pruner(space: Space, steps: int) -> optuna.pruners.BasePruner:
    """`steps` reports make a whole trial: one an epoch of each fold."""
    made: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(1, steps // 20)),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, steps // 16)),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(
            min_resource=max(1, steps // 16), max_resource=steps
        ),
        "wilcoxon": lambda: optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=3),
        "none": optuna.pruners.NopPruner,
    }
    return made[space.pruner]()


def distribution(knob: Any) -> BaseDistribution:
    if knob.choices:
        return CategoricalDistribution([label(choice) for choice in knob.choices])
    if knob.whole:
        return IntDistribution(int(knob.low), int(knob.high), log=knob.log, step=int(knob.step or 1))
    return FloatDistribution(knob.low, knob.high, log=knob.log, step=knob.step)


def suggested(space: Space, trial: Trial) -> Setting:
    setting: Setting = {}
    for knob in space.knobs:
        if knob.active(setting):
            drawn = trial._suggest(knob.key, distribution(knob))
            setting[knob.key] = _value(knob, drawn)
    return setting


def setting_of(space: Space, trial: FrozenTrial) -> Setting:
    by_key = {knob.key: knob for knob in space.knobs}
    return {key: _value(by_key[key], value) for key, value in trial.params.items() if key in by_key}


def _value(knob: Any, drawn: Any) -> Any:
    return next((c for c in knob.choices if label(c) == drawn), drawn) if knob.choices else drawn


# --- the queue -----------------------------------------------------------------------------------------------------------


def counted(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that spend the budget: what is running, queued again, or ended by its own doing."""
    succeeded = {t.user_attrs.get("retry_of") for t in trials}
    return [
        t
        for t in trials
        if "skipped" not in t.user_attrs
        and t.number not in succeeded
        and (t.state in RAN or "retry_of" in t.user_attrs)
    ]


def take(joined: Joined) -> tuple[Trial, Setting] | None:
    """The next trial of the study, or None when the budget is spent or nothing is left to try."""
    with alone(joined.folder, joined.url):
        requeue(joined)
        for known in itertools.count():
            trials = joined.study.get_trials(deepcopy=False)
            again = any(t.state == State.WAITING and "retry_of" in t.user_attrs for t in trials)
            full = len(counted(trials)) >= joined.total
            if full and not again:
                return None
            waiting = any(t.state == State.WAITING for t in trials)
            if (joined.space.sampler == "grid" or known >= AGAIN) and not waiting:
                fresh = untried(joined.space, trials)
                if fresh is None:
                    print("every setting of the space has been tried")
                    return None
                joined.study.enqueue_trial({key: label(value) for key, value in fresh.items()})
            trial = joined.study.ask()
            setting = suggested(joined.space, trial)
            joined.storage.record_heartbeat(
                trial._trial_id
            )  # or a machine that dies now would never be missed
            trial.set_user_attr("worker", process.own_id())
            reason = None if "retry_of" in trial.user_attrs else needless(joined, trial, setting)
            if full and reason is None and "retry_of" not in trial.user_attrs:
                reason = _behind(joined, trial, setting)
            if reason is None:
                if "folder" not in trial.user_attrs:
                    trial.set_user_attr("folder", trial.number)
                return trial, setting
            trial.set_user_attr("skipped", reason)
            joined.study.tell(trial, state=State.FAIL)
    raise AssertionError


def _behind(joined: Joined, trial: Trial, setting: Setting) -> str:
    """A known setting that stands before a successor although the budget is spent: it waits for a greater one."""
    params = {key: label(value) for key, value in setting.items()}
    joined.study.enqueue_trial(params, user_attrs={"from": trial.user_attrs.get("from", "")})
    return "over the budget; queued again"


def untried(space: Space, trials: list[FrozenTrial]) -> Setting | None:
    """A setting that no trial has. In grid order where there are few, otherwise at random."""
    seen = {_frozen(setting_of(space, t)) for t in trials}  # skipped ones too: they would be skipped again
    if all(knob.grid is not None for knob in space.knobs):
        every: dict[Any, Setting] = {}
        for values in itertools.islice(itertools.product(*(knob.grid or [] for knob in space.knobs)), 20_000):
            drawn = dict(zip((knob.key for knob in space.knobs), values, strict=True))
            if (setting := space.fitted(drawn)) is not None:
                every.setdefault(_frozen(setting), setting)
        return next((setting for key, setting in every.items() if key not in seen), None)
    chance = random.Random()
    return next((s for _ in range(1000) if _frozen(s := space.drawn(chance)) not in seen), None)


def needless(joined: Joined, trial: Trial, setting: Setting) -> str | None:
    """Why this setting is not worth a run."""
    trials = joined.study.get_trials(deepcopy=False)
    for other in counted(trials):
        if other.number == trial.number:
            continue
        theirs = setting_of(joined.space, other)
        if _frozen(theirs) == _frozen(setting):
            return f"the same setting as trial {other.number}"
        if (ran_out := other.user_attrs.get("memory")) and memory_of(joined.cfg, setting)["like"] == ran_out[
            "like"
        ]:
            sizes = memory_of(joined.cfg, setting)["sizes"]
            if all(mine >= theirs for mine, theirs in zip(sizes, ran_out["sizes"], strict=True)):
                return f"trial {other.number} ran out of memory, and this one is no smaller"
    return None


def memory_of(cfg: Config, setting: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how much memory a setting takes."""
    from comp.engine.tune.space import own

    values = own(cfg) | dict(setting)
    like = [values["model.name"], values["train.amp"], values["data.channels"], process.pid_scope()]
    return {"like": like, "sizes": [values[key] for key in MEMORY]}


def requeue(joined: Joined) -> list[int]:
    """Close the trials of dead processes and queue their successors. Killed in between, the next call goes on."""
    study, storage = joined.study, joined.storage
    silent = set(storage._get_stale_trial_ids(study._study_id))
    for trial in study.get_trials(deepcopy=False, states=(State.RUNNING,)):
        if _dead(trial, silent):
            try:
                storage.set_trial_state_values(trial._trial_id, State.FAIL)
            except optuna.exceptions.UpdateFinishedTrialError:
                pass  # it ended while we looked
    trials = study.get_trials(deepcopy=False)
    succeeded = {t.user_attrs.get("retry_of") for t in trials}
    queued = []
    for trial in trials:
        ended = trial.user_attrs.keys() & {"skipped", "error"}
        if trial.state != State.FAIL or ended or trial.number in succeeded:
            continue
        queued.append(_succeed(joined, trial))
    return queued


def _dead(trial: FrozenTrial, silent: set[int]) -> bool:
    # Without a name it was asked for and never signed, which happens in one go, alone: dead.
    state = process.state(trial.user_attrs.get("worker", ""))
    return state == "dead" or (state == "unknown" and trial._trial_id in silent)


def _succeed(joined: Joined, dead: FrozenTrial) -> int:
    before = dead.user_attrs.get("deaths", {})
    at = max(dead.intermediate_values, default=-1)
    times = (before.get("times", 0) if before.get("at") == at else 0) + ("stopped" not in dead.user_attrs)
    kept = {key: value for key, value in dead.user_attrs.items() if key not in ("worker", "stopped")}
    kept |= {"retry_of": dead.number, "deaths": {"at": at, "times": times}}
    gone = times >= DEATHS
    if gone:
        message = f"{times} processes died at the same place of it; for want of memory, most likely"
        kept |= {
            "error": {"kind": "killed", "message": message},
            "memory": memory_of(joined.cfg, setting_of(joined.space, dead)),
        }
    system = {
        k: v for k, v in dead.system_attrs.items() if k in ("fixed_params",) or k.startswith("hyperband")
    }
    joined.study.add_trial(
        optuna.trial.create_trial(
            state=State.FAIL if gone else State.WAITING,
            params=dead.params,
            distributions=dead.distributions,
            user_attrs=kept,
            system_attrs=system,
            intermediate_values=dead.intermediate_values,
        )
    )
    return dead.number


def _frozen(setting: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """To compare by: 0.1 is 0.1 whichever way it was reached."""
    return tuple(
        sorted((key, f"{v:.12g}" if isinstance(v, float) else str(label(v))) for key, v in setting.items())
    )
