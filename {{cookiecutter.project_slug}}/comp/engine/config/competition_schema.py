"""What configs/competition.yaml may say, typed, and the kinds of values that all sections share. What a competition simply does
not have (no groups, no time) may be left out; those are the only defaults.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _label(value: object) -> object:
    """YAML reads 0 as a number; a label is text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _labels(value: object) -> object:
    if isinstance(value, dict):
        return {_label(ours): _label(theirs) for ours, theirs in value.items()}
    return [_label(each) for each in value] if isinstance(value, list) else _listed(value)


OneOrMore = Annotated[list[Text], Field(min_length=1), BeforeValidator(_listed)]
Scheme = Literal["kfold", "stratified", "group", "stratified_group", "quantiles", "time"]
TaskName = Literal["binary", "multiclass", "multilabel", "regression", "ordinal", "retrieval"]
FormName = Literal["label", "probability", "probabilities", "value", "labels", "ranking"]


class Long(Section):
    """A table with a line for each class of a row: which column says the class, alone or built like `{id}_{class}`, and which
    one the label. Without the latter a line says that the class is there."""

    column: Text
    like: Annotated[str, Field(pattern=r"\{class\}")] = "{class}"
    value: Text | None = None


class Table(Section):
    """Where rows come from and how a row names its images. `{column}` and `{column[0]}` stand for values of the row.

    Without a table the files are the rows: `files: "train/{label}/{id}.jpg"`, where `{name}` takes anything but a slash and
    `{name:cat|dog}` what the regular expression says.
    """

    table: Text | None = None
    image: OneOrMore | None = None
    files: Text | None = None
    id: Text | None = None
    long: Long | None = None
    columns: dict[Text, Text] = {}  # what is called so everywhere else -> what this table calls it

    @model_validator(mode="after")
    def _rows_from_somewhere(self) -> Table:
        if (self.table is None) == (self.files is None):
            raise ValueError(
                "say either table, with image, or files: a pattern of paths, where there is no table"
            )
        if self.table is None and self.long is not None:
            raise ValueError("long: is of a table, and files have none")
        if self.table is not None and self.image is None:
            raise ValueError("table needs image: the path of a row's image, like train/{id}.png")
        return self


class Pixels(Section):
    """For pictures that are numbers (npy, parquet, json, DICOM): which become 0 and 255, and the shape of flat ones. For JPEGs:
    whether one that libjpeg warns about is taken as far as it decodes, or damaged."""

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
    sums_to_one: bool | None = None  # where nothing is said: rows of probabilities that exclude each other do
    public: Annotated[float, Field(gt=0, lt=1)] | None = None
    rows: Text | None = None
    k: Count = 5
    none: str | None = None


class Kernel(Section):
    """A code competition: what Kaggle's machine will give the notebook."""

    hidden_rows: Count | None = None  # of the hidden test set, as the host says; as many as now, otherwise
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
    target: Annotated[list[Text] | dict[Text, TaskName], Field(min_length=1), BeforeValidator(_listed)]
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
        """Target column -> task; with several kinds of targets each has its own."""
        if isinstance(self.target, dict):
            return self.target
        assert self.task is not None
        return dict.fromkeys(self.target, self.task)

    @property
    def targets(self) -> list[str]:
        return list(self.target)

    @property
    def class_mapping(self) -> dict[str, str] | None:
        """Label of the tables -> the host's class, where competition.classes is a mapping."""
        return self.classes if isinstance(self.classes, dict) else None

    @property
    def class_list(self) -> list[str] | None:
        """The declared classes in their order: of a mapping by value where all are numbers, else as they come."""
        if not isinstance(self.classes, dict):
            return self.classes
        hosts = list(dict.fromkeys(self.classes.values()))
        try:
            return sorted(hosts, key=float)
        except ValueError:
            return hosts

    @model_validator(mode="after")
    def _classes_of_one_column(self) -> Competition:
        if isinstance(self.classes, dict) and len(self.targets) > 1:
            raise ValueError(
                f"classes: a mapping is of the labels of one column, and the targets are {', '.join(self.targets)}"
            )
        if isinstance(self.classes, dict) and "regression" in self.tasks.values():
            raise ValueError("classes: the numbers of task: regression have none; take classes out")
        return self

    @model_validator(mode="after")
    def _with_its_column(self) -> Competition:
        for key, column in (("group_spelling", "group"), ("time_format", "time")):
            if getattr(self, key) is not None and getattr(self, column) is None:
                raise ValueError(f"{key}: is of competition.{column}, and that names no column")
        return self

    @model_validator(mode="after")
    def _a_task_each(self) -> Competition:
        if isinstance(self.target, list) and self.task is None:
            raise ValueError(
                f"task: is missing; what is {self.target[0]!r}, {', '.join(get_args(TaskName))}?"
            )
        if isinstance(self.target, dict) and self.task is not None:
            raise ValueError(f"task: {self.task} and a target that names a task each; leave one of them out")
        for key, value in (("metric", self.metric), ("submission.form", self.submission.form)):
            if isinstance(value, dict) and set(value) != set(self.targets):
                raise ValueError(
                    f"{key}: names {', '.join(value)}, where the targets are {', '.join(self.targets)}"
                )
        return self

    @model_validator(mode="after")
    def _columns_of_an_image(self) -> Competition:
        for name in self.image_columns if self.image_columns != "all" else ():
            if name in self.targets:
                raise ValueError(f"image_columns: {name!r} is the target, which test rows do not have")
            if name in ("image", "file"):
                raise ValueError(
                    f"image_columns: load_image has a {name!r} of its own; call the column another way: columns: {{{name}_column: {name}}}"
                )
        return self

    @model_validator(mode="after")
    def _one_unknown(self) -> Competition:
        kinds = set(self.tasks.values())
        if self.unknown is not None and not kinds <= {"retrieval", "multiclass"}:
            raise ValueError(
                f"unknown: {self.unknown} is a class, and task {', '.join(sorted(kinds))} has none to choose from"
            )
        return self

    @model_validator(mode="after")
    def _declared_together(self) -> Competition:
        if "group" in self.folds.scheme and self.group is None:
            raise ValueError(
                f"folds.scheme: {self.folds.scheme} needs competition.group, the column to keep together"
            )
        if "folds" in self.drift and not self.folds.scheme.startswith("stratified"):
            raise ValueError(
                f"drift: folds of scheme {self.folds.scheme} spread nothing evenly; use stratified or stratified_group"
            )
        if self.folds.scheme == "time" and self.time is None:
            raise ValueError("folds.scheme: time needs competition.time, the column to order by")
        if self.folds.scheme == "time" and self.folds.duplicates == "group":
            raise ValueError(
                "folds.duplicates: copies of different times cannot stand together; leave it out"
            )
        if self.folds.scheme == "time" and self.folds.repeats > 1:
            raise ValueError("folds.repeats: the past comes once; time folds take repeats: 1")
        if self.group and "group" not in self.folds.scheme and not self.folds.blind_to_groups:
            raise ValueError(
                f"folds.scheme: {self.folds.scheme} ignores the group column {self.group!r}, so its groups leak across folds; "
                "use group or stratified_group, or say folds.blind_to_groups: true on purpose"
            )
        return self
