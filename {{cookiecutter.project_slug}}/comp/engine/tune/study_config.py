"""Reads configs/tune/*.yaml. Every mistake is one line, all are told at once, before torch or Optuna is there."""

from __future__ import annotations

import itertools
import json
import math
import random
import typing
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any

from pydantic import BaseModel

from comp.engine.config import duration, resolve
from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.config.schema import Config as Knobs
from comp.engine.errors import Refused, UserError
from comp.engine.store import paths
from comp.engine.tune.space import Knob, Setting, Space, Value, applied, own

SAMPLERS = ("tpe", "gp", "cmaes", "qmc", "random", "grid")
PRUNERS = ("median", "halving", "hyperband", "wilcoxon", "none")
OBJECTIVES = ("score", "time")
HEADER = ("search", "objectives", "sampler", "pruner", "folds", "trials")
WORDS = ("low", "high", "log", "step", "choices", "when")
USELESS = {
    "train.threads": "changes nothing but the last digit",
    "train.max_samples": "fewer rows are only cheaper",
    "data.cache": "changes time, not pixels",
    "predict.batch_size": "changes time, not predictions",
}


def read(name: str, cfg: Config, experiment: str) -> Space:
    """The space of configs/tune/<name>.yaml, checked against the experiment. All mistakes are reported at once."""
    file = paths.path("configs", "tune", f"{name}.yaml")
    shown = paths.relative(file)
    if not file.is_file():
        known = sorted(f.stem for f in file.parent.glob("*.yaml"))
        close = f"; the nearest is {nearest(name, known)[0]}" if known else ""
        raise Refused(f"--space {name}: there is no {shown}{close}")
    tree, lines = resolve.parse(file, shown)
    faults = _Faults(shown, lines)
    for key in tree:
        if key not in HEADER:
            faults.add(key, f"{key}: no such key; the nearest is {nearest(key, HEADER)[0]}")
    header = _header(tree, faults, cfg.competition.folds.k * cfg.competition.folds.repeats)
    entries = tree.get("search")
    if not isinstance(entries, dict) or not entries:
        faults.add("search", "search: wants lines like optim.lr: {low: 1e-4, high: 1e-2, log: true}")
        entries = {}
    values = own(cfg)
    knobs = [knob for key, entry in entries.items() if (knob := _knob(key, entry, values, faults))]
    _conditions(knobs, entries, faults)
    faults.raise_any()
    knobs = _ordered(knobs, faults)
    faults.raise_any()
    space = Space(name, tuple(knobs), **header)
    _fit_together(space, faults)
    _against_config(space, cfg, experiment, faults)
    faults.raise_any()
    return space


class _Faults:
    def __init__(self, shown: str, lines: Mapping[str, str]):
        self.shown, self.lines, self.found = shown, lines, list[str]()

    def add(self, key: str, message: str) -> None:
        self.found.append(f"{self.where(key)}: {message}")

    def where(self, key: str) -> str:
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return self.lines.get(key, self.shown)

    def raise_any(self) -> None:
        if self.found:
            raise Refused(*dict.fromkeys(self.found))


