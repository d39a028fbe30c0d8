"""Every knob, typed. Knobs have no default here: configs/base.yaml is the one place where defaults, units and costs stand.

Order of precedence, weakest first: competition.yaml, base.yaml, the chain of `base:` of the experiment, the experiment,
debug.yaml with --debug, then key=value. What a competition simply does not have (no groups, no time) may be left out of
competition.yaml; those are the only defaults in this file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from comp import yaml_lines


class Refused(Exception):
    """The user's mistake, or an artefact that must not be read: one line each, exit code 2."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = list(lines)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Many = Annotated[list[Text], Field(min_length=1), BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
Scheme = Literal["kfold", "stratified", "group", "stratified_group", "quantiles", "time"]
TaskName = Literal["binary", "multiclass", "regression", "ordinal"]


class Table(Section):
    """Where rows come from and how a row names its image. `{column}` and `{column[0]}` stand for values of the row."""

    table: Text
    image: Text


class Folds(Section):
    scheme: Scheme
    k: Annotated[int, Field(ge=2)]
    seed: int
    repeats: Count = 1
    holdout: BelowOne = 0.0
    gap: NotNegative = 0.0
    blind_to_groups: bool = False


class Submission(Section):
    sample: Text
    form: Literal["label", "probability", "probabilities", "value"]
    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    sums_to_one: bool = False


class Competition(Section):
    slug: str
    title: str
    raw: Text
    train: Table
    test: Table
    id: Text
    target: Many
    task: TaskName
    metric: Text
    folds: Folds
    submission: Submission
    classes: Many | None = None
    group: Text | None = None
    time: Text | None = None
    metadata: list[Text] = []

    @model_validator(mode="after")
    def _declared_together(self) -> Competition:
        if "group" in self.folds.scheme and self.group is None:
            raise ValueError(f"folds.scheme: {self.folds.scheme} needs competition.group, the column to keep together")
        if self.folds.scheme == "time" and self.time is None:
            raise ValueError("folds.scheme: time needs competition.time, the column to order by")
        if self.folds.scheme == "time" and self.folds.repeats > 1:
            raise ValueError("folds.repeats: the past comes once; time folds take repeats: 1")
        if self.group and "group" not in self.folds.scheme and not self.folds.blind_to_groups:
            raise ValueError(
                f"folds.scheme: {self.folds.scheme} ignores the group column {self.group!r}, so its groups leak across folds; "
                "use group or stratified_group, or say folds.blind_to_groups: true on purpose"
            )
        return self


class Data(Section):
    size: Annotated[int, Field(ge=8, le=4096)]
    fit: Literal["stretch", "cover", "contain"]
    margin: Annotated[float, Field(ge=1, le=2)]
    channels: Literal[1, 3]
    cache: bool


class Augment(Section):
    recipe: Text


class Model(Section):
    name: Text
    pretrained: bool
    drop_rate: BelowOne
    drop_path_rate: BelowOne


class Loss(Section):
    name: Text
    smoothing: BelowOne


class Optim(Section):
    name: Literal["adamw", "sgd"]
    rate: Positive
    weight_decay: NotNegative
    momentum: BelowOne
    clip: Positive | None


class Schedule(Section):
    name: Literal["cosine", "constant"]
    warmup: NotNegative
    final: Share


class Train(Section):
    epochs: Count
    batch_size: Count
    accumulate: Count
    amp: Literal["fp32", "fp16", "bf16"]
    ema: BelowOne | None
    threads: Count
    checkpoint_every: Annotated[int, Field(ge=0)]
    seeds: Annotated[list[int], Field(min_length=1)]
    limit: Count | None


class Predict(Section):
    tta: Many
    space: Literal["probability", "logit", "geometric"]
    batch_size: Count


class Machine(Section):
    device: Text
    workers: Annotated[int, Field(ge=0)]
    progress: bool


class Track(Section):
    mode: Literal["none", "offline", "online"]
    project: str | None
    entity: str | None
    checkpoints: bool


class Keep(Section):
    state: bool


class Config(Section):
    competition: Competition
    data: Data
    augment: Augment
    model: Model
    loss: Loss
    optim: Optim
    schedule: Schedule
    train: Train
    predict: Predict
    machine: Machine
    track: Track
    keep: Keep

    @model_validator(mode="after")
    def _fit_together(self) -> Config:
        if self.schedule.warmup >= self.train.epochs:
            raise ValueError(
                f"schedule.warmup: {self.schedule.warmup} epochs of warm-up leave nothing of train.epochs {self.train.epochs}"
            )
        if len(set(self.train.seeds)) < len(self.train.seeds):
            raise ValueError(f"train.seeds: {self.train.seeds} names a seed twice")
        return self


# What may change between two starts of the same run: none of it moves a single weight.
NOT_RESULTS = ("machine", "track", "keep", "train.seeds", "train.checkpoint_every", "competition.submission", "competition.title")


@dataclass(frozen=True)
class Loaded:
    config: Config
    origins: dict[str, str] = field(default_factory=dict)  # dotted key -> file:line or "command line"


Tree = dict[str, Any]


