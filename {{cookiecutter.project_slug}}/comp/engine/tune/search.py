"""comp tune: join a study or begin it, and work through its trials until the budget is spent."""

from __future__ import annotations

import datetime
import time
from typing import Any, Literal

import optuna
from optuna.trial import TrialState

from comp.engine import hardware
from comp.engine.bank import score
from comp.engine.config import experiments, resolve
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths
from comp.engine.tune import live, report, space, study, study_config, trial
from comp.engine.tune import storage as storages
from comp.engine.tune.space import Setting
from comp.engine.tune.study import Joined

Direction = Literal["minimize", "maximize"]

KEPT = 10  # the best trials keep their weights, so that they can become runs at once
SAME = 3  # failures in a row that end a search: a mistake rather than a setting


def tune(
    experiment: str,
    overrides: list[str],
    *,
    space_name: str,
    trials: int | None,
    hours: float | None,
    until: str | None,
    storage: str | None,
    on: str | None = None,
) -> None:
    deadline = _deadline(hours, until)
    joined = join(experiment, overrides, space_name, storage, trials)
    hardware.set_threads(joined.cfg.train.threads)
    stop = hardware.Stop()
    try:
        if on is None:
            _work(joined, stop, deadline)
        else:
            _side_by_side(joined, stop, deadline, on, overrides, storage)
    except KeyboardInterrupt:
        if not stop.requested or stop.signalled or time.time() < deadline:
            raise
    live.show(joined, deadline, now=True)
    live.leave()
    report.write(joined)
    report.tell(joined)


def _side_by_side(
    joined: Joined, stop: hardware.Stop, deadline: float, on: str, overrides: list[str], storage: str | None
) -> None:
    """Processes that join the study as one typed by hand would. They see what is left by themselves."""
    from comp.engine.run import launcher

    def say(line: str) -> None:
        live.leave()
        print(line, end="", flush=True)

    given = {
        "experiment": joined.experiment,
        "overrides": overrides,
        "space_name": joined.space.name,
        "storage": storage,
        "trials": joined.total,
        "deadline": None if deadline == float("inf") else deadline,
    }
    executor = launcher.make_executor(on, joined.cfg.train.threads, say)
    if executor.machines > 1 and storage is None:
        raise Refused(
            f"--on {on}: {executor.machines} machines, and SQLite is for one; --storage postgresql://user@host/database is for many"
        )
    workers = [
        launcher.Job(f"{joined.name} worker {i}", "trials", given)
        for i in range(min(executor.size, joined.total))
    ]
    launcher.run_jobs(workers, executor, stop, lambda left: live.show(joined, deadline))


def part(
    experiment: str,
    overrides: list[str],
    space_name: str,
    storage: str | None,
    trials: int,
    deadline: float | None,
) -> None:
    """One of several that work through a study. What they found is told by who started them."""
    joined = join(experiment, overrides, space_name, storage, trials)
    hardware.set_threads(joined.cfg.train.threads)
    end, stop = float("inf") if deadline is None else deadline, hardware.Stop()
    try:
        _work(joined, stop, end)
    except KeyboardInterrupt:
        if not stop.requested or stop.signalled or time.time() < end:
            raise


def _work(joined: Joined, stop: hardware.Stop, deadline: float) -> None:
    failed = 0
    while not stop.requested and time.time() < deadline:
        taken = study.take(joined)
        if taken is None:
            return
        asked, setting = taken
        live.show(joined, deadline, now=True)
        began = time.monotonic()
        state = trial.run(joined, asked, setting, stop, deadline)
        _say(joined, asked.number, state, setting, time.monotonic() - began)
        failed = failed + 1 if state == TrialState.FAIL else 0
        if failed == SAME:
            error = _frozen(joined, asked.number).user_attrs.get("error", {})
            raise Refused(
                f"{joined.name}: {SAME} trials in a row failed, the last with: {error.get('message')}; "
                f"{paths.relative(paths.run_folder(trial.name_of(joined, asked)))}/error.txt has all of it"
            )
        if state == TrialState.COMPLETE:
            trial.keep_best(joined, KEPT)
    if stop.requested:
        raise KeyboardInterrupt(f"{joined.name} keeps all that ended, and goes on with what did not")


def _say(joined: Joined, number: int, state: TrialState, setting: Setting, seconds: float) -> None:
    live.leave()
    frozen = _frozen(joined, number)
    what = {
        TrialState.COMPLETE: frozen.user_attrs.get("result", {}).get("text", ""),
        TrialState.PRUNED: "pruned in fold {fold}".format(
            **frozen.user_attrs.get("pruned_at", {"fold": "?"})
        ),
        TrialState.FAIL: "failed ({kind}): {message}".format(
            **frozen.user_attrs.get("error", {"kind": "?", "message": "taken up by another process"})
        ),
    }[state]
    print(f"trial {number}: {what}, {live.duration(seconds)}, {live.words(setting)}", flush=True)


def _frozen(joined: Joined, number: int) -> optuna.trial.FrozenTrial:
    return joined.study.get_trials(deepcopy=False)[number]


def _deadline(hours: float | None, until: str | None) -> float:
    if hours is not None and until is not None:
        raise Refused("--hours and --until exclude each other")
    if hours is not None:
        if not hours > 0:
            raise Refused(f"--hours {hours}: must be above 0")
        return time.time() + hours * 3600
    if until is None:
        return float("inf")
    try:
        at = datetime.datetime.strptime(until, "%H:%M").time()
    except ValueError:
        raise Refused(f"--until {until}: a time of day is written like 07:30") from None
    now = datetime.datetime.now()
    then = datetime.datetime.combine(now.date(), at)
    return (then if then > now else then + datetime.timedelta(days=1)).timestamp()


