"""configs/ensembles/*.yaml: which members, how they become one. Every mistake is one line with the file and its line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from comp import config, store
from comp.config import Refused, nearest
from comp.knobs import Many, NotNegative, Section


class Blend(Section):
    members: Many
    method: Literal["mean", "weighted", "rank", "geometric"]
    space: Literal["probability", "logit", "geometric"] | None = (
        None  # probability, where the method leaves a choice
    )
    weights: Annotated[list[NotNegative], Field(min_length=1)] | None = None  # one a member, in their order

    @model_validator(mode="after")
    def _fit_together(self) -> Blend:
        if self.weights is None:
            if self.method == "weighted":
                raise ValueError(
                    f"method: weighted needs weights: a list of {len(self.members)} numbers, one a member"
                )
            return self
        if self.method == "mean":
            raise ValueError(
                "weights: the mean weighs all members alike; write method: weighted, or leave weights out"
            )
        if len(self.weights) != len(self.members):
            raise ValueError(
                f"weights: {len(self.weights)} numbers for {len(self.members)} members, one each is wanted"
            )
        if not sum(self.weights) > 0:
            raise ValueError("weights: all are 0, so nobody speaks")
        return self

    @property
    def shares(self) -> list[float]:
        """Weights that sum to 1."""
        weights = self.weights or [1.0] * len(self.members)
        return [weight / sum(weights) for weight in weights]

    @property
    def merged_in(self) -> str:
        return {"rank": "rank", "geometric": "geometric"}.get(self.method, self.space or "probability")


@dataclass(frozen=True)
class Declared:
    name: str
    blend: Blend
    lines: Mapping[str, str]  # dotted key -> file:line

    @property
    def hash(self) -> str:
        """Of what is declared, not of how the file is written."""
        return store.digest(self.blend.model_dump())

    def fault(self, key: str, message: str) -> str:
        return f"{self.lines.get(key, f'configs/ensembles/{self.name}.yaml')}: {message}"


def read(name: str) -> Declared:
    folder = store.path("configs", "ensembles")
    file = folder / f"{name}.yaml"
    if not file.is_file():
        known = sorted(each.stem for each in folder.glob("*.yaml"))
        there = (
            f"the nearest are {', '.join(nearest(name, known, 3))}" if known else "the folder has none yet"
        )
        raise Refused(f"{store.shown(file)}: no such file; {there}")
    tree, lines = config.parse(file, store.shown(file))
    declared = Declared(name, config.checked(Blend, tree, lines, store.shown(file)), lines)
    if faults := _faults(declared):
        raise Refused(*faults)
    return declared


def _faults(declared: Declared) -> list[str]:
    members, faults = declared.blend.members, []
    for i, member in enumerate(members):
        if member in members[:i]:
            faults.append(
                declared.fault(
                    f"members.{i}", f"members: {member} stands here twice; give it a weight instead"
                )
            )
        if member.partition(":")[0] == declared.name:
            faults.append(declared.fault(f"members.{i}", f"members: {member} is this ensemble itself"))
    if store.run_folder(declared.name).is_dir():
        faults.append(
            f"{declared.name}: is the name of a run already, and an address must mean one thing; rename the file"
        )
    return faults


def notes(declared: Declared) -> list[str]:
    """What was written and has no effect is said aloud."""
    blend = declared.blend
    if blend.space is None or blend.space == blend.merged_in:
        return []
    return [
        declared.fault(
            "space",
            f"space: {blend.space} has no effect, since method: {blend.method} says where members meet",
        )
    ]
