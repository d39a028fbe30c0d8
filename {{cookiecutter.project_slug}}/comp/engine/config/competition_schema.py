"""The keys of configs/competition.yaml and their types, and the value types that all sections share. Keys
that a competition does not need (group, time) have defaults and may be left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Unlike pydantic's, asserts that all names exist: an old name of a knob would have no effect."""
        unknown = set(update or {}) - type(self).model_fields.keys()
        assert not unknown, f"{type(self).__name__} has no {sorted(unknown)}"
        return super().model_copy(update=update, deep=deep)


Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _label(value: object) -> object:
    """A label is text, but YAML reads 0 as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _labels(value: object) -> object:
    if isinstance(value, dict):
        return {_label(label): _label(host) for label, host in value.items()}
    return [_label(item) for item in value] if isinstance(value, list) else _as_list(value)


def matching(pattern: str, words: str) -> AfterValidator:
    """Validates text. `words`: what matches the pattern, for the error."""

    def validate(text: str) -> str:
        if not re.fullmatch(pattern, text, re.DOTALL):
            raise PydanticCustomError("pattern", "{words}", {"words": words})
        return text

    return AfterValidator(validate)


OneOrMore = Annotated[list[Text], Field(min_length=1), BeforeValidator(_as_list)]
Scheme = Literal["kfold", "stratified", "group", "stratified_group", "quantiles", "time"]
TaskName = Literal["binary", "multiclass", "multilabel", "regression", "ordinal", "retrieval"]
FormName = Literal["label", "probability", "probabilities", "value", "labels", "ranking"]


class Long(Section):
    """A table in long format, with a line for each class of a row: the column with the class, alone or in a
    pattern like `{id}_{class}`, and the column with the label. Without a label column, a line means that the
    class is present."""

    column: Text
    like: Annotated[str, matching(r".*\{class\}.*", "text with {class} in it")] = "{class}"
    value: Text | None = None


class Table(Section):
    """The rows and the paths of their images. `{column}` and `{column[0]}` are replaced by values of the row.

    Without a table, each file is a row: `files: "train/{label}/{id}.jpg"`, where `{name}` matches anything
    but a slash and `{name:cat|dog}` a regular expression.
    """

    table: Text | None = None
    image: OneOrMore | None = None
    files: Text | None = None
    id: Text | None = None
    long: Long | None = None
    columns: dict[Text, Text] = {}  # usual name -> name in this table

    @model_validator(mode="after")
    def _validate(self) -> Table:
        if (self.table is None) == (self.files is None):
            raise ValueError("needs either table and image, or files, a pattern of paths")
        if self.table is None and self.long is not None:
            raise ValueError("long: needs a table, but the rows come from files")
        if self.table is not None and self.image is None:
            raise ValueError("image: is missing; set it to the path of a row's image, like train/{id}.png")
        return self


class Pixels(Section):
    """How to read images.

    range    of images stored as arrays (npy, parquet, json, DICOM): the values that become 0 and 255
    shape    of images stored as flat lists: height, width and, if there are several, channels
    lenient  a JPEG that libjpeg warns about is used as far as it decodes; default: it counts as damaged
    """

    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    shape: Annotated[list[Count], Field(min_length=2, max_length=3)] | None = None
    lenient: bool = False


class Folds(Section):
    scheme: Scheme
    k: Annotated[int, Field(ge=2)]
    seed: int
    repeats: Count = 1
    holdout: BelowOne = 0.0
    gap: NotNegative = 0.0
    blind_to_groups: bool = False
    duplicates: Literal["ignore", "group"] = "ignore"


class Submission(Section):
    sample: Text
    form: FormName | dict[Text, FormName]
    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    sums_to_one: bool | None = None  # default: true for the probabilities of exclusive classes
    public: Annotated[float, Field(gt=0, lt=1)] | None = None
    rows: Text | None = None
    k: Count = 5
    none: str | None = None


class Kernel(Section):
    """Code competitions: the limits of Kaggle's machine."""

    hidden_rows: Count | None = (
        None  # of the hidden test set, as the host states; default: as many as test rows now
    )
    hours: Positive = 9.0
    ram: Positive = 13.0  # GB
    gpu: Literal["none", "NvidiaTeslaP100", "NvidiaTeslaT4"] = "NvidiaTeslaT4"


