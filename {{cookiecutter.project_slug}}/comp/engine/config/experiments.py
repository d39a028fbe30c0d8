"""What a name stands for: an experiment of configs/, or a run; its config, and which of its folds are missing.

configs/NAME.yaml is the source where there is one. A run that was begun with --as NAME has none: then its own resolved
runs/NAME/config.yaml is. Where both exist and differ, the experiment is used and one line says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from comp.engine.config import resolve, run_members
from comp.engine.config.resolve import Loaded, nearest
from comp.engine.config.schema import Config
from comp.engine.errors import Refused, UserError
from comp.engine.store import artifacts, paths

Fold = int | str  # an index, or "full"
NOT_EXPERIMENTS = ("base", "competition", "debug")


def load(name: str, overrides: Iterable[str] = (), debug: bool = False, claimed: str | None = None) -> Loaded:
    """The config of an experiment or a run. `claimed` is the run that is going to be trained by it, whose own config
    identity.claim compares."""
    file = paths.run_folder(name) / "config.yaml"
    if not paths.path("configs", f"{name}.yaml").is_file():
        if artifacts.manifest_entry(file):
            return resolve.load(paths.root(), name, overrides, debug, artifacts.verified(file))
        raise Refused(
            f"{name}: there is no configs/{name}.yaml and no run of that name; {_nearest_names(name)}"
        )
    if name != claimed and artifacts.manifest_entry(file):
        _print_difference(name, file, artifacts.stamp(file))
    return resolve.load(paths.root(), name, overrides, debug)


@cache  # once a process and file
def _print_difference(name: str, file: Path, stamp: artifacts.Stamp | None) -> None:
    own = f"configs/{name}.yaml"
    try:
        there = resolve.from_yaml(artifacts.verified(file))
    except UserError as refused:
        print(f"{refused.lines[0]}; {own} is used", file=sys.stderr)
        return
    if changed := resolve.diff(there, resolve.load(paths.root(), name).config):
        key, (before, after) = next(iter(changed.items()))
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        print(
            f"runs/{name} was trained with another config ({key}: {before!r} there, {after!r} in {own}{more}); {own} is used",
            file=sys.stderr,
        )


def _nearest_names(name: str) -> str:
    own = [file.stem for file in paths.path("configs").glob("*.yaml")]
    known = sorted({*own, *runs()} - {*NOT_EXPERIMENTS, name})
    return f"the nearest are {', '.join(nearest(name, known, 3))}" if known else "there are none yet"


def runs() -> list[str]:
    """Every run that was begun and whose config is known."""
    folders = sorted(paths.path("runs").glob("*"))
    return [
        each.name
        for each in folders
        if each.name[0] != "." and artifacts.manifest_entry(each / "config.yaml")
    ]


def stored_config(name: str) -> Config:
    """The resolved config that a run carries."""
    file = paths.run_folder(name) / "config.yaml"
    if not file.exists():
        raise Refused(why_missing(name, "run") or f"{name}: no such run; {_nearest_names(name)}")
    return resolve.from_yaml(artifacts.verified(file, "see comp runs for what there is"))


# --- folds ---------------------------------------------------------------------------------------------------------------


def fold_count(cfg: Config) -> int:
    """Of folds."""
    return cfg.competition.folds.k * cfg.competition.folds.repeats


def finished_folds(
    run: str, seed: int, folds: Iterable[Fold], wanted: Iterable[str] = ("oof", "test")
) -> list[Fold]:
    """The folds of a seed whose predictions (`wanted`) are all there. A refit has test predictions alone."""
    kinds = {fold: ("test",) if fold == run_members.REFIT else tuple(wanted) for fold in folds}
    place = {fold: paths.fold_folder(run, seed, fold) for fold in kinds}
    return [
        fold
        for fold in kinds
        if all(artifacts.manifest_entry(place[fold] / f"{kind}.arrow") for kind in kinds[fold])
    ]


def seeds(run: str) -> list[int]:
    """Every seed that was ever started, whatever train.seeds says now."""
    return sorted(int(folder.name.removeprefix("seed")) for folder in paths.run_folder(run).glob("seed*"))


def complete_seeds(run: str, folds: int) -> list[int]:
    """The seeds of which every fold is there."""
    return [seed for seed in seeds(run) if len(finished_folds(run, seed, range(folds))) == folds]


def refit_seeds(run: str) -> list[int]:
    """The seeds of which the refit on all rows is there."""
    return [seed for seed in seeds(run) if finished_folds(run, seed, [run_members.REFIT])]


def missing_folds(run: str, cfg: Config, folds: int) -> str:
    """seed 0 fold 1, 2; seed 1 fold 4"""
    gaps = {
        seed: [f for f in range(folds) if f not in finished_folds(run, seed, range(folds))]
        for seed in cfg.train.seeds
    }
    return "; ".join(f"seed {seed} fold {', '.join(map(str, gap))}" for seed, gap in gaps.items() if gap)


def why_missing(address: str, what: str) -> str:
    """Why something known by name has no such predictions, and the command that makes them; empty for a name that is unknown."""
    run, _, member = address.partition(":")
    if paths.path("configs", "ensembles", f"{run}.yaml").is_file() and not member:
        return f"{address}: has no {what} yet: comp ensemble {run}"
    if artifacts.manifest_entry(paths.run_folder(run) / "config.yaml"):
        return _why_unfinished(address, stored_config(run), what)
    if paths.path("configs", f"{run}.yaml").is_file() and run not in NOT_EXPERIMENTS:
        cfg = resolve.load(paths.root(), run).config
        if member == run_members.REFIT:
            return f"{address}: was never trained, fold full missing: comp train {run} --fold full"
        return f"{address}: was never trained, {missing_folds(run, cfg, fold_count(cfg))} missing: comp train {run}"
    return ""


def missing_predictions(address: str, what: str) -> Refused:
    """The same where it is known that something is missing."""
    run = address.partition(":")[0]
    return Refused(
        why_missing(address, what)
        or f"{address}: has no {what} on the folds of now: comp train {run} --fresh"
    )


def _why_unfinished(address: str, cfg: Config, what: str) -> str:
    run, _, member = address.partition(":")
    known = not member or member in run_members.extra_members(cfg) or member.startswith("seed")
    if run_members.is_refit(member):
        known = member in map(run_members.refit_member, ("", *run_members.extra_members(cfg)))
        if known and not refit_seeds(run):
            return f"{address}: has no {what} yet, fold full missing: comp train {run} --fold full"
    elif known and (gaps := missing_folds(run, cfg, fold_count(cfg))):
        refit = f" ({run}:{run_members.REFIT} is there)" if refit_seeds(run) else ""
        return f"{address}: has no {what} yet, {gaps} missing: comp train {run}{refit}"
    if known and not any(paths.run_folder(run).glob("*.arrow")):
        return f"{address}: has no {what} yet, its folds are there and not merged: comp predict {run}"
    return ""
