"""Merges configs/*.yaml and key=value into one frozen Config (schema.py). Reports all mistakes at once.

Later sources override earlier ones:
1. competition.yaml
2. base.yaml
3. the files that the experiment names with `base:`, then the experiment itself; or the config of a run
4. debug.yaml with --debug
5. key=value of the command line
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from comp.engine.config import yaml_lines
from comp.engine.config.schema import Config, Schedule
from comp.engine.errors import UserError, joined
from comp.engine.store import secrets

__all__ = ["Config", "Schedule"]


# Knobs that may change between two starts of a run, since its weights do not depend on them.
NO_EFFECT_ON_RESULTS = (
    "machine",
    "track",
    "keep",
    "train.seeds",
    "train.checkpoint_every",
    "competition.submission",
    "competition.metric",  # how a finished run is scored
    "competition.kernel",
    "competition.title",
)


@dataclass(frozen=True)
class Loaded:
    config: Config
    origins: dict[str, str] = field(default_factory=dict)  # dotted key -> file:line or "command line"

    def where(self, key: str) -> str:
        return _where(key, self.origins)


Tree = dict[str, Any]
Model = TypeVar("Model", bound=BaseModel)


def load(
    root: Path, experiment: str, overrides: Iterable[str] = (), debug: bool = False, run: Path | None = None
) -> Loaded:
    """Resolves an experiment of configs/. `run`: the config.yaml of a run, used in place of the experiment's
    file (see experiments.load)."""
    folder = root / "configs"
    tree: Tree = {}
    origins: dict[str, str] = {}
    for file in [folder / "competition.yaml", *_chain(folder, "base" if run else experiment)]:
        _merge(tree, origins, *_read(file, root))
    if run is not None:
        _merge(tree, origins, *_read_run(run, root, tree))
    if debug:
        _merge(tree, origins, *_read(folder / "debug.yaml", root))
    for text in overrides:
        _merge(tree, origins, *_override(text, tree))
    return Loaded(validate_config(tree, origins), origins)


def from_yaml(path: Path) -> Config:
    """Reads the resolved config.yaml of a run. Knobs that a later template update added are missing there
    and get the defaults of base.yaml, which do not change results."""
    values, lines = parse(path, f"{path.parent.name}/{path.name}")
    base = next((f for f in (p / "configs" / "base.yaml" for p in path.parents) if f.is_file()), None)
    tree: Tree = parse(base, "configs/base.yaml")[0] if base else {}
    _update(tree, values)
    return validate_config(tree, lines)


def to_yaml(config: Config) -> str:
    return yaml_lines.dump(config.model_dump())


def validate_config(tree: Tree, origins: Mapping[str, str]) -> Config:
    return validate(Config, tree, origins)


def validate(
    model: type[Model], tree: Tree, origins: Mapping[str, str], default_file: str = "configs/base.yaml"
) -> Model:
    """Raises one UserError with a line per mistake. `default_file` is where a missing key belongs."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        items: list[dict[str, Any]] = [dict(item) for item in error.errors()]
        intended = {
            (*item["loc"][:-1], *nearest(str(item["loc"][-1]), _sibling_keys(model, _path(item))))
            for item in items
            if item["type"] == "extra_forbidden"
        }
        # Report a misspelt key once: the correct key, which is missing because of it, is not reported.
        items = [item for item in items if item["type"] != "missing" or item["loc"] not in intended]
        errors = {(each := _error(item, origins, model, default_file)).line: each for item in items}
        raise joined([errors[line] for line in sorted(errors)]) from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """{'optim': {'lr': 1}} -> {'optim.lr': 1}"""
    out: Tree = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= flatten(value, f"{dotted}.")
        else:
            out[dotted] = value
    return out


def result_knobs(config: Config) -> Tree:
    """The knobs that change results. They must be equal for a run to be continued."""
    return {key: value for key, value in flatten(config.model_dump()).items() if not _has_no_effect(key)}


