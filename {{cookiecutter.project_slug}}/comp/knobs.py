"""Every knob of the project, typed. Knobs have no default here: configs/base.yaml is the one place where defaults, units
and costs stand. What a competition simply does not have (no groups, no time) may be left out of competition.yaml; those
are the only defaults in this file.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from comp import duration


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
WHITENED = 4096  # numbers of a picture: 64 x 64 grey, 36 x 36 in colour; the matrix is their square


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _lasting(value: object) -> object:
    try:
        duration.parse(value)
    except ValueError as error:
        raise PydanticCustomError("duration", "{said}", {"said": str(error)}) from None
    return value


Many = Annotated[list[Text], Field(min_length=1), BeforeValidator(_listed)]
# Kept as it was written: how many steps it is depends on the fold.
Duration = Annotated[float | str, PlainValidator(_lasting)]
Durations = Annotated[
    float | str | list[float | str],
    PlainValidator(
        lambda value: [_lasting(v) for v in value] if isinstance(value, list) else _lasting(value)
    ),
]
Scheme = Literal["kfold", "stratified", "group", "stratified_group", "quantiles", "time"]
TaskName = Literal["binary", "multiclass", "multilabel", "regression", "ordinal", "retrieval"]
FormName = Literal["label", "probability", "probabilities", "value", "labels", "ranking"]


class Table(Section):
    """Where rows come from and how a row names its images. `{column}` and `{column[0]}` stand for values of the row.

    Without a table the files are the rows: `files: "train/{label}/{id}.jpg"`, where `{name}` takes anything but a slash and
    `{name:cat|dog}` what the regular expression says.
    """

    table: Text | None = None
    image: Many | None = None
    files: Text | None = None
    id: Text | None = None

    @model_validator(mode="after")
    def _rows_from_somewhere(self) -> Table:
        if (self.table is None) == (self.files is None):
            raise ValueError(
                "say either table, with image, or files: a pattern of paths, where there is no table"
            )
        if self.table is not None and self.image is None:
            raise ValueError("table needs image: the path of a row's image, like train/{id}.png")
        return self


class Pixels(Section):
    """For pictures that are numbers (npy, parquet, json, DICOM): which become 0 and 255, and the shape of flat ones."""

    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    shape: Annotated[list[Count], Field(min_length=2, max_length=3)] | None = None


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
    sums_to_one: bool = False
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
    classes: Many | None = None
    group: Text | None = None
    time: Text | None = None
    metadata: list[Text] = []
    kernel: Kernel = Kernel()
    extra: list[Table] = []
    weight: Text | None = None
    votes: bool = False
    separator: Text = " "
    gather: bool = False
    row: Text | None = None
    merge: Literal["mean", "max"] = "mean"
    pixels: Pixels | None = None

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
    def _declared_together(self) -> Competition:
        if "group" in self.folds.scheme and self.group is None:
            raise ValueError(
                f"folds.scheme: {self.folds.scheme} needs competition.group, the column to keep together"
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


class Data(Section):
    size: Annotated[int, Field(ge=8, le=4096)]
    fit: Literal["stretch", "cover", "contain"]
    margin: Annotated[float, Field(ge=1, le=2)]
    channels: Annotated[int, Field(ge=1, le=64)]
    images: Count
    normalise: Literal["model", "data", "minmax", "none"]
    whiten: Literal["none", "pca", "zca"]
    whiten_eps: NotNegative
    cache: bool


class Augment(Section):
    recipe: Text
    policy: Text | None
    erase: Share
    mixup: NotNegative
    cutmix: NotNegative
    mix_share: Share
    mosaic: Share
    off_last: Annotated[int, Field(ge=0)]
    sizes: Annotated[list[Annotated[int, Field(ge=8, le=4096)]], Field(min_length=2)] | None

    @property
    def strong(self) -> list[str]:
        """What is on of what augment.off_last can switch off."""
        return [name for name in ("policy", "erase", "mixup", "cutmix", "mosaic") if getattr(self, name)]


class Sampling(Section):
    balance: Literal["none", "weighted", "under", "over"]
    strength: Share
    together: Count


class Model(Section):
    name: Text
    pretrained: bool
    drop_rate: BelowOne
    drop_path_rate: BelowOne
    pool: Literal["mean", "max"]
    metadata: bool


class Loss(Section):
    """Which loss takes which knob stands in comp/objective.py."""

    name: Text
    smoothing: BelowOne
    gamma: NotNegative | None
    gamma_positive: NotNegative | None
    alpha: Share | None
    shift: BelowOne | None
    epsilon: float | None
    share: Annotated[float, Field(gt=0, lt=1)] | None
    threshold: BelowOne | None
    delta: Positive | None
    bins: Annotated[int, Field(ge=2)] | None
    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    spread: Positive | None
    hardest: Annotated[float, Field(gt=0, le=1)]
    class_weights: Literal["none", "balanced", "effective"]
    beta: Annotated[float, Field(gt=0, lt=1)] | None


class Optim(Section):
    name: Literal["adamw", "sgd"]
    rate: Positive
    base_batch: Count | None
    scaling: Literal["linear", "root"]
    weight_decay: NotNegative
    momentum: BelowOne
    clip: Positive | None


ScheduleName = Literal[
    "constant", "linear", "step", "plateau", "cosine", "cosine_restarts", "one_cycle", "triangular", "exponential", "wsd"
]  # fmt: skip


class Schedule(Section):
    name: ScheduleName
    warmup: Duration
    final: Share
    every: Durations
    factor: Annotated[float, Field(gt=0, lt=1)]
    patience: Annotated[int, Field(ge=0)]
    cycles: Count
    multiplier: Annotated[float, Field(ge=1)]
    decay: Annotated[float, Field(gt=0, le=1)]
    start: Share
    rise: Annotated[float, Field(gt=0, lt=1)]
    anneal: Literal["cosine", "linear"]
    momentum: Annotated[list[BelowOne], Field(min_length=2, max_length=2)] | None
    cooldown: Duration


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
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
    workers: Annotated[int, Field(ge=0)]
    resident: Annotated[int, Field(ge=0)]
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
    sampling: Sampling
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
    def _one_cure(self) -> Config:
        balance, weights = self.sampling.balance, self.loss.class_weights
        if balance == "none" and self.sampling.strength != 1:
            raise ValueError(
                f"sampling.strength: {self.sampling.strength} has no effect with sampling.balance: none"
            )
        if balance != "none" and weights != "none":
            raise ValueError(
                f"loss.class_weights: {weights} and sampling.balance: {balance} make up for rare classes twice; choose one"
            )
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> Config:
        warmup = duration.parse(self.schedule.warmup).in_epochs(self.train.epochs)
        if warmup is not None and warmup >= self.train.epochs:
            raise ValueError(
                f"schedule.warmup: {warmup} epochs of warm-up leave nothing of train.epochs {self.train.epochs}"
            )
        knobs, epochs = self.augment, self.train.epochs
        if knobs.off_last and not knobs.strong:
            raise ValueError(
                f"augment.off_last: {knobs.off_last} has no effect, there is no policy, erase, mixup, cutmix or mosaic; set it to 0"
            )
        if knobs.strong and knobs.off_last >= epochs:
            raise ValueError(
                f"augment.off_last: {knobs.off_last} leaves no epoch with augment.{knobs.strong[0]}, train.epochs is {epochs}"
            )
        if knobs.mix_share != 1 and not (knobs.mixup or knobs.cutmix):
            raise ValueError(
                f"augment.mix_share: {knobs.mix_share} has no effect without mixup or cutmix; set it to 1"
            )
        if (knobs.mixup or knobs.cutmix or knobs.mosaic) and self.train.batch_size % (
            whole := 4 if knobs.mosaic else 2
        ):
            raise ValueError(
                f"train.batch_size: {self.train.batch_size} would part the {'fours of augment.mosaic' if whole == 4 else 'pairs of mixup and cutmix'}; a multiple of {whole} keeps them together"
            )
        data = self.data
        if data.whiten != "none" and (features := data.channels * data.size**2) > WHITENED:
            raise ValueError(
                f"data.whiten: {data.whiten} is for small pictures: {data.channels} x {data.size} x {data.size} are {features} numbers, and {WHITENED} the most"
            )
        if data.whiten != "none" and knobs.sizes:
            raise ValueError("data.whiten: knows pictures of data.size only; set augment.sizes to null")
        if knobs.sizes and len(knobs.sizes) > epochs:
            raise ValueError(f"augment.sizes: {len(knobs.sizes)} sizes do not fit into train.epochs {epochs}")
        if len(set(self.train.seeds)) < len(self.train.seeds):
            raise ValueError(f"train.seeds: {self.train.seeds} names a seed twice")
        return self
