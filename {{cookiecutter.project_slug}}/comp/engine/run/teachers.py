"""Models that teach others: those of a run, of a member of it, or of a plain average of several, fold by fold.

What the model of fold k says may teach fold k, whose scored rows it never saw, and no other fold. So whoever teaches has a model
of its own for each fold, and nothing of it was fitted or chosen on rows that are scored.
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
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths

PLAIN = ("mean", "weighted", "geometric", "snapshots")  # no label had a hand in them


class Teacher(NamedTuple):
    """One run or member, and how much it counts."""

    address: str
    run: str
    cfg: Config
    seed: int | None  # None: all there are
    inside: tuple[str, ...]  # folders within a fold's
    share: float

    def places(self, number: int | str, folds: Folds) -> list[Path]:
        """Folders of its predictions that may teach a fold; a refit on all data scores nothing, so all folds teach it."""
        numbers = range(folds.count) if number == "full" else [int(number)]
        seeds = (
            sorted(paths.run_folder(self.run).glob("seed*"))
            if self.seed is None
            else [paths.run_folder(self.run) / f"seed{self.seed}"]
        )
        return [seed / f"fold{each}" / inside for seed in seeds for each in numbers for inside in self.inside]


class TeacherEnsemble(NamedTuple):
    name: str
    voices: list[Teacher]
    space: str  # where they meet


def validate(cfg: Config, folds: Folds) -> None:
    if cfg.distill.teacher is not None:
        load(cfg.distill.teacher, folds, "distill.teacher")


def load(name: str, folds: Folds, where: str) -> TeacherEnsemble:
    """`where`: the knob or verb that named them, for what is refused."""
    folder = paths.ensemble_folder(name)
    if not (folder / "apply.json").exists():
        return TeacherEnsemble(name, [_teacher(name, 1.0, folds, where)], "probability")
    recipe, record = (
        artifacts.read_json(artifacts.verified(folder / f"{each}.json", f"comp ensemble {name}"))
        for each in ("apply", "score")
    )
    if record["method"] not in PLAIN or "after" in recipe or "correct" in recipe:
        raise Refused(
            f"{where}: {name} is fitted ({record['method']}): its weights have seen the answers of all folds, and would hand them on; "
            f"name a run, or an ensemble of method {', '.join(PLAIN)}"
        )
    if deep := [each["address"] for each in recipe["members"] if "recipe" in each]:
        raise Refused(
            f"{where}: {name}: its member {deep[0]} is an ensemble itself; list the runs of that one instead"
        )
    voices = [_teacher(each["address"], float(each["weight"]), folds, where) for each in recipe["members"]]
    return TeacherEnsemble(name, voices, recipe["space"])


def _teacher(address: str, share: float, folds: Folds, where: str) -> Teacher:
    run, _, member = address.partition(":")
    folder = paths.run_folder(run)
    if not artifacts.manifest_entry(folder / "config.yaml"):
        if why := experiments.why_missing(address, "predictions"):
            raise Refused(f"{where}: {why}")
        known = experiments.runs()
        there = f"the nearest are {', '.join(nearest(run, known, 3))}" if known else "there are no runs yet"
        raise Refused(f"{where}: {address}: no such run or ensemble; {there}")
    cfg = resolve.from_yaml(artifacts.verified(folder / "config.yaml"))
    made = artifacts.read_json(artifacts.verified(folder / "made_of.json"))
    if made["samples"] != folds.samples.hash:
        raise Refused(f"{where}: runs/{run} was trained on another data/samples.parquet; train it again")
    if made["folds"] != folds.hash:
        raise Refused(
            f"{where}: runs/{run} was trained on other folds, so it has seen rows that are scored here"
        )
    if run_members.is_refit(member):
        raise Refused(
            f"{where}: {address} was trained on all data, so it has seen the rows of every fold; take {run_members.cv_address(address)}"
        )
    seed = int(member.removeprefix("seed")) if member.removeprefix("seed").isdigit() else None
    inside = (
        ("",)
        if not member or seed is not None
        else tuple(run_members.extra_members(cfg).get(member, [member]))
    )
    if not any(folder.glob(f"seed{'*' if seed is None else seed}/fold*/{inside[0]}")):
        if why := experiments.why_missing(address, "predictions"):
            raise Refused(f"{where}: {why}")
        known = [f"{run}:{each}" for each in run_members.extra_members(cfg)] or [run]
        raise Refused(f"{where}: {address}: no such member; the nearest is {nearest(address, known)[0]}")
    if guilty := [each for each in inside if run_members.marks(cfg, each)]:
        raise Refused(
            f"{where}: {run}{':' if guilty[0] else ''}{guilty[0]} is selected_on_fold: each of its models was chosen on the rows of its fold, "
            "and would hand that on; select.on: inner does not"
        )
    return Teacher(address, run, cfg, seed, inside, share)


def test_predictions(
    teachers: TeacherEnsemble, number: int | str, samples: Samples, folds: Folds
) -> list[tuple[PredictionSet, float]]:
    """What each model that may teach a fold says of the test rows, and how much it counts."""
    found = []
    for voice in teachers.voices:
        there = [
            place / "test.arrow"
            for place in voice.places(number, folds)
            if artifacts.manifest_entry(place / "test.arrow")
        ]
        wanted = folds.count if number == "full" else 1
        if len({file.parts[len(paths.run_folder(voice.run).parts) + 1] for file in there}) < wanted:
            which = "of all folds" if number == "full" else f"of fold {number}"
            raise Refused(
                f"{voice.address}: has no test predictions {which}; train it first: comp train {voice.run}"
            )
        found += [(bank.read(file, samples, folds), voice.share / len(there)) for file in there]
    return found


def merged_test_predictions(
    teachers: TeacherEnsemble, number: int | str, samples: Samples, folds: Folds
) -> tuple[PredictionSet, list[PredictionSet]]:
    """Their mean, and what each said."""
    sets = test_predictions(teachers, number, samples, folds)
    both = [each for each, _ in sets], [share for _, share in sets]
    return predictions.merge(both[0], samples, folds, teachers.space, both[1]), both[0]


def spread(mean: PredictionSet, sets: list[PredictionSet], head: str) -> np.ndarray:
    """(rows of the mean,): how far apart they are, the standard deviation, its mean over outputs."""
    each = np.full((len(sets), *mean.heads[head].shape), np.nan)
    for values, said in zip(each, sets, strict=True):
        values[np.searchsorted(mean.row, said.row)] = said.heads[head]
    return np.asarray(each.std(axis=0).mean(axis=1))
