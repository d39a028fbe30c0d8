"""Predictions of folds and seeds averaged into those of a run and its members, with their scores.

Writes runs/<exp>/{oof,test}.arrow, score.json and runs/<exp>/members/<member>/…
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comp.engine.bank import bank, predictions, score
from comp.engine.config import experiments, resolve, run_members
from comp.engine.config.experiments import Fold
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

Part = tuple[int, Fold]  # seed, fold


def merge_folds(experiment: str, cfg: Config, samples: Samples, folds: Folds) -> dict[str, Any] | None:
    """Merge what is complete: the run over its seeds, each seed if there are several, the refit on all rows,
    and the extra weight sets (EMA, SWA, snapshots) of both."""
    refits: list[Part] = [(seed, run_members.REFIT) for seed in experiments.refit_seeds(experiment)]
    if refits:
        _merge_weight_sets(experiment, cfg, samples, folds, refits, run_members.refit_member)
        merge_member(experiment, run_members.REFIT, cfg, samples, folds, refits)
    complete = experiments.complete_seeds(experiment, folds.count)
    if not complete:
        return None
    if len(complete) > 1:
        for seed in complete:
            one_seed: list[Part] = [(seed, fold) for fold in range(folds.count)]
            merge_member(experiment, f"seed{seed}", cfg, samples, folds, one_seed)
    parts: list[Part] = [(seed, fold) for seed in complete for fold in range(folds.count)]
    _merge_weight_sets(experiment, cfg, samples, folds, parts, str)
    return merge_member(experiment, "", cfg, samples, folds, parts)


def _merge_weight_sets(
    experiment: str,
    cfg: Config,
    samples: Samples,
    folds: Folds,
    parts: list[Part],
    member_name: Callable[[str], str],
) -> None:
    places = _fold_folders(experiment, parts)
    for name, inside in run_members.extra_members(cfg).items():
        if all(artifacts.manifest_entry(place / sub / "test.arrow") for place in places for sub in inside):
            merge_member(experiment, member_name(name), cfg, samples, folds, parts, inside)


def merge_member(
    experiment: str,
    name: str,
    cfg: Config,
    samples: Samples,
    folds: Folds,
    parts: list[Part],
    inside: Sequence[str] = ("",),
) -> dict[str, Any]:
    """Average the predictions of (seed, fold) parts. inside: subfolders of each fold's folder, for extra
    weight sets.

    If it is killed halfway, the next call writes the same bytes.
    """
    folder = paths.member_folder(experiment, name) if name else paths.run_folder(experiment)
    places = [paths.fold_folder(experiment, seed, fold) / sub for sub in inside for seed, fold in parts]
    facts = {"run": experiment, "member": name, "space": cfg.predict.averaging_space}
    kinds = ("test",) if all(fold == run_members.REFIT for _, fold in parts) else ("oof", "test")
    # 1. Read everything first: a damaged part raises before anything is removed.
    read = {kind: [bank.read(place / f"{kind}.arrow", samples, folds) for place in places] for kind in kinds}
    # 2. Invalidate the old files: after a kill, none of this member's files counts until all are written
    # again.
    for old in ("oof.arrow", "test.arrow", "score.json"):
        artifacts.remove_from_manifest(folder / old)
    for kind, sets in read.items():
        bank.write(
            folder / f"{kind}.arrow",
            predictions.merge(sets, samples, folds, cfg.predict.averaging_space, facts=facts),
        )
        if kind == "oof":
            oof = bank.read(folder / "oof.arrow", samples, folds)
            selected = "selected_on_fold" in oof.meta["marks"]
            extra = optimism(experiment, name, parts) if selected else {}
            result = score.write(folder, cfg, samples, folds, oof, **extra)
    return result if (folder / "oof.arrow").exists() else {}


def _fold_folders(experiment: str, parts: list[Part]) -> list[Path]:
    return [paths.fold_folder(experiment, seed, fold) for seed, fold in parts]


def optimism(experiment: str, name: str, parts: list[Part]) -> dict[str, float | None]:
    """How much too good a score is because the epoch was chosen on the validation rows: the mean over the
    folds."""
    files = [folder / "optimism.json" for folder in _fold_folders(experiment, parts)]
    key = name if name == "greedy" else ""
    known = [
        value
        for file in files
        if (value := artifacts.read_json(artifacts.verified(file)).get(key)) is not None
    ]
    return {"optimism": float(np.mean(known)) if known else None}


def print_result(experiment: str, name: str = "") -> None:
    """The last lines of a command: the score, the files written, the next command."""
    folder = paths.member_folder(experiment, name) if name else paths.run_folder(experiment)
    address = f"{experiment}:{name}" if name else experiment
    print(f"{address}: {describe_cv(address)}")
    if run_members.is_refit(name):
        print(f"written: {paths.relative(folder)}/test.arrow\nnext: comp submit {address} --dry-run")
        return
    print(f"written: {paths.relative(folder)}/oof.arrow, test.arrow, score.json")
    if experiment.endswith(run_members.DEBUG):
        print(f"next: comp train {experiment.removesuffix(run_members.DEBUG)}")
    elif not run_members.is_auxiliary(experiment):  # comp compare and comp seed-noise print a table
        blend = _blend_of(address)
        print(f"next: comp submit {address} --dry-run" + (f", or comp ensemble {blend}" if blend else ""))


def _blend_of(address: str) -> str | None:
    """The first configs/ensembles/*.yaml that lists this member and others, if all of them are predicted."""
    for file in sorted(paths.path("configs", "ensembles").glob("*.yaml")):
        try:
            members = resolve.parse(file, file.name)[0].get("members")
        except UserError:  # comp ensemble reports it; here it is only a file that is not suggested
            continue
        if not isinstance(members, list) or len(members) < 2 or address not in members:
            continue
        if all(artifacts.manifest_entry(bank.folder(str(name)) / "test.arrow") for name in members):
            return file.stem
    return None


def _averaged_seeds(address: str) -> int:
    """Number of seeds whose predictions a run or member averages; 1 for an ensemble."""
    run, weights = address.partition(":")[0], bank.read_meta(bank.find(address, "oof"))["weights"]
    return max(1, len({name.split("/")[1] for name in weights if name.startswith(f"{run}/")}))


def describe_cv(address: str) -> str:
    """The CV score in words. A refit on all rows has none; the score of the same member of the CV is given
    instead."""
    same = run_members.cv_address(address)
    file = bank.folder(same) / "score.json"
    if artifacts.manifest_entry(file):
        prefix = f"trained on all rows; the CV of {same}: " if same != address else ""
        return prefix + score.summary(artifacts.read_json(artifacts.verified(file)), _averaged_seeds(same))
    reason = experiments.why_missing(same, "CV") or f"{same}: has no CV yet: comp bank lists what there is"
    return f"trained on all rows; no CV ({reason})"