def _header(tree: dict[str, Any], faults: _Faults, count: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if key in tree:
            out[key] = tree[key]
            if tree[key] not in known:
                close = nearest(str(tree[key]), known)[0]
                faults.add(key, f"{key}: {tree[key]!r} is none of {', '.join(known)}; the nearest is {close}")
    if "objectives" in tree:
        wanted = tree["objectives"] if isinstance(tree["objectives"], list) else [tree["objectives"]]
        out["objectives"] = tuple(wanted)
        odd = [w for w in wanted if w not in OBJECTIVES]
        if odd or "score" not in wanted or len(set(wanted)) < len(wanted):
            faults.add("objectives", f"objectives: {wanted} must be [score] or [score, time]")
    for key, most in (("folds", count), ("trials", 10**6)):
        if tree.get(key) is not None:
            out[key] = tree[key]
            if type(tree[key]) is not int or not 1 <= tree[key] <= most:
                faults.add(key, f"{key}: {tree[key]!r} must be a whole number from 1 to {most}")
    return out


def _knob(key: str, entry: Any, values: Mapping[str, Value], faults: _Faults) -> Knob | None:
    at = f"search.{key}"
    before = len(faults.found)
    if fault := _unsearchable(key, values):
        faults.add(at, fault)
        return None
    if isinstance(entry, list):
        entry = {"choices": entry}
    if not isinstance(entry, dict):
        faults.add(at, f"{key}: {entry!r} must be {{low: …, high: …}} or a list of choices")
        return None
    for word in entry:
        if word not in WORDS:
            faults.add(
                f"{at}.{word}", f"{key}: {word}: no such word; the nearest is {nearest(word, WORDS)[0]}"
            )
    when = _when(key, entry.get("when", {}), faults)
    if ("choices" in entry) == ("low" in entry or "high" in entry):
        faults.add(at, f"{key}: wants either low and high, or choices")
    if len(faults.found) > before:
        return None
    return (_choice if "choices" in entry else _range)(key, entry, when, faults)


def _unsearchable(key: str, values: Mapping[str, Value]) -> str:
    if any(known.startswith(f"{key}.") for known in values):
        inside = [known for known in values if known.startswith(f"{key}.")]
        return f"{key}: is a section; say which of {', '.join(inside)}"
    if key.split(".", maxsplit=1)[0] == "competition":
        return f"{key}: changes what is scored, so its scores would not compare"
    if key not in values:
        return f"{key}: no such knob; the nearest is {nearest(key, values)[0]}"
    if not resolve.changes_results([f"{key}="]):
        return f"{key}: is useless here, it changes no result"
    return f"{key}: is useless here, it {USELESS[key]}" if key in USELESS else ""


def _when(key: str, when: Any, faults: _Faults) -> dict[str, tuple[Value, ...]]:
    if not isinstance(when, dict):
        faults.add(f"search.{key}.when", f"{key}: when: {when!r} must be like {{model.name: [resnet18]}}")
        return {}
    return {other: tuple(v) if isinstance(v, list) else (v,) for other, v in when.items()}


def _choice(key: str, entry: dict[str, Any], when: Any, faults: _Faults) -> Knob | None:
    at, choices = f"search.{key}.choices", entry["choices"]
    if extra := [word for word in ("log", "step") if word in entry]:
        faults.add(at, f"{key}: {extra[0]} is for ranges, not for choices")
    elif not isinstance(choices, list) or len(choices) < 2:
        faults.add(
            at, f"{key}: choices: {choices!r} must be a list of two or more, or there is nothing to search"
        )
    elif len({json.dumps(c) for c in choices}) < len(choices):
        twice = next(c for c in choices if choices.count(c) > 1)
        faults.add(at, f"{key}: choices: {twice!r} stands there twice")
    else:
        return Knob(key, choices=tuple(choices), when=when)
    return None


def _range(key: str, entry: dict[str, Any], when: Any, faults: _Faults) -> Knob | None:
    at = f"search.{key}"
    kinds = set(_kinds(key))
    if not kinds & {int, float}:
        faults.add(at, f"{key}: is no number; give a list of choices instead of a range")
        return None
    whole = float not in kinds
    for word in ("low", "high", "step"):
        if word == "step" and "step" not in entry:
            continue
        value = entry.get(word)
        if word not in entry:
            faults.add(at, f"{key}: {word} is missing")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            faults.add(f"{at}.{word}", f"{key}: {word}: {value!r} must be a number")
        elif whole and value != int(value):
            faults.add(f"{at}.{word}", f"{key}: {word}: {value!r} must be a whole number")
        else:
            continue
        return None
    low, high, step, log = entry["low"], entry["high"], entry.get("step"), entry.get("log", False)
    if not isinstance(log, bool):
        faults.add(f"{at}.log", f"{key}: log: {log!r} must be true or false")
    elif low >= high:
        faults.add(at, f"{key}: low {low} must be below high {high}")
    elif log and low <= 0:
        faults.add(at, f"{key}: a log range must begin above 0, not at {low}")
    elif log and step is not None:
        faults.add(at, f"{key}: log and step exclude each other")
    elif step is not None and not 0 < step <= high - low:
        faults.add(f"{at}.step", f"{key}: step: {step} must be above 0 and at most {high - low:g}")
    else:
        if step is not None:  # Optuna would move the end silently
            high = low + math.floor((high - low) / step + 1e-9) * step
        if whole:
            low, high, step = int(low), int(high), None if step is None else int(step)
        return Knob(key, low, high, log, step, whole, when=when)
    return None


def _kinds(key: str) -> Iterator[type]:
    """The plain types that a knob takes."""
    model: Any = Knobs
    for part in key.split("."):
        model = model.model_fields[part].annotation if hasattr(model, "model_fields") else None
    yield from _plain(model)


def _plain(annotation: Any) -> Iterator[type]:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        yield from {type(value) for value in typing.get_args(annotation)}
    elif origin in (typing.Union, UnionType):
        for each in typing.get_args(annotation):
            yield from _plain(each)
    elif origin is typing.Annotated:
        yield from _plain(typing.get_args(annotation)[0])
    elif isinstance(annotation, type) and not issubclass(annotation, BaseModel):
        yield annotation


def _conditions(knobs: list[Knob], entries: Mapping[str, Any], faults: _Faults) -> None:
    by_key = {knob.key: knob for knob in knobs}
    for knob in knobs:
        for other, wanted in knob.when.items():
            at = f"search.{knob.key}.when.{other}"
            if other == knob.key:
                faults.add(at, f"{knob.key}: when: asks for itself")
            elif other not in entries:
                close = nearest(other, entries)[0]
                faults.add(at, f"{knob.key}: when: {other} is not searched; the nearest is {close}")
            elif other in by_key and not by_key[other].choices:
                faults.add(at, f"{knob.key}: when: {other} is a range; only a choice can be asked for")
            elif other in by_key and (odd := [w for w in wanted if w not in by_key[other].choices]):
                close = nearest(str(odd[0]), map(str, by_key[other].choices))[0]
                faults.add(at, f"{knob.key}: when: {other} is never {odd[0]!r}; the nearest is {close}")


def _ordered(knobs: list[Knob], faults: _Faults) -> list[Knob]:
    """Parents first."""
    placed: list[Knob] = []
    left = list(knobs)
    while left:
        free = [knob for knob in left if all(key in {p.key for p in placed} for key in knob.when)]
        if not free:
            faults.add(
                f"search.{left[0].key}.when", f"{left[0].key}: when: the conditions go round in a circle"
            )
            return placed
        placed += free
        left = [knob for knob in left if knob not in free]
    return placed


def _fit_together(space: Space, faults: _Faults) -> None:
    endless = next((knob.key for knob in space.knobs if knob.grid is None), None)
    choice = next((knob.key for knob in space.knobs if knob.choices), None)
    condition = next((knob.key for knob in space.knobs if knob.when), None)
    if len(space.objectives) > 1 and space.pruner != "none":
        faults.add(
            "pruner", f"pruner: {space.pruner} compares one number, there are two objectives; pruner: none"
        )
    if len(space.objectives) > 1 and space.sampler == "cmaes":
        faults.add("sampler", "sampler: cmaes knows one objective; tpe, gp, qmc and random know several")
    if space.sampler == "grid" and endless:
        faults.add("sampler", f"sampler: grid wants a step or choices for {endless}, or another sampler")
    if space.sampler == "cmaes" and choice:
        faults.add("sampler", f"sampler: cmaes knows no choices like {choice}; tpe does")
    if space.sampler in ("gp", "qmc", "cmaes", "grid") and condition:
        faults.add(
            "sampler", f"sampler: {space.sampler} knows no conditions like that of {condition}; tpe does"
        )
    if space.pruner == "wilcoxon" and space.folds is not None and space.folds < 4:
        faults.add(
            "pruner", f"pruner: wilcoxon decides after four folds at the soonest, folds: is {space.folds}"
        )


def _against_config(space: Space, cfg: Config, experiment: str, faults: _Faults) -> None:
    """Each end of each range and each choice by itself, then many settings together: what the config would refuse."""
    alone: list[Setting] = []
    for knob in space.knobs:
        ends = knob.choices or (knob.low, knob.high)
        alone += [{knob.key: int(v) if knob.whole and v is not None else v} for v in ends]
    chance = random.Random(0)
    together = (space.drawn(chance) for _ in range(200))
    refused: set[str] = set()
    for setting in itertools.chain(alone, together):
        if refused & set(setting):
            continue  # said already, of its own end
        try:
            found = applied(cfg, setting, {key: faults.where(f"search.{key}") for key in setting})
            if "schedule.warmup" in setting:
                _warms_up(found)
        except UserError as error:
            given = ", ".join(f"{key}={value}" for key, value in setting.items())
            line = error.lines[0]
            if not line.startswith(faults.shown):  # a rule of two knobs, told without a place
                line = f"{faults.shown}: {line}"
            faults.found.append(line if len(setting) == 1 else f"{line} (with {given} in {experiment})")
            refused |= set(setting)


def _warms_up(cfg: Config) -> None:
    """A search would not see that values above half of the run are all the same."""
    warmup, epochs = duration.parse(cfg.schedule.warmup).in_epochs(cfg.train.epochs), cfg.train.epochs
    if warmup is not None and warmup > epochs / 2:
        raise Refused(
            f"schedule.warmup: {warmup} epochs are shortened to half of train.epochs {epochs}, so what is above {epochs / 2:g} is all the same"
        )
