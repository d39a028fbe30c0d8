"""From configs/*.yaml and key=value to one frozen Config (knobs.py), every mistake answered in one line.

Order of precedence, weakest first: competition.yaml, base.yaml, the chain of `base:` of the experiment, the experiment (or
the config of a run in their place), debug.yaml with --debug, then key=value.
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
from comp.engine.errors import Refused
from comp.engine.store import secrets

__all__ = ["Config", "Refused", "Schedule"]


# What may change between two starts of the same run: none of it moves a single weight.
NO_EFFECT_ON_RESULTS = (
    "machine",
    "track",
    "keep",
    "train.seeds",
    "train.checkpoint_every",
    "competition.submission",
    "competition.metric",  # how a finished run is scored, not what it learned
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
    """Resolve an experiment of configs/. All mistakes of all files are reported at once. `run`: the config.yaml of a run, in
    the place of the experiment's file; see experiments.load."""
    folder = root / "configs"
    tree: Tree = {}
    origins: dict[str, str] = {}
    for file in [folder / "competition.yaml", *_chain(folder, "base" if run else experiment)]:
        _merge(tree, origins, *_read(file, root))
    if run is not None:
        _merge(tree, origins, *_of_run(run, root, tree))
    if debug:
        _merge(tree, origins, *_read(folder / "debug.yaml", root))
    for text in overrides:
        _merge(tree, origins, *_override(text, tree))
    return Loaded(validate_config(tree, origins), origins)


def from_yaml(path: Path) -> Config:
    """The resolved config that a run carries: from then on the only source.

    A knob that a template update brought later is not in it: then base.yaml speaks, whose defaults change nothing.
    """
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
    model: type[Model], tree: Tree, origins: Mapping[str, str], home: str = "configs/base.yaml"
) -> Model:
    """`home` is the file where a missing key belongs."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        items: list[dict[str, Any]] = [dict(item) for item in error.errors()]
        meant = {
            (*item["loc"][:-1], *nearest(str(item["loc"][-1]), _keys_beside(model, _keys(item))))
            for item in items
            if item["type"] == "extra_forbidden"
        }
        # A misspelt key is one mistake, not two: what is missing may be what it was meant for.
        items = [item for item in items if item["type"] != "missing" or item["loc"] not in meant]
        raise Refused(*sorted({_explain(item, origins, model, home) for item in items})) from None


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
    """The knobs that change results: what two runs of one name must agree on."""
    return {key: value for key, value in flatten(config.model_dump()).items() if not _has_no_effect(key)}


def diff(old: Config, new: Config, everything: bool = False) -> dict[str, tuple[Any, Any]]:
    before, after = (flatten(c.model_dump()) if everything else result_knobs(c) for c in (old, new))
    return {k: (before.get(k), after.get(k)) for k in sorted(before | after) if before.get(k) != after.get(k)}


def changes_results(overrides: Iterable[str]) -> list[str]:
    return [text for text in overrides if not _has_no_effect(text.split("=")[0].strip())]


def nearest(word: str, words: Iterable[str], n: int = 1) -> list[str]:
    """By spelling, whatever the case: of `id` the nearest is `ID`."""
    by_lower = {each.lower(): each for each in reversed(list(words))}
    return [by_lower[each] for each in difflib.get_close_matches(word.lower(), list(by_lower), n, cutoff=0.0)]


def _has_no_effect(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in NO_EFFECT_ON_RESULTS)


def _chain(folder: Path, experiment: str) -> list[Path]:
    """base.yaml first, the experiment last, following `base:` upwards."""
    chain: list[Path] = []
    name: str | None = experiment
    while name is not None:
        file = folder / f"{name}.yaml"
        if not file.is_file():
            known = sorted(f.stem for f in folder.glob("*.yaml") if f.stem not in ("competition", "debug"))
            where = f"configs/{chain[0].name}: base" if chain else "experiment"
            raise Refused(f"{where}: there is no configs/{name}.yaml; there are {', '.join(known)}")
        if file in chain:
            raise Refused(f"configs/{file.name}: base: {name} leads back to itself")
        chain.insert(0, file)
        parent = _read(file, folder.parent)[0].get("base", "base" if name != "base" else None)
        name = str(parent) if parent is not None else None
    return chain


def _of_run(file: Path, root: Path, base: Tree) -> tuple[Tree, dict[str, str]]:
    """The knobs of a run; those that are as in base.yaml keep their place there. How the competition is scored and split is
    what competition.yaml says now, as for an experiment."""
    tree, lines = parse(file, str(file.relative_to(root)))
    tree.pop("competition", None)
    ours, theirs = flatten(tree), flatten(base)
    return tree, {k: line for k, line in lines.items() if k in ours and ours[k] != theirs.get(k)}


def _read(file: Path, root: Path) -> tuple[Tree, dict[str, str]]:
    tree, lines = parse(file, str(file.relative_to(root)))
    if file.name == "competition.yaml":
        return {"competition": tree}, {f"competition.{key}": line for key, line in lines.items()}
    return tree, lines


def parse(file: Path, shown: str) -> tuple[Tree, dict[str, str]]:
    try:
        tree, lines = yaml_lines.parse(file.read_bytes())
    except yaml_lines.YamlError as error:
        raise Refused(f"{shown}:{error.line}: {error}") from None
    except FileNotFoundError:
        raise Refused(f"{shown}: no such file") from None
    if not isinstance(tree, dict):
        raise Refused(f"{shown}:1: a list of `key: value` lines is wanted, this is {_kind(tree)}")
    where = {key: f"{shown}:{line}" for key, line in lines.items()}
    if keys := list(secrets.find_in_config(tree, where, shown)):
        raise Refused(*keys)
    return tree, where


def _override(text: str, tree: Tree) -> tuple[Tree, dict[str, str]]:
    """`optim.lr=3e-4`. A plain value given to a section goes to its head: `track=none` is `track.mode=none`."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise Refused(f"{text!r}: an override is written key=value, like optim.lr=3e-4")
    try:
        parsed, _ = yaml_lines.parse(value.encode())
    except yaml_lines.YamlError as error:
        raise Refused(f"{text[:80]!r}: {error}") from None
    known = flatten(tree)
    section = [k for k in known if k.startswith(f"{key}.")]
    if section and not isinstance(parsed, dict):
        heads = [f"{key}.{head}" for head in ("name", "mode", "recipe") if f"{key}.{head}" in known]
        if not heads:
            raise Refused(f"{text!r}: {key} is a section; say which of {', '.join(section)}")
        key = heads[0]
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