def load(root: Path, experiment: str, overrides: Iterable[str] = (), debug: bool = False) -> Loaded:
    """Resolve an experiment of configs/. All mistakes of all files are reported at once."""
    folder = root / "configs"
    files = [folder / "competition.yaml", *_chain(folder, experiment)]
    if debug:
        files.append(folder / "debug.yaml")
    tree: Tree = {}
    origins: dict[str, str] = {}
    for file in files:
        _merge(tree, origins, *_read(file, root))
    for text in overrides:
        _merge(tree, origins, *_override(text, tree))
    return Loaded(validated(tree, origins), origins)


def from_yaml(path: Path) -> Config:
    """The resolved config that a run carries: from then on the only source."""
    values, lines = _parse(path, path.name)
    return validated(values, lines)


def to_yaml(config: Config) -> str:
    return yaml_lines.dump(config.model_dump())


def validated(tree: Tree, origins: Mapping[str, str]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise Refused(*sorted({_explain(dict(item), origins) for item in error.errors()})) from None


def flat(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """{'optim': {'rate': 1}} -> {'optim.rate': 1}"""
    out: Tree = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= flat(value, f"{dotted}.")
        else:
            out[dotted] = value
    return out


def identity(config: Config) -> Tree:
    """The knobs that change results: what two runs of one name must agree on."""
    return {key: value for key, value in flat(config.model_dump()).items() if not _not_results(key)}


def difference(old: Config, new: Config, everything: bool = False) -> dict[str, tuple[Any, Any]]:
    before, after = (flat(c.model_dump()) if everything else identity(c) for c in (old, new))
    return {k: (before.get(k), after.get(k)) for k in sorted(before | after) if before.get(k) != after.get(k)}


def changes_results(overrides: Iterable[str]) -> list[str]:
    return [text for text in overrides if not _not_results(text.split("=")[0].strip())]


def nearest(word: str, words: Iterable[str], n: int = 1) -> list[str]:
    return difflib.get_close_matches(word, list(words), n, cutoff=0.0)


def _not_results(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in NOT_RESULTS)


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


def _read(file: Path, root: Path) -> tuple[Tree, dict[str, str]]:
    tree, lines = _parse(file, str(file.relative_to(root)))
    if file.name == "competition.yaml":
        return {"competition": tree}, {f"competition.{key}": line for key, line in lines.items()}
    return tree, lines


def _parse(file: Path, shown: str) -> tuple[Tree, dict[str, str]]:
    try:
        tree, lines = yaml_lines.parse(file.read_bytes())
    except yaml_lines.Unreadable as error:
        raise Refused(f"{shown}:{error.line}: {error}") from None
    except FileNotFoundError:
        raise Refused(f"{shown}: no such file") from None
    if not isinstance(tree, dict):
        raise Refused(f"{shown}:1: a list of `key: value` lines is wanted, this is {_kind(tree)}")
    return tree, {key: f"{shown}:{line}" for key, line in lines.items()}


def _override(text: str, tree: Tree) -> tuple[Tree, dict[str, str]]:
    """`optim.rate=3e-4`. A plain value given to a section goes to its head: `track=none` is `track.mode=none`."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise Refused(f"{text!r}: an override is written key=value, like optim.rate=3e-4")
    try:
        parsed, _ = yaml_lines.parse(value.encode())
    except yaml_lines.Unreadable as error:
        raise Refused(f"{text!r}: {error}") from None
    known = flat(tree)
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
    return out, dict.fromkeys([key, *(f"{key}.{k}" for k in flat(parsed))] if isinstance(parsed, dict) else [key], f"{text!r}")


def _merge(into: Tree, origins: dict[str, str], tree: Tree, lines: Mapping[str, str]) -> None:
    origins.update({key: line for key, line in lines.items() if key != "base"})
    _update(into, {key: value for key, value in tree.items() if key != "base"})


def _update(into: Tree, tree: Tree) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _update(into[key], value)
        else:
            into[key] = value


def _explain(error: dict[str, Any], origins: Mapping[str, str]) -> str:
    """One line: where, key, what is wrong, what is right."""
    parts = [p for p in error["loc"] if not (isinstance(p, str) and "[" in p)]
    key = ".".join(str(p) for p in parts)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        inner = message.split(":")[0]
        key = next((k for k in (f"competition.{inner}", inner) if k in origins), key)
        return f"{_where(key, origins)}: {message}"
    if error["type"] == "extra_forbidden":
        close = nearest(str(parts[-1]), _keys_beside(parts))
        return f"{_where(key, origins)}: {key}: no such key; the nearest is {close[0] if close else 'none'}"
    if error["type"] == "missing":
        file = "configs/competition.yaml" if parts[0] == "competition" else "configs/base.yaml"
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


def _keys_beside(parts: list[Any]) -> list[str]:
    model: Any = Config
    for part in parts[:-1]:
        annotation = model.model_fields[part].annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else model
    return list(model.model_fields)


def _choices(error: dict[str, Any]) -> list[str]:
    return [part.strip(" '") for part in error["ctx"]["expected"].replace(" or ", ",").split(",")]


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true/false", int: "a whole number", float: "a number", list: "a list", dict: "a section"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
