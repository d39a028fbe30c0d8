"""What a call of comp train will do: the resolved config, the name of the run, its seeds and folds, and the
command that resumes it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from comp.engine.config import experiments, resolve, run_members
from comp.engine.config.experiments import Fold
from comp.engine.config.resolve import Loaded
from comp.engine.config.schema import Config
from comp.engine.errors import UserError
from comp.engine.run import fingerprint
from comp.engine.store import paths


@dataclass(frozen=True)
class Plan:
    loaded: Loaded
    name: str  # of the run
    command: str  # resumes the run
    seeds: list[int]
    fold: str | None  # of --fold; None: all folds
    replaced: list[Path]  # folders of --fresh, which move to the trash

    @property
    def cfg(self) -> Config:
        return self.loaded.config

    @property
    def refit(self) -> bool:
        return self.fold == run_members.REFIT

    def todo(self, count: int) -> list[tuple[int, Fold]]:
        """(seed, fold) of `count` folds, finished ones included."""
        if self.fold is None:
            folds: list[Fold] = list(range(count))
        elif self.refit:
            folds = [self.fold]
        elif self.fold.isdigit() and int(self.fold) < count:
            folds = [int(self.fold)]
        else:
            what = f"no such fold; there are folds 0 to {count - 1}, and full"
            raise UserError("fold-unknown", where=f"--fold {self.fold}", what=what)
        return [(seed, fold) for seed in self.seeds for fold in folds]


def make(
    experiment: str,
    overrides: list[str],
    *,
    fold: str | None = None,
    seed: int | None = None,
    name: str | None = None,
    fresh: bool = False,
    debug: bool = False,
    any_seed: bool = False,
) -> Plan:
    """`any_seed`: `seed` need not be one of train.seeds."""
    loaded = experiments.load(experiment, overrides, debug, claimed=name or experiment)
    if name is None and (changed := resolve.changes_results(overrides)):
        what = "changes results, so it is another run"
        raise UserError("name-missing", where=" ".join(changed), what=what, remedy="name it with --as NAME")
    command = _resume_command(experiment, overrides, name, debug)
    run = name or (f"{experiment}{run_members.DEBUG}" if debug else experiment)
    declared = loaded.config.train.seeds
    if seed is not None and not any_seed and seed not in declared:
        more = f"train.seeds={[*declared, seed]}".replace(" ", "")
        raise UserError(
            "seed-unknown",
            where=f"--seed {seed}",
            key="train.seeds",
            what=f"is {declared}, without {seed}",
            remedy=f"add {more}, here or in the config",
        )
    seeds = declared if seed is None else [seed]
    replaced = []
    if fresh or run.endswith(run_members.DEBUG):
        replaced = [paths.run_folder(run)]
        if fold is not None:
            replaced = [paths.fold_folder(run, s, int(fold) if fold.isdigit() else fold) for s in seeds]
    return Plan(loaded, run, command, seeds, fold, replaced)


def _resume_command(experiment: str, overrides: list[str], name: str | None, debug: bool) -> str:
    """A run without a file in configs/ is resumed by the command that started it."""
    has_file = paths.path("configs", f"{experiment}.yaml").exists()
    if name in (None, experiment) and not debug and not has_file:
        started = shlex.split(fingerprint.resume_command(experiment))
        return shlex.join([*started, *(each for each in overrides if each not in started)])
    flags = [*(["--as", name] if name else []), *(["--debug"] if debug else [])]
    return shlex.join(["comp", "train", experiment, *flags, *overrides])


def unfinished(run: str, todo: list[tuple[int, Fold]]) -> list[tuple[int, Fold]]:
    return [(seed, fold) for seed, fold in todo if not experiments.finished_folds(run, seed, [fold])]
