"""From folds and seeds to members: runs/<exp>/{oof,test}.arrow, runs/<exp>/members/<member>/…, and the run's score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comp import bank, members, predictions, score, store
from comp.config import Config
from comp.folds import Folds
from comp.samples import Samples

Number = int | str  # of a fold, or full


def finished(experiment: str, seed: int, folds: list[Number]) -> list[Number]:
    """The folds of a seed whose predictions are all there."""
    kinds = {fold: ("test",) if fold == "full" else ("oof", "test") for fold in folds}
    place = {fold: store.fold_folder(experiment, seed, fold) for fold in folds}
    return [
        fold for fold in folds if all(store.sealed(place[fold] / f"{kind}.arrow") for kind in kinds[fold])
    ]


def seeds_of(experiment: str) -> list[int]:
    """Every seed that was ever started, whatever train.seeds says now."""
    return sorted(
        int(folder.name.removeprefix("seed")) for folder in store.run_folder(experiment).glob("seed*")
    )


def missing(experiment: str, cfg: Config, folds: Folds) -> str:
    everything: list[Number] = list(range(folds.count))
    gaps = {
        seed: [f for f in everything if f not in finished(experiment, seed, everything)]
        for seed in cfg.train.seeds
    }
    return (
        "; ".join(f"seed {seed} fold {', '.join(map(str, gap))}" for seed, gap in gaps.items() if gap)
        or "another seed"
    )


def run(experiment: str, cfg: Config, samples: Samples, folds: Folds) -> dict[str, Any] | None:
    """Merge what is complete: the run over its seeds, each seed where there are several, the refit on all data."""
    everything: list[Number] = list(range(folds.count))
    complete = [
        seed for seed in seeds_of(experiment) if len(finished(experiment, seed, everything)) == folds.count
    ]
    refits = [seed for seed in seeds_of(experiment) if finished(experiment, seed, ["full"])]
    if refits:
        member(experiment, "full", cfg, samples, folds, [(seed, "full") for seed in refits])
    if not complete:
        return None
    if len(complete) > 1:
        for seed in complete:
            member(experiment, f"seed{seed}", cfg, samples, folds, [(seed, fold) for fold in everything])
    parts = [(seed, fold) for seed in complete for fold in everything]
    for name, inside in members.merged(cfg).items():
        if all(
            store.sealed(place / each / "test.arrow")
            for place in _places(experiment, parts)
            for each in inside
        ):
            member(experiment, name, cfg, samples, folds, parts, inside)
    return member(experiment, "", cfg, samples, folds, parts)


def member(
    experiment: str,
    name: str,
    cfg: Config,
    samples: Samples,
    folds: Folds,
    parts: list[tuple[int, Number]],
    inside: Sequence[str] = ("",),
) -> dict[str, Any]:
    """Average the predictions of (seed, fold) parts. `inside` are folders within each fold's, for other views or weights.

    Killed half-way, the next call writes the same bytes over what is there.
    """
    folder = store.member_folder(experiment, name) if name else store.run_folder(experiment)
    places = [store.fold_folder(experiment, seed, fold) / each for each in inside for seed, fold in parts]
    facts = {"run": experiment, "member": name, "space": cfg.predict.space}
    kinds = ("test",) if all(fold == "full" for _, fold in parts) else ("oof", "test")
    # A damaged part is refused before anything of what stood there goes.
    read = {kind: [bank.read(place / f"{kind}.arrow", samples, folds) for place in places] for kind in kinds}
    # Old and new must not be read together: after a kill nothing of this member counts until it is all written again.
    for old in ("oof.arrow", "test.arrow", "score.json"):
        store.unseal(folder / old)
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


def _places(experiment: str, parts: list[tuple[int, Number]]) -> list[Path]:
    return [store.fold_folder(experiment, seed, fold) for seed, fold in parts]


def optimism(experiment: str, name: str, parts: list[tuple[int, Number]]) -> dict[str, float | None]:
    """By how much choosing on the scored rows flatters a member: the mean over its folds."""
    files = [place / "optimism.json" for place in _places(experiment, parts)]
    key = name if name == "greedy" else ""
    known = [value for file in files if (value := store.read_json(store.verified(file)).get(key)) is not None]
    return {"optimism": float(np.mean(known)) if known else None}


def tell(experiment: str, name: str = "") -> None:
    """The last lines of a verb: the score, where it lies, what to do next."""
    folder = store.member_folder(experiment, name) if name else store.run_folder(experiment)
    address = f"{experiment}:{name}" if name else experiment
    print(f"{address}: {score.sentence(store.read_json(store.verified(folder / 'score.json')))}")
    print(f"written: {store.shown(folder)}/oof.arrow, test.arrow, score.json")
    print(f"next: comp submit {address} --dry-run, or blend it: comp ensemble blend001")
