"""Teachers of distillation and pseudo-labels: the models of a run, of a member of it, or of a plain average
of several, fold by fold.

The model of fold k was not trained on the rows that fold k scores, so its predictions may be targets in fold
k, and in no other fold. A teacher therefore needs a model of its own for each fold, and none that was fitted
or selected on validation rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from comp.engine.bank import bank, predictions
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import experiments, resolve, run_members
from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

UNFITTED = ("mean", "weighted", "geometric", "snapshots")  # ensemble methods that use no labels


class Teacher(NamedTuple):
    """One run or member, and its weight in the average."""

    address: str
    run: str
    cfg: Config
    seed: int | None  # None: all seeds of the run
    members: tuple[str, ...]  # folders within that of a fold; "": the run itself
    weight: float

    def folders(self, fold: int | str, folds: Folds) -> list[Path]:
        """Folders of the models that may be teachers of a fold: of the same fold, or of all folds for the
        refit, which scores no rows."""
        indices = range(folds.count) if fold == "full" else [int(fold)]
        run = paths.run_folder(self.run)
        seeds = sorted(run.glob("seed*")) if self.seed is None else [run / f"seed{self.seed}"]
        return [seed / f"fold{i}" / member for seed in seeds for i in indices for member in self.members]

    def covers(self, files: list[Path], fold: int | str, folds: Folds) -> bool:
        """Whether there are files of the fold, or of every fold for the refit."""
        depth = len(paths.run_folder(self.run).parts) + 1  # of "fold0" in runs/<run>/seed0/fold0/…
        return len({file.parts[depth] for file in files}) >= (folds.count if fold == "full" else 1)


class TeacherEnsemble(NamedTuple):
    name: str
    teachers: list[Teacher]
    space: str  # in which predictions are averaged


def validate(cfg: Config, folds: Folds) -> None:
    """Before anything is trained: the teacher of distillation must exist and suit the folds."""
    if cfg.distill.teacher is not None:
        load(cfg.distill.teacher, folds, "distill.teacher")


def load(name: str, folds: Folds, key: str) -> TeacherEnsemble:
    """The teachers that a run or ensemble stands for. `key`: the knob or verb that names it, for errors."""
    folder = paths.ensemble_folder(name)
    if not (folder / "apply.json").exists():
        return TeacherEnsemble(name, [_teacher(name, 1.0, folds, key)], "probability")
    recipe, record = (
        artifacts.read_json(artifacts.verified(folder / f"{each}.json", f"comp ensemble {name}"))
        for each in ("apply", "score")
    )
    if record["method"] not in UNFITTED or "after" in recipe or "correct" in recipe:
        raise UserError(
            "teacher-leaks",
            key=key,
            what=f"{name} is fitted ({record['method']}) on the labels of all folds, which would leak into "
            "the targets",
            remedy=f"name a run, or an ensemble of method {', '.join(UNFITTED)}",
        )
    if nested := [each["address"] for each in recipe["members"] if "recipe" in each]:
        raise UserError(
            "teacher-nested",
            key=key,
            what=f"{name}: its member {nested[0]} is an ensemble itself",
            remedy="list the runs of that one instead",
        )
    teachers = [_teacher(each["address"], float(each["weight"]), folds, key) for each in recipe["members"]]
    return TeacherEnsemble(name, teachers, recipe["space"])


def _teacher(address: str, weight: float, folds: Folds, key: str) -> Teacher:
    run, _, member = address.partition(":")
    folder = paths.run_folder(run)
    if not artifacts.manifest_entry(folder / "config.yaml"):
        _raise_absent(address, key)
        known = experiments.runs()
        closest = f"the nearest are {', '.join(nearest(run, known, 3))}" if known else "there are no runs yet"
        raise UserError(
            "teacher-unknown", key=key, what=f"{address}: no such run or ensemble", remedy=closest
        )
    cfg = resolve.from_yaml(artifacts.verified(folder / "config.yaml"))
    _validate_data(run, folds, key)
    if run_members.is_refit(member):
        raise UserError(
            "teacher-leaks",
            key=key,
            what=f"{address} was trained on the rows of every fold",
            remedy=f"take {run_members.cv_address(address)}",
        )
    seed = int(member.removeprefix("seed")) if member.removeprefix("seed").isdigit() else None
    members = (
        ("",)
        if not member or seed is not None
        else tuple(run_members.extra_members(cfg).get(member, [member]))
    )
    if not any(folder.glob(f"seed{'*' if seed is None else seed}/fold*/{members[0]}")):
        _raise_absent(address, key)
        known = [f"{run}:{each}" for each in run_members.extra_members(cfg)] or [run]
        raise UserError(
            "teacher-unknown",
            key=key,
            what=f"{address}: no such member",
            remedy=f"the nearest is {nearest(address, known)[0]}",
        )
    if selected := [each for each in members if run_members.marks(cfg, each)]:
        raise UserError(
            "teacher-leaks",
            key=key,
            what=f"{run}{':' if selected[0] else ''}{selected[0]} is selected_on_fold: "
            "each model was selected on the validation rows of its fold",
            remedy="train it with select.on: inner",
        )
    return Teacher(address, run, cfg, seed, members, weight)


def _raise_absent(address: str, key: str) -> None:
    """The error for what is declared but not trained yet, with the command that makes it."""
    if why := experiments.why_missing(address, "predictions"):
        raise UserError("predictions-missing", key=key, what=why)


def _validate_data(run: str, folds: Folds, key: str) -> None:
    made = artifacts.read_json(artifacts.verified(paths.run_folder(run) / "inputs.json"))
    if made["samples"] != folds.samples.hash:
        raise UserError(
            "run-outdated",
            where=f"runs/{run}",
            key=key,
            what="trained on another data/samples.parquet",
            remedy="train it again",
        )
    if made["folds"] != folds.hash:
        raise UserError(
            "teacher-leaks",
            where=f"runs/{run}",
            key=key,
            what="trained on other folds, so also on rows that are scored here",
            remedy="train it again",
        )


def test_predictions(
    ensemble: TeacherEnsemble, fold: int | str, samples: Samples, folds: Folds
) -> list[tuple[PredictionSet, float]]:
    """Test predictions of each model that may be a teacher of the fold, and its weight."""
    sets = []
    for teacher in ensemble.teachers:
        files = [folder / "test.arrow" for folder in teacher.folders(fold, folds)]
        files = [file for file in files if artifacts.manifest_entry(file)]
        if not teacher.covers(files, fold, folds):
            raise UserError(
                "predictions-missing",
                where=teacher.address,
                what=f"has no test predictions {'of all folds' if fold == 'full' else f'of fold {fold}'}",
                remedy=f"train it first: comp train {teacher.run}",
            )
        sets += [(bank.read(file, samples, folds), teacher.weight / len(files)) for file in files]
    return sets


def merged_test_predictions(
    ensemble: TeacherEnsemble, fold: int | str, samples: Samples, folds: Folds
) -> tuple[PredictionSet, list[PredictionSet]]:
    """Weighted mean of the models' test predictions, and each model's own."""
    pairs = test_predictions(ensemble, fold, samples, folds)
    sets, weights = [each for each, _ in pairs], [weight for _, weight in pairs]
    return predictions.merge(sets, samples, folds, ensemble.space, weights), sets


def spread(mean: PredictionSet, sets: list[PredictionSet], head: str) -> np.ndarray:
    """(rows of the mean,): standard deviation between the models, averaged over outputs."""
    values = np.full((len(sets), *mean.heads[head].shape), np.nan)
    for i, each in enumerate(sets):
        values[i, np.searchsorted(mean.row, each.row)] = each.heads[head]
    return np.asarray(values.std(axis=0).mean(axis=1))