def diff(old: Config, new: Config, everything: bool = False) -> dict[str, tuple[Any, Any]]:
    """Knob -> (old value, new value), of those that change results, or of all of them."""
    before, after = (flatten(c.model_dump()) if everything else result_knobs(c) for c in (old, new))
    return {k: (before.get(k), after.get(k)) for k in sorted(before | after) if before.get(k) != after.get(k)}


def changes_results(overrides: Iterable[str]) -> list[str]:
    return [text for text in overrides if not _has_no_effect(text.split("=")[0].strip())]


def nearest(word: str, words: Iterable[str], n: int = 1) -> list[str]:
    """The n words that are spelt most like `word`, ignoring case."""
    by_lower = {candidate.lower(): candidate for candidate in reversed(list(words))}
    return [by_lower[low] for low in difflib.get_close_matches(word.lower(), list(by_lower), n, cutoff=0.0)]


def _has_no_effect(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in NO_EFFECT_ON_RESULTS)


def _chain(folder: Path, experiment: str) -> list[Path]:
    """The files of an experiment, found by following `base:`: base.yaml first, the experiment last."""
    chain: list[Path] = []
    name: str | None = experiment
    while name is not None:
        file = folder / f"{name}.yaml"
        if not file.is_file():
            known = sorted(f.stem for f in folder.glob("*.yaml") if f.stem not in ("competition", "debug"))
            raise UserError(
                "experiment-unknown",
                where=f"configs/{chain[0].name}" if chain else "experiment",
                key="base" if chain else "",
                what=f"there is no configs/{name}.yaml",
                remedy=f"use one of {', '.join(known)}",
            )
        if file in chain:
            raise UserError(
                "base-circular", where=f"configs/{file.name}", key="base", what=f"{name} leads back to itself"
            )
        chain.insert(0, file)
        parent = _read(file, folder.parent)[0].get("base", "base" if name != "base" else None)
        name = str(parent) if parent is not None else None
    return chain


def _read_run(file: Path, root: Path, base: Tree) -> tuple[Tree, dict[str, str]]:
    """The knobs in the config.yaml of a run, and their origins; of those that equal base.yaml, the origin
    stays base.yaml. The section competition is left out: the current competition.yaml is used, as for an
    experiment."""
    tree, lines = parse(file, str(file.relative_to(root)))
    tree.pop("competition", None)
    values, defaults = flatten(tree), flatten(base)
    return tree, {k: line for k, line in lines.items() if k in values and values[k] != defaults.get(k)}


def _read(file: Path, root: Path) -> tuple[Tree, dict[str, str]]:
    tree, lines = parse(file, str(file.relative_to(root)))
    if file.name == "competition.yaml":
        return {"competition": tree}, {f"competition.{key}": line for key, line in lines.items()}
    return tree, lines


def parse(file: Path, name: str) -> tuple[Tree, dict[str, str]]:
    """The tree of a YAML file, and dotted key -> file:line. `name` is the file's name in messages."""
    try:
        tree, lines = yaml_lines.parse(file.read_bytes())
    except yaml_lines.YamlError as error:
        raise UserError("yaml-invalid", where=f"{name}:{error.line}", what=str(error)) from None
    except FileNotFoundError:
        raise UserError("file-missing", where=name, what="no such file") from None
    if not isinstance(tree, dict):
        raise UserError(
            "yaml-invalid", where=f"{name}:1", what=f"must consist of `key: value` lines, not {_kind(tree)}"
        )
    where = {key: f"{name}:{line}" for key, line in lines.items()}
    if found := list(secrets.find_in_config(tree, where, name)):
        raise joined(found)
    return tree, where