# --- joining -------------------------------------------------------------------------------------------------------------


def join(
    experiment: str, overrides: list[str], space_name: str, storage: str | None, trials: int | None = None
) -> Joined:
    """Everything that a mistake could be in is looked at before Optuna, and long before torch, is asked for."""
    loaded = experiments.load(experiment, overrides)
    cfg = loaded.config
    chosen = study_config.read(space_name, cfg, experiment)
    if trials is not None and trials < 1:
        raise Refused(f"--trials {trials}: must be 1 or more")
    name = f"{experiment}-{space_name}"
    url = storages.address(name, storage)
    metric = score.metric_of(cfg)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = paths.study_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    directions: list[Direction] = ["maximize" if metric.direction == "max" else "minimize"]
    directions += ["minimize"] * (len(chosen.objectives) - 1)
    steps = (chosen.folds or cfg.competition.folds.k * cfg.competition.folds.repeats) * cfg.train.epochs
    with storages.alone(
        folder, url, "begin"
    ):  # two processes that create one database at once harm each other
        database = storages.connect(url)
    with storages.alone(folder, url):
        opened = optuna.create_study(
            study_name=name,
            storage=database,
            sampler=study.sampler(chosen),
            pruner=study.pruner(chosen, steps),
            directions=directions,
            load_if_exists=True,
        )
        joined = Joined(name, experiment, cfg, chosen, opened, database, url, folder, trials or chosen.trials)
        _agree(joined, loaded)
        if "ready" not in opened.user_attrs:
            _enqueue_known(joined)
            opened.set_user_attr("ready", True)
    return joined


def _agree(joined: Joined, loaded: resolve.Loaded) -> None:
    """A study stands for one experiment, one space and one set of folds: other numbers would not compare."""
    from comp.engine.data import folds, samples

    table = samples.load()
    split = folds.load(table)
    folds.validate_plan(split, loaded)
    identity: dict[str, Any] = {
        **{key: space.label(value) for key, value in resolve.result_knobs(joined.cfg).items()},
        "space": artifacts.digest([repr(knob) for knob in joined.space.knobs]),
        "objectives": ",".join(joined.space.objectives),
        "folds searched": joined.space.folds,
        "seed": joined.cfg.train.seeds[0],
        "data/samples.parquet": table.hash,
        "data/folds.parquet": split.hash,
    }
    before = joined.study.user_attrs.get("identity")
    if before is None:
        joined.study.set_user_attr("birth", artifacts.digest(time.time_ns())[:6])
        joined.study.set_user_attr("experiment", joined.experiment)
        joined.study.set_user_attr("metric", score.metric_of(joined.cfg).name)
        joined.study.set_user_attr("identity", identity)
        return
    changed = [key for key in identity if before.get(key) != identity[key]]
    if changed:
        raise Refused(
            f"study {joined.name} was begun with another {', '.join(changed)}; give the space file another name, "
            f"or move {paths.relative(joined.folder)} away",
            *(f"  {key}: {before.get(key)!r} there, {identity[key]!r} here" for key in changed),
        )


def _enqueue_known(joined: Joined) -> None:
    """The experiment's own setting first, then the best of earlier studies as far as the spaces overlap."""
    own = space.own(joined.cfg)
    known: list[tuple[str, dict[str, Any]]] = [(joined.experiment, own)]
    known += [(name, own | params) for name, params in _earlier(joined)]
    for origin, values in known:
        setting = joined.space.fitted(values)
        if setting is None:
            outside = [k.key for k in joined.space.knobs if not k.holds(values.get(k.key))]
            print(f"{origin}: its {', '.join(outside)} lies outside the space, so it is not tried first")
            continue
        joined.study.enqueue_trial(
            {key: space.label(value) for key, value in setting.items()},
            user_attrs={"from": origin},
            skip_if_exists=True,
        )


def _earlier(joined: Joined) -> list[tuple[str, dict[str, Any]]]:
    """(study, its best setting), of studies on the same metric that share a knob with this one."""
    found = []
    for database, name in studies(None if joined.url.startswith("sqlite") else joined.url):
        if name == joined.name:
            continue
        old = optuna.load_study(study_name=name, storage=database)
        best = best_of(old)
        shared = {knob.key for knob in joined.space.knobs} & (best.params.keys() if best else set())
        if best and shared and old.user_attrs.get("metric") == joined.study.user_attrs["metric"]:
            by_key = {knob.key: knob for knob in joined.space.knobs}
            found.append((name, {key: study._value(by_key[key], best.params[key]) for key in shared}))
    return found


def studies(storage: str | None = None) -> list[tuple[optuna.storages.RDBStorage, str]]:
    """Every study of the project: one database a folder, and those behind the URL `storage`."""
    files = sorted(paths.path("studies").glob("*/study.db"))
    bases = [storages.connect(f"sqlite:///{file}") for file in files]
    if storage is not None:
        bases.append(storages.connect(storage))
    return [(base, name) for base in bases for name in optuna.get_all_study_names(base)]


def best_of(old: optuna.Study) -> optuna.trial.FrozenTrial | None:
    done = old.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = -1 if old.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
    return min(done, key=lambda t: (sign * t.values[0], t.number), default=None)
