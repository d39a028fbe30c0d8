"""From folds and seeds to members: runs/<exp>/{oof,test}.arrow, runs/<exp>/members/<member>/…, and the run's score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comp.engine.bank import bank, predictions, score
from comp.engine.config import experiments, run_members
from comp.engine.config.experiments import Number
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.store import artifacts, paths

Part = tuple[int, Number]  # seed, fold


def merge_run(experiment: str, cfg: Config, samples: Samples, folds: Folds) -> dict[str, Any] | None:
    """Merge what is complete: the run over its seeds, each seed where there are several, the refit on all rows, and of both the
    kept weights."""
    refits: list[Part] = [(seed, run_members.REFIT) for seed in experiments.refitted(experiment)]
    if refits:
        _merge_weight_sets(experiment, cfg, samples, folds, refits, run_members.refit)
        merge_member(experiment, run_members.REFIT, cfg, samples, folds, refits)
    complete = experiments.complete(experiment, folds.count)
    if not complete:
        return None
    if len(complete) > 1:
        for seed in complete:
            one: list[Part] = [(seed, fold) for fold in range(folds.count)]
            merge_member(experiment, f"seed{seed}", cfg, samples, folds, one)
    parts: list[Part] = [(seed, fold) for seed in complete for fold in range(folds.count)]
    _merge_weight_sets(experiment, cfg, samples, folds, parts, str)
    return merge_member(experiment, "", cfg, samples, folds, parts)


def _merge_weight_sets(
    experiment: str,
    cfg: Config,
    samples: Samples,
    folds: Folds,
    parts: list[Part],
    named: Callable[[str], str],
) -> None:
    places = _places(experiment, parts)
    for name, inside in run_members.merged(cfg).items():
        if all(artifacts.manifest_entry(place / each / "test.arrow") for place in places for each in inside):
            merge_member(experiment, named(name), cfg, samples, folds, parts, inside)


def merge_member(
    experiment: str,
    name: str,
    cfg: Config,
    samples: Samples,
    folds: Folds,
    parts: list[Part],
    inside: Sequence[str] = ("",),
) -> dict[str, Any]:
    """Average the predictions of (seed, fold) parts. `inside` are folders within each fold's, for other views or weights.

    Killed half-way, the next call writes the same bytes over what is there.
    """
    folder = paths.member_folder(experiment, name) if name else paths.run_folder(experiment)
    places = [paths.fold_folder(experiment, seed, fold) / each for each in inside for seed, fold in parts]
    facts = {"run": experiment, "member": name, "space": cfg.predict.space}
    kinds = ("test",) if all(fold == run_members.REFIT for _, fold in parts) else ("oof", "test")
    # A damaged part is refused before anything of what stood there goes.
    read = {kind: [bank.read(place / f"{kind}.arrow", samples, folds) for place in places] for kind in kinds}
    # Old and new must not be read together: after a kill nothing of this member counts until it is all written again.
    for old in ("oof.arrow", "test.arrow", "score.json"):
        artifacts.remove_from_manifest(folder / old)
    for kind, sets in read.items():
        bank.write(
            folder / f"{kind}.arrow", predictions.merge(sets, samples, folds, cfg.predict.space, facts=facts)
        )
        if kind == "oof":
            oof = bank.read(folder / "oof.arrow", samples, folds)
            flattered = (
                {} if "selected_on_fold" not in oof.meta["marks"] else optimism(experiment, name, parts)
            )
            result = score.write(folder, cfg, samples, folds, oof, **flattered)
    return result if (folder / "oof.arrow").exists() else {}


def _places(experiment: str, parts: list[Part]) -> list[Path]:
    return [paths.fold_folder(experiment, seed, fold) for seed, fold in parts]


def optimism(experiment: str, name: str, parts: list[Part]) -> dict[str, float | None]:
    """By how much choosing on the scored rows flatters a member: the mean over its folds."""
    files = [place / "optimism.json" for place in _places(experiment, parts)]
    key = name if name == "greedy" else ""
    known = [
        value
        for file in files
        if (value := artifacts.read_json(artifacts.verified(file)).get(key)) is not None
    ]
    return {"optimism": float(np.mean(known)) if known else None}


def print_result(experiment: str, name: str = "") -> None:
    """The last lines of a verb: the score, where it lies, what to do next."""
    folder = paths.member_folder(experiment, name) if name else paths.run_folder(experiment)
    address = f"{experiment}:{name}" if name else experiment
    print(f"{address}: {describe_cv(address)}")
    if run_members.is_refit(name):
        print(f"written: {paths.relative(folder)}/test.arrow\nnext: comp submit {address} --dry-run")
        return
    print(f"written: {paths.relative(folder)}/oof.arrow, test.arrow, score.json")
    print(f"next: comp submit {address} --dry-run, or blend it: comp ensemble blend001")


def describe_cv(address: str) -> str:
    """What is known of its score. A refit on all rows has none of its own: that of the same member of the CV stands for it."""
    same = run_members.of_cv(address)
    file = bank.folder(same) / "score.json"
    if artifacts.manifest_entry(file):
        of = f"trained on all rows; the CV of {same}: " if same != address else ""
        return of + score.summary(artifacts.read_json(artifacts.verified(file)))
    why = experiments.absent(same, "CV") or f"{same}: has no CV yet: comp bank lists what there is"
    return f"trained on all rows; no CV ({why})"
