"""comp tune --export NAME: a trial becomes configs/NAME.yaml, with the knobs that it changes, and runs/NAME,
with the folds that it has trained."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from comp.engine.bank import bank
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import resolve, run_members, yaml_lines
from comp.engine.data import folds, samples
from comp.engine.errors import UserError
from comp.engine.run import fingerprint
from comp.engine.store import artifacts, paths
from comp.engine.tune.study import OpenStudy, setting_of

WEIGHTS = "weights.safetensors"
FOLD_FILES = (WEIGHTS, "log.jsonl", "code.diff")


def export(opened: OpenStudy, name: str, number: int | None) -> None:
    """`number`: the trial (default: the best)."""
    file = paths.path("configs", f"{name}.yaml")
    if not fingerprint.NAME.fullmatch(name):
        raise UserError(
            "name-invalid", where=f"--export {name!r}", what="a name consists of letters, digits, _, - and ."
        )
    for existing in (file, paths.run_folder(name)):
        if existing.exists():
            raise UserError(
                "name-taken",
                where=f"--export {name}",
                what=f"{paths.relative(existing)} exists already",
                remedy="use another name",
            )
    trial = _select(opened, number)
    base = opened.experiment if paths.path("configs", f"{opened.experiment}.yaml").exists() else "base"
    inherited = resolve.flatten(resolve.load(paths.root(), base).config.model_dump())
    values = resolve.flatten(opened.cfg.model_dump()) | setting_of(opened.space, trial)
    changed = {
        k: v for k, v in values.items() if inherited.get(k) != v and resolve.changes_results([f"{k}="])
    }
    text = _header(opened, trial, name) + f"base: {base}\n\n"
    artifacts.write_text(file, text + (yaml_lines.dump(_nested(changed)) if changed else ""))
    print(f"written: {paths.relative(file)}, {len(changed)} knobs of {base} changed")
    copied = _copy_folds(opened, trial, name)
    n_folds = opened.cfg.competition.folds.k * opened.cfg.competition.folds.repeats
    if copied:
        print(
            f"written: {paths.relative(paths.run_folder(name))}, {copied} of {n_folds} folds trained already"
        )
    else:
        print("its weights are not on this machine any more, so its folds will be trained again")
    print(f"next: comp train {name}")


def _select(opened: OpenStudy, number: int | None) -> FrozenTrial:
    completed = opened.ranked()
    if not completed:
        raise UserError("study-empty", where=opened.name, what="no trial is complete yet")
    if number is None:
        return completed[0]
    found = next((t for t in completed if t.number == number), None)
    if found is None:
        best = ", ".join(str(t.number) for t in completed[:10])
        raise UserError(
            "trial-unknown",
            where=f"--trial {number}",
            what=f"not a completed trial of {opened.name}; the best are {best}",
        )
    return found


def _header(opened: OpenStudy, trial: FrozenTrial, name: str) -> str:
    origin = f"trial {trial.number} of {len(opened.study.trials)} in study {opened.name}"
    return (
        f"# Hypothesis  {origin} is better than {opened.experiment}\n"
        f"# Command     comp train {name}\n"
        f"# Expected    {trial.user_attrs['result']['text']}, as the best of a search: a little optimistic\n"
        f"# Result      CV        LB\n"
        f"# From        {opened.command}, {time.strftime('%Y-%m-%d')}\n"
    )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, knob = key.partition(".")
        tree.setdefault(section, {})[knob] = value
    return tree


def _copy_folds(opened: OpenStudy, trial: FrozenTrial, name: str) -> int:
    """Copy the finished folds into runs/NAME and return their number. comp train finds them done and adds the
    test rows."""
    cfg = resolve.load(paths.root(), name).config
    table = samples.load()
    split = folds.load(table)
    trial_run, seed = opened.run_name(trial), opened.cfg.train.seeds[0]
    sources = [(fold, paths.fold_folder(trial_run, seed, fold)) for fold in range(opened.n_folds)]
    finished = [
        (fold, source)
        for fold, source in sources
        if artifacts.manifest_entry(source / WEIGHTS) and artifacts.manifest_entry(source / "oof.arrow")
    ]
    if not finished:
        return 0
    fingerprint.validate_images(trial_run, cfg)
    fingerprint.claim(name, cfg, split, f"comp train {name}")
    for fold, source in finished:
        target = paths.fold_folder(name, seed, fold)
        target.mkdir(parents=True, exist_ok=True)
        for file in FOLD_FILES:
            _copy(source / file, target / file)
        for member in run_members.extra_weights(cfg):
            _copy(source / member / bank.WEIGHTS, target / member / bank.WEIGHTS)
            artifacts.add_to_manifest(target / member / bank.WEIGHTS)
        if _copy(source / "optimism.json", target / "optimism.json"):
            artifacts.add_to_manifest(target / "optimism.json")
        entry = artifacts.manifest_entry(source / WEIGHTS) or {}
        oof = bank.read(source / "oof.arrow", table, split)
        artifacts.verified(source / WEIGHTS)
        artifacts.add_to_manifest(target / WEIGHTS, log=entry["log"])
        meta = dict(oof.meta) | {"run": name, "weights": bank.weights_of(target)}
        bank.write(target / "oof.arrow", PredictionSet(oof.row, oof.fold, oof.heads, meta))
    return len(finished)


def _copy(source: Path, target: Path) -> bool:
    if not source.exists():
        return False
    with artifacts.atomic(target) as temporary:
        shutil.copy2(source, temporary)
    return True
