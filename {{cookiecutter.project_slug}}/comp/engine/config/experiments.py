"""Looks up an experiment or a run by name: its config, and which of its folds are finished or missing.

configs/NAME.yaml is used if it exists. A run that was trained with --as NAME has no such file; then its own
resolved runs/NAME/config.yaml is used. If both exist and differ, configs/NAME.yaml is used and one line on
stderr says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from comp.engine.config import resolve, run_members
from comp.engine.config.resolve import Loaded, nearest
from comp.engine.config.schema import Config
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

Fold = int | str  # an index, or "full"
NOT_EXPERIMENTS = ("base", "competition", "debug")


def load(name: str, overrides: Iterable[str] = (), debug: bool = False, claimed: str | None = None) -> Loaded:
    """Returns the config of an experiment or a run. `claimed`: the run that is about to be trained; its
    config is compared by fingerprint.claim, not here."""
    file = paths.run_folder(name) / "config.yaml"
    if not paths.path("configs", f"{name}.yaml").is_file():
        if artifacts.manifest_entry(file):
            return resolve.load(paths.root(), name, overrides, debug, artifacts.verified(file))
        what = f"there is no configs/{name}.yaml and no run of that name"
        raise UserError("experiment-unknown", where=name, what=what, remedy=_nearest_names(name))
    if name != claimed and artifacts.manifest_entry(file):
        _print_difference(name, file, artifacts.stamp(file))
    return resolve.load(paths.root(), name, overrides, debug)


@cache  # printed once per process and version of the file
def _print_difference(name: str, file: Path, stamp: artifacts.Stamp | None) -> None:
    experiment = f"configs/{name}.yaml"
    try:
        trained = resolve.from_yaml(artifacts.verified(file))
    except UserError as error:
        print(f"{error.lines[0]}; {experiment} is used", file=sys.stderr)
        return
    if changed := resolve.diff(trained, resolve.load(paths.root(), name).config):
        key, (before, after) = next(iter(changed.items()))
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        print(
            f"runs/{name} was trained with another config ({key}: {before!r} there, "
            f"{after!r} in {experiment}{more}); {experiment} is used",
            file=sys.stderr,
        )


def _nearest_names(name: str) -> str:
    experiments = [file.stem for file in paths.path("configs").glob("*.yaml")]
    known = sorted({*experiments, *runs()} - {*NOT_EXPERIMENTS, name})
    return f"the nearest are {', '.join(nearest(name, known, 3))}" if known else "there are none yet"


def runs() -> list[str]:
    """Names of all runs that were started, sorted."""
    folders = sorted(paths.path("runs").glob("*"))
    return [
        folder.name
        for folder in folders
        if folder.name[0] != "." and artifacts.manifest_entry(folder / "config.yaml")
    ]


def stored_config(name: str) -> Config:
    """The resolved config of a run."""
    file = paths.run_folder(name) / "config.yaml"
    if not file.exists():
        error = _missing(name, "run")
        raise error or UserError("run-unknown", where=name, what="no such run", remedy=_nearest_names(name))
    return resolve.from_yaml(artifacts.verified(file, "comp runs lists the runs"))


# --- folds --------------------------------------------------------------------------------------------------


def fold_count(cfg: Config) -> int:
    return cfg.competition.folds.k * cfg.competition.folds.repeats


def finished_folds(
    run: str, seed: int, folds: Iterable[Fold], wanted: Iterable[str] = ("oof", "test")
) -> list[Fold]:
    """Which of the folds have the predictions in `wanted`. The refit on all rows has no OOF predictions."""
    kinds = {fold: ("test",) if fold == run_members.REFIT else tuple(wanted) for fold in folds}
    folders = {fold: paths.fold_folder(run, seed, fold) for fold in kinds}
    return [
        fold
        for fold in kinds
        if all(artifacts.manifest_entry(folders[fold] / f"{kind}.arrow") for kind in kinds[fold])
    ]


def seeds(run: str) -> list[int]:
    """Every seed that was started, even if train.seeds has changed since."""
    return sorted(int(folder.name.removeprefix("seed")) for folder in paths.run_folder(run).glob("seed*"))


def complete_seeds(run: str, folds: int) -> list[int]:
    """The seeds with all folds finished."""
    return [seed for seed in seeds(run) if len(finished_folds(run, seed, range(folds))) == folds]


def refit_seeds(run: str) -> list[int]:
    """The seeds with a finished refit on all rows."""
    return [seed for seed in seeds(run) if finished_folds(run, seed, [run_members.REFIT])]


def missing_folds(run: str, cfg: Config, folds: int) -> str:
    """For messages: `seed 0 fold 1, 2; seed 1 fold 4`."""
    gaps = {
        seed: [fold for fold in range(folds) if fold not in finished_folds(run, seed, range(folds))]
        for seed in cfg.train.seeds
    }
    return "; ".join(f"seed {seed} fold {', '.join(map(str, gap))}" for seed, gap in gaps.items() if gap)


def why_missing(address: str, what: str) -> str:
    """Why a run, member or ensemble has no such predictions, and the command that makes them. Empty if there
    is nothing of that name."""
    return str(_missing(address, what) or "")


def missing_predictions(address: str, what: str) -> UserError:
    """The error for predictions that do not exist."""
    run = address.partition(":")[0]
    return _missing(address, what) or UserError(
        "predictions-missing",
        where=address,
        what=f"has no {what} on the current folds",
        remedy=f"comp train {run} --fresh",
    )


def _missing(address: str, what: str) -> UserError | None:
    run, _, member = address.partition(":")
    reason = command = ""
    if paths.path("configs", "ensembles", f"{run}.yaml").is_file() and not member:
        reason, command = f"has no {what} yet", f"comp ensemble {run}"
    elif artifacts.manifest_entry(paths.run_folder(run) / "config.yaml"):
        reason, command = _unfinished(run, member, stored_config(run), what)
    elif paths.path("configs", f"{run}.yaml").is_file() and run not in NOT_EXPERIMENTS:
        cfg = resolve.load(paths.root(), run).config
        reason, command = (
            f"was never trained, {missing_folds(run, cfg, fold_count(cfg))} missing",
            f"comp train {run}",
        )
        if member == run_members.REFIT:
            reason, command = "was never trained, fold full missing", f"comp train {run} --fold full"
    if not reason:
        return None
    return UserError("predictions-missing", where=address, what=reason, remedy=command)


def _unfinished(run: str, member: str, cfg: Config, what: str) -> tuple[str, str]:
    """Reason and command for a run that was started; empty where its config has no such member."""
    members = run_members.extra_members(cfg)
    known = not member or member in members or member.startswith("seed")
    if run_members.is_refit(member):
        known = member in map(run_members.refit_member, ("", *members))
        if known and not refit_seeds(run):
            return f"has no {what} yet, fold full missing", f"comp train {run} --fold full"
    elif known and (gaps := missing_folds(run, cfg, fold_count(cfg))):
        refit = f" ({run}:{run_members.REFIT} exists)" if refit_seeds(run) else ""
        return f"has no {what} yet, {gaps} missing{refit}", f"comp train {run}"
    if known and not any(paths.run_folder(run).glob("*.arrow")):
        return f"has no {what} yet, its folds are trained but not merged", f"comp predict {run}"
    return "", ""
