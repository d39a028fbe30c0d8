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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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


SIMILAR = 0.7  # ratio of difflib; a name below it is no likely misspelling
MEANT = 2  # keys of one name in different sections that an error lists
SHOWN = 60  # characters of a wrong value
WANTED = {  # pydantic's type of an error -> what the value must be
    "bool_type": "true or false",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section of keys",
    "literal_error": "{expected}",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "text, and not empty",
}
UNION_MEMBERS = ("bool", "int", "float", "str", "constrained-str")  # as pydantic appends them to a key's path


@dataclass(frozen=True)
class Loaded:
    config: Config
    origins: dict[str, str] = field(default_factory=dict)  # dotted key -> file:line or "command line"

    def where(self, key: str) -> str:
        return _where(key, self.origins)

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Adds the place of the knob to a UserError that names a knob and no place."""
        try:
            yield
        except UserError as error:
            error.locate(lambda key: _where(key, self.origins, ""))
            raise


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
        errors = {
            (each := _error(alternatives, origins, model, default_file)).line: each
            for alternatives in _by_path(items)
        }
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


def nearest(word: str, words: Iterable[str], n: int = 1, cutoff: float = 0.0) -> list[str]:
    """The n words that are spelt most like `word`, ignoring case. `cutoff`: lowest ratio of difflib."""
    by_lower = {candidate.lower(): candidate for candidate in reversed(list(words))}
    return [by_lower[low] for low in difflib.get_close_matches(word.lower(), list(by_lower), n, cutoff)]


def _has_no_effect(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in NO_EFFECT_ON_RESULTS)


def _chain(folder: Path, experiment: str) -> list[Path]:
    """The files of an experiment, found by following `base:`: base.yaml first, the experiment last."""
    chain: list[Path] = []
    where = "experiment"
    name: str | None = experiment
    while name is not None:
        file = folder / f"{name}.yaml"
        if not file.is_file():
            known = sorted(f.stem for f in folder.glob("*.yaml") if f.stem not in ("competition", "debug"))
            raise UserError(
                "experiment-unknown",
                where=where,
                key="base" if chain else "",
                what=f"there is no configs/{name}.yaml",
                remedy=f"use one of {', '.join(known)}",
            )
        if file in chain:
            raise UserError("base-circular", where=where, key="base", what=f"{name} leads back to itself")
        chain.insert(0, file)
        tree, lines = _read(file, folder.parent)
        where = lines.get("base", f"configs/{file.name}")
        parent = tree.get("base", "base" if name != "base" else None)
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


def _by_path(items: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """pydantic's errors, those of one key together: one per member of its union. The error of a container is
    left out where one of its values has an error, since that member of the union fits better."""
    by_path: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for item in items:
        by_path.setdefault(tuple(_path(item)), []).append(item)
    return [
        found
        for path, found in by_path.items()
        if found[0]["type"] == "value_error"
        or not any(len(other) > len(path) and other[: len(path)] == path for other in by_path)
    ]


def _error(
    alternatives: list[dict[str, Any]],
    origins: Mapping[str, str],
    model: type[BaseModel],
    default_file: str,
) -> UserError:
    """pydantic's errors of one key as one, with the file and line of the key."""
    item = alternatives[0]
    path = _path(item)
    key = ".".join(str(part) for part in path)
    if item["type"] == "value_error":
        return _own_error(item["msg"].removeprefix("Value error, "), key, origins)
    where = _where(key, origins)
    if item["type"] == "extra_forbidden":
        remedy = _likely_key(path, model)
        return UserError("key-unknown", where=where, key=key, what="no such key", remedy=remedy)
    if item["type"] == "missing":
        file = "configs/competition.yaml" if path[0] == "competition" else default_file
        return UserError("key-missing", where=_where(key, origins, file), key=key, what="is missing")
    value = item["input"]
    wanted = list(dict.fromkeys(_wanted(each) for each in alternatives))
    what = f"must be {' or '.join(wanted)}, not {_shown(value)}"
    choices = [
        choice for each in alternatives if each["type"] == "literal_error" for choice in _choices(each)
    ]
    close = nearest(str(value), choices, cutoff=SIMILAR)
    remedy = f"did you mean {close[0]}?" if close else ""
    return UserError("value-invalid", where=where, key=key, what=what, remedy=remedy)


def _wanted(item: Mapping[str, Any]) -> str:
    """What the value must be, in words; pydantic's message where it has the form "Input should be …"."""
    if item["type"] in WANTED:
        return WANTED[item["type"]].format(**item.get("ctx", {}))
    return str(item["msg"]).removeprefix("Input should be ").removeprefix("should be ")


def _shown(value: Any) -> str:
    """On one line, as YAML has it; text in quotes."""
    text = repr(value) if isinstance(value, str) else yaml_lines.inline(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _likely_key(path: list[Any], model: type[BaseModel]) -> str:
    """The key that was probably meant. In this order: 1. the same name in another section; 2. a similar name
    in this section; 3. in another one. Otherwise the names of this section."""
    word, siblings = str(path[-1]), _sibling_keys(model, path)
    section = "".join(f"{part}." for part in path[:-1])
    by_name: dict[str, list[str]] = {}
    for key in _dotted_keys(model):
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    if word in by_name and len(by_name[word]) <= MEANT:
        return f"did you mean {' or '.join(by_name[word])}?"
    if close := nearest(word, siblings, cutoff=SIMILAR):
        return f"did you mean {section}{close[0]}?"
    if (close := nearest(word, by_name, cutoff=SIMILAR)) and len(by_name[close[0]]) <= MEANT:
        return f"did you mean {' or '.join(by_name[close[0]])}?"
    return f"{section.rstrip('.') or 'the config'} has {', '.join(siblings)}"


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field_ in model.model_fields.items():
        if isinstance(field_.annotation, type) and issubclass(field_.annotation, BaseModel):
            yield from _dotted_keys(field_.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


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
    """file:line of a key, or of the nearest section around it that has one, or of the first key inside."""
    inside = next((origin for other, origin in origins.items() if other.startswith(f"{key}.")), default)
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return inside


def _path(item: Mapping[str, Any]) -> list[Any]:
    """pydantic's location without the members of a union, like list[str] or, at the end, str."""
    path = [part for part in item["loc"] if not (isinstance(part, str) and "[" in part)]
    if len(path) > 1 and path[-1] in UNION_MEMBERS and item["type"] in WANTED:
        del path[-1]
    return path


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