class Competition(Section):
    slug: str
    title: str
    raw: Text
    train: Table
    test: Table
    id: Text
    target: Annotated[list[Text] | dict[Text, TaskName], Field(min_length=1), BeforeValidator(_as_list)]
    task: TaskName | None = None
    metric: Text | dict[Text, Text]
    folds: Folds
    submission: Submission
    classes: (
        Annotated[list[Text] | dict[Text, Text], Field(min_length=1), BeforeValidator(_labels)] | None
    ) = None
    group: Text | None = None
    group_spelling: Literal["merge", "keep"] | None = None
    time: Text | None = None
    time_format: Text | None = None
    metadata: list[Text] = []
    image_columns: list[Text] | Literal["all"] = []
    unknown: Text | None = None
    kernel: Kernel = Kernel()
    extra: list[Table] = []
    weight: Text | None = None
    votes: bool = False
    separator: Text = " "
    gather: bool = False
    row: Text | None = None
    merge: Literal["mean", "max"] = "mean"
    pixels: Pixels | None = None
    drift: list[Literal["weights", "folds"]] = []

    @property
    def tasks(self) -> dict[str, TaskName]:
        """Target column -> task."""
        if isinstance(self.target, dict):
            return self.target
        assert self.task is not None
        return dict.fromkeys(self.target, self.task)

    @property
    def targets(self) -> list[str]:
        return list(self.target)

    @property
    def class_mapping(self) -> dict[str, str] | None:
        """Label in the tables -> the host's class, if competition.classes is a mapping."""
        return self.classes if isinstance(self.classes, dict) else None

    @property
    def class_list(self) -> list[str] | None:
        """The declared classes in order. The classes of a mapping are sorted if all are numbers; otherwise
        they keep the order of the mapping."""
        if not isinstance(self.classes, dict):
            return self.classes
        classes = list(dict.fromkeys(self.classes.values()))
        try:
            return sorted(classes, key=float)
        except ValueError:
            return classes

    @model_validator(mode="after")
    def _validate_classes(self) -> Competition:
        if isinstance(self.classes, dict) and len(self.targets) > 1:
            raise ValueError(
                f"classes: a mapping needs a single target, but the targets are {', '.join(self.targets)}"
            )
        if isinstance(self.classes, dict) and "regression" in self.tasks.values():
            raise ValueError("classes: have no meaning for task: regression; remove the key")
        return self

    @model_validator(mode="after")
    def _validate_columns(self) -> Competition:
        for key, column in (("group_spelling", "group"), ("time_format", "time")):
            if getattr(self, key) is not None and getattr(self, column) is None:
                raise ValueError(f"{key}: has no effect without competition.{column}")
        return self

    @model_validator(mode="after")
    def _validate_tasks(self) -> Competition:
        if isinstance(self.target, list) and self.task is None:
            raise ValueError(
                f"task: is missing; {self.target[0]!r} is one of {', '.join(get_args(TaskName))}"
            )
        if isinstance(self.target, dict) and self.task is not None:
            raise ValueError(
                f"task: {self.task} contradicts target, which has a task for each column; remove one of them"
            )
        for key, value in (("metric", self.metric), ("submission.form", self.submission.form)):
            if isinstance(value, dict) and set(value) != set(self.targets):
                raise ValueError(
                    f"{key}: has {', '.join(value)}, but the targets are {', '.join(self.targets)}"
                )
        return self

    @model_validator(mode="after")
    def _validate_image_columns(self) -> Competition:
        for name in self.image_columns if self.image_columns != "all" else ():
            if name in self.targets:
                raise ValueError(f"image_columns: {name!r} is a target, which test rows do not have")
            if name in ("image", "file"):
                raise ValueError(
                    f"image_columns: {name!r} is an argument of load_image already; rename the column with "
                    f"columns: {{{name}_column: {name}}}"
                )
        return self

    @model_validator(mode="after")
    def _validate_unknown(self) -> Competition:
        kinds = set(self.tasks.values())
        if self.unknown is not None and not kinds <= {"retrieval", "multiclass"}:
            raise ValueError(
                f"unknown: {self.unknown} is a class, but task {', '.join(sorted(kinds))} does not predict "
                "one of several"
            )
        return self

    @model_validator(mode="after")
    def _validate_folds(self) -> Competition:
        if "group" in self.folds.scheme and self.group is None:
            raise ValueError(
                f"folds.scheme: {self.folds.scheme} needs competition.group, the column whose groups stay "
                "together"
            )
        if "folds" in self.drift and not self.folds.scheme.startswith("stratified"):
            raise ValueError(
                f"drift: folds of scheme {self.folds.scheme} are not stratified; use stratified or "
                "stratified_group"
            )
        if self.folds.scheme == "time" and self.time is None:
            raise ValueError("folds.scheme: time needs competition.time, the column to order by")
        if self.folds.scheme == "time" and self.folds.duplicates == "group":
            raise ValueError("folds.duplicates: copies with different times cannot be in one fold; remove it")
        if self.folds.scheme == "time" and self.folds.repeats > 1:
            raise ValueError("folds.repeats: folds by time cannot be repeated; set it to 1")
        if self.group and "group" not in self.folds.scheme and not self.folds.blind_to_groups:
            raise ValueError(
                f"folds.scheme: {self.folds.scheme} ignores the group column {self.group!r}, "
                "so its groups leak across folds; "
                "use group or stratified_group, or set folds.blind_to_groups: true on purpose"
            )
        return self
