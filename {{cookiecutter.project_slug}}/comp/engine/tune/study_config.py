"""Reads configs/tune/*.yaml. All mistakes are reported at once, a line each, before torch or Optuna is
imported."""

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
from comp.engine.errors import UserError, joined
from comp.engine.store import paths
from comp.engine.tune.space import Knob, Setting, Space, Value, config_values, with_setting

SAMPLERS = ("tpe", "gp", "cmaes", "qmc", "random", "grid")
PRUNERS = ("median", "halving", "hyperband", "wilcoxon", "none")
OBJECTIVES = ("score", "time")
KEYS = ("search", "objectives", "sampler", "pruner", "folds", "trials")
KNOB_KEYS = ("low", "high", "log", "step", "choices", "when")
NOT_SEARCHABLE = {
    "train.threads": "changes only rounding errors",
    "train.max_samples": "changes only the cost: fewer rows",
    "data.cache": "changes time, not pixels",
    "predict.batch_size": "changes time, not predictions",
}
DRAWS = 200  # random settings that are validated with the experiment's config


def read(name: str, cfg: Config, experiment: str) -> Space:
    """The space of configs/tune/<name>.yaml, validated against the config of the experiment."""
    file = paths.path("configs", "tune", f"{name}.yaml")
    shown = paths.relative(file)
    if not file.is_file():
        known = sorted(f.stem for f in file.parent.glob("*.yaml"))
        raise UserError(
            "space-unknown",
            where=f"--space {name}",
            what=f"there is no {shown}",
            remedy=did_you_mean(name, known) if known else "",
        )
    tree, lines = resolve.parse(file, shown)
    errors = _Errors(shown, lines)
    for key in tree:
        if key not in KEYS:
            errors.add(key, "no such key", did_you_mean(key, KEYS), code="key-unknown")
    header = _header(tree, errors, cfg.competition.folds.k * cfg.competition.folds.repeats)
    entries = tree.get("search")
    if not isinstance(entries, dict) or not entries:
        errors.add("search", "no knobs", "add lines like optim.lr: {low: 1e-4, high: 1e-2, log: true}")
        entries = {}
    values = config_values(cfg)
    knobs = [knob for key, entry in entries.items() if (knob := _knob(key, entry, values, errors))]
    _validate_conditions(knobs, entries, errors)
    errors.raise_any()
    knobs = _parents_first(knobs, errors)
    errors.raise_any()
    space = Space(name, tuple(knobs), **header)
    _validate_sampler(space, errors)
    _validate_pruner(space, errors)
    _validate_with_config(space, cfg, experiment, errors)
    errors.raise_any()
    return space


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    return f"did you mean {nearest(name, list(known))[0]}?"


