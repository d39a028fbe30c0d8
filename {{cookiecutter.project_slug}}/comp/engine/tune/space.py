"""The search space of a study: knobs with their ranges, choices and conditions. study_config.py reads them
from configs/tune."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comp.engine.config import resolve
from comp.engine.config.schema import Config

Value = Any  # of a knob, as in a config
Setting = dict[str, Value]  # dotted key -> value, of the active knobs only


@dataclass(frozen=True)
class Knob:
    """One line of `search`: either a range (low and high) or choices."""

    key: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    integer: bool = False
    choices: tuple[Value, ...] = ()
    when: Mapping[str, tuple[Value, ...]] = field(
        default_factory=dict
    )  # other knob -> its values that activate this one

    def is_active(self, setting: Mapping[str, Value]) -> bool:
        return all(key in setting and setting[key] in values for key, values in self.when.items())

    def contains(self, value: Value) -> bool:
        """Whether the search could sample this value."""
        if self.choices:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        assert self.low is not None and self.high is not None
        on_grid = self.step is None or abs((value - self.low) / self.step % 1 - 0.5) > 0.5 - 1e-9
        return self.low <= value <= self.high and on_grid

    @property
    def grid(self) -> list[Value] | None:
        """All values, or None if there are infinitely many."""
        if self.choices:
            return list(self.choices)
        step = self.step or (1 if self.integer and not self.log else None)
        if step is None or self.low is None or self.high is None:
            return None
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + i * step for i in range(count)]
        return [int(v) for v in values] if self.integer else values

    def sample(self, rng: random.Random) -> Value:
        if self.grid is not None:
            return rng.choice(self.grid)
        assert self.low is not None and self.high is not None
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        value = min(max(value, self.low), self.high)
        return round(value) if self.integer else value


@dataclass(frozen=True)
class Space:
    name: str
    knobs: tuple[Knob, ...]  # a knob stands after those that its condition names
    objectives: tuple[str, ...] = ("score",)
    sampler: str = "tpe"
    pruner: str = "median"
    folds: int | None = None
    trials: int = 50

    def sample(self, rng: random.Random) -> Setting:
        setting: Setting = {}
        for knob in self.knobs:
            if knob.is_active(setting):
                setting[knob.key] = knob.sample(rng)
        return setting

    def restrict(self, values: Mapping[str, Value]) -> Setting | None:
        """The values of the active knobs; None if one is missing or outside the space."""
        setting: Setting = {}
        for knob in self.knobs:
            if knob.is_active(setting):
                if knob.key not in values or not knob.contains(values[knob.key]):
                    return None
                setting[knob.key] = values[knob.key]
        return setting


def to_optuna(value: Value) -> Any:
    """A choice as Optuna can store it: lists and dicts become JSON text."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def config_values(cfg: Config) -> dict[str, Value]:
    """Dotted key -> value of every knob of the config."""
    return resolve.flatten(cfg.model_dump())


def with_setting(
    cfg: Config, setting: Mapping[str, Value], origins: Mapping[str, str] | None = None
) -> Config:
    """The config with these values, validated. `origins`: dotted key -> where an error says that the value is
    from."""
    tree = cfg.model_dump()
    for key, value in setting.items():
        node = tree
        *parents, last = key.split(".")
        for part in parents:
            node = node[part]
        node[last] = value
    return resolve.validate_config(tree, origins or dict.fromkeys(setting, "trial"))
