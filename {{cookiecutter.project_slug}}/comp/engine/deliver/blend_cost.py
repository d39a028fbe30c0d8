"""A blend inside a time budget: its score on the OOF rows, its seconds on Kaggle, and the blends that are one
step cheaper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comp.engine.bank import bank, score
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import run_members
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.deliver import kernel
from comp.engine.ensemble import average
from comp.engine.errors import UserError
from comp.engine.store import artifacts


@dataclass(frozen=True)
class Blend:
    members: tuple[str, ...]
    weights: tuple[float, ...]


def oof_score(blend: Blend, space: str, cfg: Config, table: Samples, split: Folds) -> float:
    """With its sign, so that higher is better whatever the metric."""
    sets = [bank.load(run_members.cv_address(member), "oof", table, split) for member in blend.members]
    recipes = {
        member: artifacts.read_json(bank.folder(member) / "apply.json")
        for member in blend.members
        if (bank.folder(member) / "apply.json").exists()
    }
    recipe = average.build_recipe(table, blend.members, sets, blend.weights, space, recipes)
    predictions = {member: s.heads for member, s in zip(blend.members, sets, strict=True)}
    heads = average.apply(recipe, predictions)
    blended = PredictionSet(sets[0].row, sets[0].fold, heads, {**sets[0].meta, "marks": []})
    oof = score.evaluate(cfg, table, split, blended)["oof"]
    if oof is None:
        raise UserError(
            "metric-undefined", where=", ".join(blend.members), what="the metric is undefined on the OOF rows"
        )
    return score.metric_of(cfg).sign * float(oof)


def seconds(blend: Blend, rehearsal: dict[str, Any]) -> float:
    """For the hidden test set, from the seconds an image of a rehearsal. A member run of two members is
    predicted once; a run under fewer TTA views than were measured takes proportionally less."""
    total, measured = 0.0, rehearsal["seconds_per_image"]
    runs = {run["address"]: run for member in blend.members for run in kernel.member_runs(member)}
    for run in runs.values():
        if run["address"] in measured:
            total += measured[run["address"]]
            continue
        same_run = [
            (address, kernel.member_runs(address)[0])
            for address in measured
            if address.partition(":")[0] == run["run"]
        ]
        address, most = max(same_run, key=lambda pair: len(pair[1]["tta"]))
        passes = len(run["tta"]) * len(run["checkpoints"]) / (len(most["tta"]) * len(most["checkpoints"]))
        total += measured[address] * passes
    return total * float(rehearsal["hidden_rows"])


def cheaper(blend: Blend) -> list[tuple[Blend, str]]:
    """(blend, what was changed): one member less, or one member with fewer TTA views, if its OOF predictions
    are stored."""
    found = []
    for i, member in enumerate(blend.members):
        if len(blend.members) > 1:
            weights = blend.weights[:i] + blend.weights[i + 1 :]
            if sum(weights) > 0:
                members = blend.members[:i] + blend.members[i + 1 :]
                normalized = tuple(weight / sum(weights) for weight in weights)
                found.append((Blend(members, normalized), f"without {member}"))
        for other in with_fewer_views(member):
            if other not in blend.members:
                members = (*blend.members[:i], other, *blend.members[i + 1 :])
                found.append((Blend(members, blend.weights), f"{other} instead of {member}"))
    return found


def with_fewer_views(member: str) -> list[str]:
    """Members with the same checkpoints and a subset of the TTA views."""
    if (bank.folder(member) / "apply.json").exists():
        return []
    run = kernel.member_runs(member)[0]
    found = []
    for address in bank.members():
        if (
            address.partition(":")[0] != run["run"]
            or address == member
            or not (bank.folder(run_members.cv_address(address)) / "oof.arrow").exists()
        ):
            continue
        other = kernel.member_runs(address)[0]
        if other["checkpoints"] == run["checkpoints"] and set(other["tta"]) < set(run["tta"]):
            found.append(address)
    return found
