"""Create a study or join it, and queue the settings that are known already."""

from __future__ import annotations

import time
from typing import Any, Literal

import optuna

from comp.engine.bank import score
from comp.engine.config import experiments, resolve
from comp.engine.data import folds, samples
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths
from comp.engine.tune import space, storage, study, study_config
from comp.engine.tune.study import OpenStudy

Direction = Literal["minimize", "maximize"]


def open_study(
    experiment: str,
    overrides: list[str],
    space_name: str,
    storage_url: str | None,
    max_trials: int | None = None,
) -> OpenStudy:
    """Mistakes of the user are reported before the database is created, and long before torch is imported."""
    loaded = experiments.load(experiment, overrides)
    cfg = loaded.config
    searched = study_config.read(space_name, cfg, experiment)
    if max_trials is not None and max_trials < 1:
        raise UserError("option-value", where=f"--trials {max_trials}", what="must be 1 or more")
    name = f"{experiment}-{space_name}"
    url = storage.url_of(name, storage_url)
    metric = score.metric_of(cfg)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = paths.study_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    directions: list[Direction] = ["maximize" if metric.direction == "max" else "minimize"]
    directions += ["minimize"] * (len(searched.objectives) - 1)
    n_folds = searched.folds or cfg.competition.folds.k * cfg.competition.folds.repeats
    # Two processes that create the tables of one database at the same time would fail.
    with storage.exclusive(folder, url, "tables"):
        database = storage.connect(url)
    with storage.exclusive(folder, url):
        opened = OpenStudy(
            name=name,
            experiment=experiment,
            cfg=cfg,
            space=searched,
            study=optuna.create_study(
                study_name=name,
                storage=database,
                sampler=study.sampler(searched),
                pruner=study.pruner(searched, n_folds * cfg.train.epochs),
                directions=directions,
                load_if_exists=True,
            ),
            storage=database,
            url=url,
            folder=folder,
            max_trials=max_trials or searched.trials,
        )
        _validate_identity(opened, loaded)
        if "ready" not in opened.study.user_attrs:
            _enqueue_known(opened)
            opened.study.set_user_attr("ready", True)
    return opened


def _validate_identity(opened: OpenStudy, loaded: resolve.Loaded) -> None:
    """A study has one experiment, space and set of folds: scores of others would not be comparable."""
    table = samples.load()
    split = folds.load(table)
    folds.validate_plan(split, loaded)
    identity: dict[str, Any] = {
        **{key: space.to_optuna(value) for key, value in resolve.result_knobs(opened.cfg).items()},
        "space": artifacts.digest([repr(knob) for knob in opened.space.knobs]),
        "objectives": ",".join(opened.space.objectives),
        "folds searched": opened.space.folds,
        "seed": opened.cfg.train.seeds[0],
        "data/samples.parquet": table.hash,
        "data/folds.parquet": split.hash,
    }
    before = opened.study.user_attrs.get("identity")
    if before is None:
        # Part of the ids of its W&B runs, so that a study that is deleted and made again gets other ones.
        opened.study.set_user_attr("token", artifacts.digest(time.time_ns())[:6])
        opened.study.set_user_attr("experiment", opened.experiment)
        opened.study.set_user_attr("metric", score.metric_of(opened.cfg).name)
        opened.study.set_user_attr("identity", identity)
        return
    changed = [key for key in identity if before.get(key) != identity[key]]
    if changed:
        raise UserError(
            "study-differs",
            where=f"study {opened.name}",
            what=f"was started with another {', '.join(changed)}",
            remedy=f"give the space file another name, or move {paths.relative(opened.folder)} away",
            others=[
                UserError(
                    "study-differs", key=f"  {key}", what=f"{before.get(key)!r} there, {identity[key]!r} here"
                )
                for key in changed
            ],
        )


def _enqueue_known(opened: OpenStudy) -> None:
    """The experiment's own setting first, then the best of earlier studies, if they are inside the space."""
    own = space.config_values(opened.cfg)
    known: list[tuple[str, dict[str, Any]]] = [(opened.experiment, own)]
    known += [(name, own | params) for name, params in _best_of_earlier_studies(opened)]
    for origin, values in known:
        setting = opened.space.restrict(values)
        if setting is None:
            outside = [knob.key for knob in opened.space.knobs if not knob.contains(values.get(knob.key))]
            print(f"{origin}: its {', '.join(outside)} is outside the space, so it is not tried first")
            continue
        opened.study.enqueue_trial(
            {key: space.to_optuna(value) for key, value in setting.items()},
            user_attrs={"from": origin},
            skip_if_exists=True,
        )


def _best_of_earlier_studies(opened: OpenStudy) -> list[tuple[str, dict[str, Any]]]:
    """(study, its best setting), of studies on the same metric that share a knob with this one."""
    by_key = {knob.key: knob for knob in opened.space.knobs}
    found = []
    for database, name in storage.all_studies(None if opened.url.startswith("sqlite") else opened.url):
        if name == opened.name:
            continue
        earlier = optuna.load_study(study_name=name, storage=database)
        best = storage.best_trial(earlier)
        shared = by_key.keys() & (best.params.keys() if best else set())
        if best and shared and earlier.user_attrs.get("metric") == opened.study.user_attrs["metric"]:
            found.append((name, {key: study.from_optuna(by_key[key], best.params[key]) for key in shared}))
    return found