class _Errors:
    """Collects mistakes with the line of the file that they are on."""

    def __init__(self, file: str, lines: Mapping[str, str]):
        self.file, self.lines, self.found = file, lines, list[UserError]()

    def add(self, key: str, what: str, remedy: str = "", *, at: str = "", code: str = "space-value") -> None:
        """`key` is printed; `at` is the key in the file if it is another one."""
        self.found.append(UserError(code, where=self.line_of(at or key), key=key, what=what, remedy=remedy))

    def line_of(self, key: str) -> str:
        """file:line of the key, or of the section that it is in."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return self.lines.get(key, self.file)

    def raise_any(self) -> None:
        unique = {error.line: error for error in self.found}
        if unique:
            raise joined(list(unique.values()))


def _header(tree: dict[str, Any], errors: _Errors, n_folds: int) -> dict[str, Any]:
    """Everything but the knobs."""
    out: dict[str, Any] = {}
    for key, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if key in tree:
            out[key] = tree[key]
            if tree[key] not in known:
                what = f"{tree[key]!r} is none of {', '.join(known)}"
                errors.add(key, what, did_you_mean(str(tree[key]), known))
    if "objectives" in tree:
        objectives = tree["objectives"] if isinstance(tree["objectives"], list) else [tree["objectives"]]
        out["objectives"] = tuple(objectives)
        unknown = [name for name in objectives if name not in OBJECTIVES]
        if unknown or "score" not in objectives or len(set(objectives)) < len(objectives):
            errors.add("objectives", f"{objectives} must be [score] or [score, time]")
    for key, most in (("folds", n_folds), ("trials", 10**6)):
        if tree.get(key) is not None:
            out[key] = tree[key]
            if type(tree[key]) is not int or not 1 <= tree[key] <= most:
                errors.add(key, f"{tree[key]!r} must be an integer from 1 to {most}")
    return out


# --- one knob -----------------------------------------------------------------------------------------------


def _knob(key: str, entry: Any, values: Mapping[str, Value], errors: _Errors) -> Knob | None:
    """None after a mistake."""
    at = f"search.{key}"
    before = len(errors.found)
    if not _validate_searchable(key, values, errors):
        return None
    if isinstance(entry, list):
        entry = {"choices": entry}
    if not isinstance(entry, dict):
        errors.add(key, f"{entry!r} must be {{low: …, high: …}} or a list of choices", at=at)
        return None
    for word in entry:
        if word not in KNOB_KEYS:
            remedy = did_you_mean(word, KNOB_KEYS)
            errors.add(f"{key}: {word}", "no such key", remedy, at=f"{at}.{word}", code="key-unknown")
    when = _when(key, entry.get("when", {}), errors)
    if ("choices" in entry) == ("low" in entry or "high" in entry):
        errors.add(key, "needs either low and high, or choices", at=at)
    if len(errors.found) > before:
        return None
    return (_choice if "choices" in entry else _range)(key, entry, when, errors)


def _validate_searchable(key: str, values: Mapping[str, Value], errors: _Errors) -> bool:
    at = f"search.{key}"
    inside = [known for known in values if known.startswith(f"{key}.")]
    if inside:
        errors.add(key, "is a section", f"name one of its knobs: {', '.join(inside)}", at=at)
    elif key.split(".", maxsplit=1)[0] == "competition":
        errors.add(key, "changes what is scored, so scores would not be comparable", at=at)
    elif key not in values:
        errors.add(key, "no such knob", did_you_mean(key, values), at=at, code="knob-unknown")
    elif not resolve.changes_results([f"{key}="]):
        errors.add(key, "cannot be searched, it changes no result", at=at)
    elif key in NOT_SEARCHABLE:
        errors.add(key, f"cannot be searched, it {NOT_SEARCHABLE[key]}", at=at)
    else:
        return True
    return False


def _when(key: str, when: Any, errors: _Errors) -> dict[str, tuple[Value, ...]]:
    if not isinstance(when, dict):
        what = f"{when!r} must be like {{model.name: [resnet18]}}"
        errors.add(f"{key}: when", what, at=f"search.{key}.when")
        return {}
    return {other: tuple(v) if isinstance(v, list) else (v,) for other, v in when.items()}


def _choice(key: str, entry: dict[str, Any], when: Any, errors: _Errors) -> Knob | None:
    at, choices = f"search.{key}.choices", entry["choices"]
    if extra := [word for word in ("log", "step") if word in entry]:
        errors.add(key, f"{extra[0]} is for ranges, not for choices", at=at)
    elif not isinstance(choices, list) or len(choices) < 2:
        errors.add(f"{key}: choices", f"{choices!r} must be a list of two or more", at=at)
    elif len({json.dumps(c) for c in choices}) < len(choices):
        duplicate = next(c for c in choices if choices.count(c) > 1)
        errors.add(f"{key}: choices", f"{duplicate!r} is there twice", at=at)
    else:
        return Knob(key, choices=tuple(choices), when=when)
    return None


def _range(key: str, entry: dict[str, Any], when: Any, errors: _Errors) -> Knob | None:
    at = f"search.{key}"
    types = set(_types(key))
    if not types & {int, float}:
        errors.add(key, "is not a number", "give a list of choices instead of a range", at=at)
        return None
    integer = float not in types
    if not _validate_numbers(key, entry, integer, errors):
        return None
    low, high, step, log = entry["low"], entry["high"], entry.get("step"), entry.get("log", False)
    if not isinstance(log, bool):
        errors.add(f"{key}: log", f"{log!r} must be true or false", at=f"{at}.log")
    elif low >= high:
        errors.add(key, f"low {low} must be below high {high}", at=at)
    elif log and low <= 0:
        errors.add(key, f"low must be above 0 for a log range, not {low}", at=at)
    elif log and step is not None:
        errors.add(key, "log and step cannot be combined", at=at)
    elif step is not None and not 0 < step <= high - low:
        errors.add(f"{key}: step", f"{step} must be above 0 and at most {high - low:g}", at=f"{at}.step")
    else:
        if step is not None:  # Optuna would move the upper end with a warning only
            high = low + math.floor((high - low) / step + 1e-9) * step
        if integer:
            low, high, step = int(low), int(high), None if step is None else int(step)
        return Knob(key, low, high, log, step, integer, when=when)
    return None


def _validate_numbers(key: str, entry: dict[str, Any], integer: bool, errors: _Errors) -> bool:
    """low, high and step."""
    at = f"search.{key}"
    for word in ("low", "high", "step"):
        if word == "step" and "step" not in entry:
            continue
        value = entry.get(word)
        if word not in entry:
            errors.add(key, f"{word} is missing", at=at)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            errors.add(f"{key}: {word}", f"{value!r} must be a number", at=f"{at}.{word}")
        elif integer and value != int(value):
            errors.add(f"{key}: {word}", f"{value!r} must be an integer", at=f"{at}.{word}")
        else:
            continue
        return False
    return True


def _types(key: str) -> Iterator[type]:
    """The plain types of a knob of the schema."""
    model: Any = Config
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


# --- all knobs together -------------------------------------------------------------------------------------


def _validate_conditions(knobs: list[Knob], entries: Mapping[str, Any], errors: _Errors) -> None:
    by_key = {knob.key: knob for knob in knobs}
    for knob in knobs:
        key = f"{knob.key}: when"
        for other, values in knob.when.items():
            at = f"search.{knob.key}.when.{other}"
            if other == knob.key:
                errors.add(key, "names the knob itself", at=at)
            elif other not in entries:
                errors.add(key, f"{other} is not searched", did_you_mean(other, entries), at=at)
            elif other in by_key and not by_key[other].choices:
                errors.add(key, f"{other} is a range; a condition needs choices", at=at)
            elif other in by_key and (unknown := [v for v in values if v not in by_key[other].choices]):
                remedy = did_you_mean(str(unknown[0]), map(str, by_key[other].choices))
                errors.add(key, f"{unknown[0]!r} is not a choice of {other}", remedy, at=at)


def _parents_first(knobs: list[Knob], errors: _Errors) -> list[Knob]:
    """Sorted so that a knob stands after those that its condition names."""
    placed: list[Knob] = []
    left = list(knobs)
    while left:
        free = [knob for knob in left if all(key in {p.key for p in placed} for key in knob.when)]
        if not free:
            key = left[0].key
            errors.add(f"{key}: when", "the conditions form a cycle", at=f"search.{key}.when")
            return placed
        placed += free
        left = [knob for knob in left if knob not in free]
    return placed


def _validate_sampler(space: Space, errors: _Errors) -> None:
    infinite = next((knob.key for knob in space.knobs if knob.grid is None), None)
    choice = next((knob.key for knob in space.knobs if knob.choices), None)
    condition = next((knob.key for knob in space.knobs if knob.when), None)
    if len(space.objectives) > 1 and space.sampler == "cmaes":
        errors.add("sampler", "cmaes supports one objective only", "use tpe, gp, qmc or random")
    if space.sampler == "grid" and infinite:
        errors.add("sampler", f"grid needs a step or choices for {infinite}", "or use another sampler")
    if space.sampler == "cmaes" and choice:
        errors.add("sampler", f"cmaes does not support choices, like those of {choice}", "use tpe")
    if space.sampler in ("gp", "qmc", "cmaes", "grid") and condition:
        what = f"{space.sampler} does not support conditions, like that of {condition}"
        errors.add("sampler", what, "use tpe")


def _validate_pruner(space: Space, errors: _Errors) -> None:
    if len(space.objectives) > 1 and space.pruner != "none":
        errors.add("pruner", f"{space.pruner} supports one objective only", "set pruner: none")
    if space.pruner == "wilcoxon" and space.folds is not None and space.folds < 4:
        errors.add("pruner", f"wilcoxon prunes after four folds at the earliest, folds is {space.folds}")


def _validate_with_config(space: Space, cfg: Config, experiment: str, errors: _Errors) -> None:
    """Apply each end of each range and each choice alone, then random settings, and collect what the config
    rejects."""
    alone: list[Setting] = []
    for knob in space.knobs:
        ends = knob.choices or (knob.low, knob.high)
        alone += [{knob.key: int(v) if knob.integer and v is not None else v} for v in ends]
    rng = random.Random(0)
    together = (space.sample(rng) for _ in range(DRAWS))
    rejected: set[str] = set()
    for setting in itertools.chain(alone, together):
        if rejected & set(setting):
            continue  # reported already, for the knob alone
        try:
            changed = with_setting(cfg, setting, {key: errors.line_of(f"search.{key}") for key in setting})
            if "schedule.warmup" in setting:
                _validate_warmup(changed, errors.line_of("search.schedule.warmup"))
        except UserError as error:
            errors.found.append(_in_space(error, setting, experiment, errors.file))
            rejected |= set(setting)


def _in_space(error: UserError, setting: Setting, experiment: str, file: str) -> UserError:
    """The error of a config as one of the space file, with the setting if several knobs were set."""
    first, what = error.errors[0], error.what
    where = first.where
    if not first.line.startswith(file):  # a rule of two knobs, which has no line
        where = f"{file}: {where}" if where else file
    if len(setting) > 1:
        values = ", ".join(f"{key}={value}" for key, value in setting.items())
        what = f"{what} (with {values} in {experiment})"
    return UserError(first.code, where=where, key=first.key, what=what, remedy=first.remedy)


def _validate_warmup(cfg: Config, where: str) -> None:
    """The search could not distinguish values above half of the run."""
    warmup, epochs = duration.parse(cfg.schedule.warmup).in_epochs(cfg.train.epochs), cfg.train.epochs
    if warmup is not None and warmup > epochs / 2:
        raise UserError(
            "space-value",
            where=where,
            key="schedule.warmup",
            what=f"{warmup} epochs are shortened to half of train.epochs {epochs}, so all values above "
            f"{epochs / 2:g} are equal",
        )
