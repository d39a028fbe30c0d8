"""What a study searches: knobs with their ranges, choices and conditions. declare.py reads them from configs/tune."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comp.engine.config import resolve
from comp.engine.config.schema import Config

Value = Any  # of a knob, as it stands in a config
Setting = dict[str, Value]  # dotted key -> value, only of what is active


@dataclass(frozen=True)
class Knob:
    """One line of `search`. A range has low and high, a choice has choices."""

    key: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    whole: bool = False
    choices: tuple[Value, ...] = ()
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    def active(self, setting: Mapping[str, Value]) -> bool:
        return all(key in setting and setting[key] in allowed for key, allowed in self.when.items())

    def holds(self, value: Value) -> bool:
        """Whether the search could come to this value."""
        if self.choices:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        assert self.low is not None and self.high is not None
        on_grid = self.step is None or abs((value - self.low) / self.step % 1 - 0.5) > 0.5 - 1e-9
        return self.low <= value <= self.high and on_grid

    @property
    def grid(self) -> list[Value] | None:
        """All values, where there are finitely many."""
        if self.choices:
            return list(self.choices)
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None or self.low is None or self.high is None:
            return None
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + i * step for i in range(count)]
        return [int(v) for v in values] if self.whole else values

    def drawn(self, chance: random.Random) -> Value:
        if self.grid is not None:
            return chance.choice(self.grid)
        assert self.low is not None and self.high is not None
        if self.log:
            value = math.exp(chance.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = chance.uniform(self.low, self.high)
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else value


@dataclass(frozen=True)
class Space:
    name: str
    knobs: tuple[Knob, ...]  # what a condition asks for stands before what asks
    objectives: tuple[str, ...] = ("score",)
    sampler: str = "tpe"
    pruner: str = "median"
    folds: int | None = None
    trials: int = 50

    def drawn(self, chance: random.Random) -> Setting:
        setting: Setting = {}
        for knob in self.knobs:
            if knob.active(setting):
                setting[knob.key] = knob.drawn(chance)
        return setting

    def fitted(self, values: Mapping[str, Value]) -> Setting | None:
        """The active part of these values; None when one is missing or lies outside."""
        setting: Setting = {}
        for knob in self.knobs:
            if knob.active(setting):
                if knob.key not in values or not knob.holds(values[knob.key]):
                    return None
                setting[knob.key] = values[knob.key]
        return setting


def label(value: Value) -> Any:
    """A choice as Optuna can store it: lists are written as text."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def own(cfg: Config) -> dict[str, Value]:
    """The experiment's values of all knobs."""
    return resolve.flatten(cfg.model_dump())


def applied(cfg: Config, setting: Mapping[str, Value], origins: Mapping[str, str] | None = None) -> Config:
    tree = cfg.model_dump()
    for key, value in setting.items():
        node = tree
        *parents, last = key.split(".")
        for part in parents:
            node = node[part]
        node[last] = value
    return resolve.validate_config(tree, origins or dict.fromkeys(setting, "trial"))