def _explain(error: dict[str, Any], origins: Mapping[str, str], model: type[BaseModel], home: str) -> str:
    """One line: where, key, what is wrong, what is right."""
    parts = _keys(error)
    key = ".".join(str(p) for p in parts)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        inner = message.split(":")[0]
        key = next((k for k in (f"competition.{inner}", inner) if k in origins), key)
        return f"{_where(key, origins)}: {message}"
    if error["type"] == "extra_forbidden":
        close = nearest(str(parts[-1]), _keys_beside(model, parts))
        return f"{_where(key, origins)}: {key}: no such key; the nearest is {close[0] if close else 'none'}"
    if error["type"] == "missing":
        file = "configs/competition.yaml" if parts[0] == "competition" else home
        return f"{_where(key, origins, file)}: {key}: is missing"
    given = error["input"]
    hint = ""
    if error["type"] == "literal_error":
        hint = f"; the nearest is {nearest(str(given), _choices(error))[0]}"
    return f"{_where(key, origins)}: {key}: {message[0].lower()}{message[1:]}, not {given!r} ({_kind(given)}){hint}"


def _where(key: str, origins: Mapping[str, str], otherwise: str = "config") -> str:
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return otherwise


def _keys(error: Mapping[str, Any]) -> list[Any]:
    """Where pydantic found it, without the types of a union."""
    return [part for part in error["loc"] if not (isinstance(part, str) and "[" in part)]


def _keys_beside(model: type[BaseModel], parts: list[Any]) -> list[str]:
    for part in parts[:-1]:
        if isinstance(part, str) and part in model.model_fields:  # a number is a place in a list
            model = _section_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Of Stage, Stage | None or list[Stage] the model."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner))), None)


def _choices(error: dict[str, Any]) -> list[str]:
    return [part.strip(" '") for part in error["ctx"]["expected"].replace(" or ", ",").split(",")]


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
