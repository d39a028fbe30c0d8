"""--export NAME: a trial becomes configs/NAME.yaml, with what it differs in, and runs/NAME, with what it has trained."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from comp.engine.bank import bank
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import resolve, run_members, yaml_lines
from comp.engine.data import folds, samples
from comp.engine.errors import Refused
from comp.engine.run import fingerprint
from comp.engine.store import artifacts, paths
from comp.engine.tune.study import Joined, setting_of
from comp.engine.tune.trial import count_of, name_of, ranked

FOLD_FILES = ("weights.safetensors", "log.jsonl", "code.diff")


def export(joined: Joined, name: str, number: int | None) -> None:
    file = paths.path("configs", f"{name}.yaml")
    if not fingerprint.NAME.fullmatch(name):
        raise Refused(f"--export {name!r}: a name is made of letters, digits, _, - and .")
    for taken in (file, paths.run_folder(name)):
        if taken.exists():
            raise Refused(f"--export {name}: {paths.relative(taken)} is there already; take another name")
    trial = _chosen(joined, number)
    setting = setting_of(joined.space, trial)
    base = joined.experiment if paths.path("configs", f"{joined.experiment}.yaml").exists() else "base"
    own = resolve.flatten(resolve.load(paths.root(), base).config.model_dump())
    wanted = resolve.flatten(joined.cfg.model_dump()) | setting
    changed = {k: v for k, v in wanted.items() if own.get(k) != v and resolve.changes_results([f"{k}="])}
    text = (
        _header(joined, trial, name) + f"base: {base}\n\n" + yaml_lines.dump(_nested(changed)) * bool(changed)
    )
    artifacts.write_text(file, text)
    print(f"written: {paths.relative(file)}, {len(changed)} knobs of {base} changed")
    moved = _as_run(joined, trial, name)
    every = joined.cfg.competition.folds.k * joined.cfg.competition.folds.repeats
    if moved:
        print(f"written: {paths.relative(paths.run_folder(name))}, {moved} of {every} folds trained already")
    else:
        print("its weights are not on this machine any more, so its folds will be trained again")
    print(f"next: comp train {name}")


def _chosen(joined: Joined, number: int | None) -> FrozenTrial:
    trials = joined.study.get_trials(deepcopy=False)
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    if not done:
        raise Refused(f"{joined.name}: no trial is complete yet")
    if number is None:
        return ranked(joined, done)[0]
    found = next((t for t in done if t.number == number), None)
    if found is None:
        known = ", ".join(str(t.number) for t in ranked(joined, done)[:10])
        raise Refused(f"--trial {number}: is no completed trial of {joined.name}; the best are {known}")
    return found


def _header(joined: Joined, trial: FrozenTrial, name: str) -> str:
    return (
        f"# Hypothesis  trial {trial.number} of {len(joined.study.trials)} in study {joined.name} is better than {joined.experiment}\n"
        f"# Command     comp train {name}\n"
        f"# Expected    {trial.user_attrs['result']['text']}, as the best of a search: a little optimistic\n"
        f"# Result      CV        LB\n"
        f"# From        comp tune {joined.experiment} --space {joined.space.name}, {time.strftime('%Y-%m-%d')}\n"
    )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, knob = key.partition(".")
        tree.setdefault(section, {})[knob] = value
    return tree


def _as_run(joined: Joined, trial: FrozenTrial, name: str) -> int:
    """Copy what is finished and say anew what it belongs to. `comp train` finds it done and adds the test rows."""
    cfg = resolve.load(paths.root(), name).config
    table = samples.load()
    split = folds.load(table)
    old, seed = name_of(joined, trial), joined.cfg.train.seeds[0]
    places = [(n, paths.fold_folder(old, seed, n)) for n in range(count_of(joined))]
    ready = [
        (n, place)
        for n, place in places
        if artifacts.manifest_entry(place / FOLD_FILES[0]) and artifacts.manifest_entry(place / "oof.arrow")
    ]
    if not ready:
        return 0
    fingerprint.validate_images(old, cfg)
    fingerprint.claim(name, cfg, split, f"comp train {name}")
    for number, place in ready:
        target = paths.fold_folder(name, seed, number)
        target.mkdir(parents=True, exist_ok=True)
        for each in FOLD_FILES:
            _copied(place / each, target / each)
        for inside in run_members.extra_weights(cfg):
            _copied(place / inside / bank.WEIGHTS, target / inside / bank.WEIGHTS)
            artifacts.add_to_manifest(target / inside / bank.WEIGHTS)
        if _copied(place / "optimism.json", target / "optimism.json"):
            artifacts.add_to_manifest(target / "optimism.json")
        kept = artifacts.manifest_entry(place / FOLD_FILES[0]) or {}
        said = bank.read(place / "oof.arrow", table, split)
        artifacts.verified(place / FOLD_FILES[0])
        artifacts.add_to_manifest(target / FOLD_FILES[0], log=kept["log"])
        meta = dict(said.meta) | {"run": name, "weights": bank.weights_of(target)}
        bank.write(target / "oof.arrow", PredictionSet(said.row, said.fold, said.heads, meta))
    return len(ready)


def _copied(file: Path, target: Path) -> bool:
    if not file.exists():
        return False
    with artifacts.atomic(target) as temporary:
        shutil.copy2(file, temporary)
    return True