def _override(text: str, tree: Tree) -> tuple[Tree, dict[str, str]]:
    """Parses `optim.lr=3e-4`. A value for a section sets its main knob: `track=none` is `track.mode=none`."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(
            "override-invalid", where=repr(text), what="an override is written key=value, like optim.lr=3e-4"
        )
    try:
        parsed, _ = yaml_lines.parse(value.encode())
    except yaml_lines.YamlError as error:
        raise UserError("yaml-invalid", where=repr(text[:80]), what=str(error)) from None
    known = flatten(tree)
    section = [k for k in known if k.startswith(f"{key}.")]
    if section and not isinstance(parsed, dict):
        main = [f"{key}.{name}" for name in ("name", "mode", "recipe") if f"{key}.{name}" in known]
        if not main:
            raise UserError(
                "override-invalid",
                where=repr(text),
                key=key,
                what="is a section",
                remedy=f"set one of {', '.join(section)}",
            )
        key = main[0]
    out: Tree = {}
    node = out
    *parents, last = key.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = parsed
    return out, dict.fromkeys(
        [key, *(f"{key}.{k}" for k in flatten(parsed))] if isinstance(parsed, dict) else [key], f"{text!r}"
    )


def _merge(into: Tree, origins: dict[str, str], tree: Tree, lines: Mapping[str, str]) -> None:
    origins.update({key: line for key, line in lines.items() if key != "base"})
    _update(into, {key: value for key, value in tree.items() if key != "base"})


def _update(into: Tree, tree: Tree) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _update(into[key], value)
        else:
            into[key] = value


def _error(
    item: dict[str, Any], origins: Mapping[str, str], model: type[BaseModel], default_file: str
) -> UserError:
    """One of pydantic's errors with the file and line of its key."""
    path = _path(item)
    key = ".".join(str(part) for part in path)
    if item["type"] == "value_error":
        return _own_error(item["msg"].removeprefix("Value error, "), key, origins)
    where = _where(key, origins)
    if item["type"] == "extra_forbidden":
        close = nearest(str(path[-1]), _sibling_keys(model, path))
        remedy = f"the nearest is {close[0] if close else 'none'}"
        return UserError("key-unknown", where=where, key=key, what="no such key", remedy=remedy)
    if item["type"] == "missing":
        file = "configs/competition.yaml" if path[0] == "competition" else default_file
        return UserError("key-missing", where=_where(key, origins, file), key=key, what="is missing")
    value, message = item["input"], item["msg"].removeprefix("Value error, ")
    what = f"{message[0].lower()}{message[1:]}, not {value!r} ({_kind(value)})"
    choice = nearest(str(value), _choices(item))[0] if item["type"] == "literal_error" else ""
    remedy = f"the nearest is {choice}" if choice else ""
    return UserError("value-invalid", where=where, key=key, what=what, remedy=remedy)


def _own_error(message: str, section: str, origins: Mapping[str, str]) -> UserError:
    """Parses the ValueError("key: what; remedy") of a validator in schema.py; `key` is relative to the
    section."""
    key, found, what = message.partition(": ")
    if not found or " " in key:
        key, what = "", message
    candidates = [k for k in (f"{section}.{key}", f"competition.{key}", key) if k.strip(".") in origins]
    key = candidates[0].strip(".") if candidates else ".".join(part for part in (section, key) if part)
    what, _, remedy = what.partition("; ")
    return UserError("value-invalid", where=_where(key, origins), key=key, what=what, remedy=remedy)


def _where(key: str, origins: Mapping[str, str], default: str = "config") -> str:
    """file:line of a key, or of the nearest section around it that has one."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return default


def _path(item: Mapping[str, Any]) -> list[Any]:
    """pydantic's location without the members of a union."""
    return [part for part in item["loc"] if not (isinstance(part, str) and "[" in part)]


def _sibling_keys(model: type[BaseModel], path: list[Any]) -> list[str]:
    for part in path[:-1]:
        if isinstance(part, str) and part in model.model_fields:  # a number is an index into a list
            model = _section_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation: Stage of Stage, Stage | None or list[Stage]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner))), None)


def _choices(item: dict[str, Any]) -> list[str]:
    return [part.strip(" '") for part in item["ctx"]["expected"].replace(" or ", ",").split(",")]


def _kind(value: Any) -> str:
    names = {
        str: "text",
        bool: "true/false",
        int: "a whole number",
        float: "a number",
        list: "a list",
        dict: "a section",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
