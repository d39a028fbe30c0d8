"""The type of every knob of a run. There are no defaults here: configs/base.yaml has them, with units and
costs. The section `competition` is in competition_schema.py.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from comp.engine.config import duration
from comp.engine.config.competition_schema import (
    BelowOne,
    Competition,
    Count,
    NotNegative,
    OneOrMore,
    Positive,
    Section,
    Share,
    Text,
    matching,
)

MAX_WHITENED = (
    4096  # values of an image: 64 x 64 grey, 36 x 36 in color; the whitening matrix has their square
)


def _duration(value: object) -> float | str:
    try:
        duration.parse(value)
    except ValueError as error:
        raise PydanticCustomError("duration", "{message}", {"message": str(error)}) from None
    return value if isinstance(value, str) else float(value)  # type: ignore[arg-type]


def _pretrained(value: object) -> bool | str:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and re.search(r"^run:[A-Za-z0-9][\w.-]*\Z|\.(safetensors|pth|pt|bin)\Z", value):
        return value
    words = "true, false, run:NAME, or a .safetensors, .pth, .pt or .bin file"
    raise PydanticCustomError("pattern", "{words}", {"words": words})


# Stored as it was written, since the number of steps depends on the fold.
Duration = Annotated[int | float | str, PlainValidator(_duration)]
Durations = Annotated[
    int | float | str | list[int | float | str],
    PlainValidator(
        lambda value: [_duration(v) for v in value] if isinstance(value, list) else _duration(value)
    ),
]


class Data(Section):
    size: Annotated[int, Field(ge=8, le=4096)]
    resize: Literal["stretch", "cover", "contain"]
    cache_scale: Annotated[float, Field(ge=1, le=2)]
    channels: Annotated[int, Field(ge=1, le=64)]
    bit_depth: Literal[8, 16, 32]
    max_images: Count
    normalize: Literal["model", "data", "minmax", "none"]
    whiten: Literal["none", "pca", "zca"]
    whiten_eps: NotNegative
    pseudo_labels: Text | None
    cache: bool


class Augment(Section):
    recipe: Text
    auto_augment: Text | None
    random_erasing: Share
    mixup: NotNegative
    cutmix: NotNegative
    mixup_prob: Share
    mosaic: Share
    jsd_views: Annotated[int, Field(ge=1, le=8)]
    disable_last_epochs: Annotated[int, Field(ge=0)]
    progressive_sizes: Annotated[list[Annotated[int, Field(ge=8, le=4096)]], Field(min_length=2)] | None

    @property
    def group_size(self) -> int:
        """Number of consecutive samples that belong together and must be in the same forward pass."""
        return 4 if self.mosaic else 2 if self.mixup or self.cutmix else self.jsd_views

    @property
    def strong_ops(self) -> list[str]:
        """Which of the ops that augment.disable_last_epochs switches off are on."""
        return [
            name
            for name in ("auto_augment", "random_erasing", "mixup", "cutmix", "mosaic")
            if getattr(self, name)
        ]


class Sampling(Section):
    balance: Literal["none", "weighted", "under", "over"]
    strength: Share
    m_per_class: Count


class Model(Section):
    name: Text
    stem: Literal["default", "small"]
    kwargs: dict[Text, bool | int | float | str | list[bool | int | float | str]]
    pretrained: Annotated[bool | str, PlainValidator(_pretrained)]
    freeze_norm: bool
    drop_rate: BelowOne
    drop_path_rate: BelowOne
    image_pool: Literal["mean", "max", "attention"]
    global_pool: Literal["default", "gem"]
    embedding_size: Count | None
    metadata: bool


class Loss(Section):
    """comp/engine/tasks/loss_knobs.py has the knobs of each loss."""

    name: Text
    label_smoothing: BelowOne
    gamma: NotNegative | None
    gamma_pos: NotNegative | None
    alpha: Share | None
    clip: BelowOne | None
    epsilon: float | None
    js_weight: Annotated[float, Field(gt=0, lt=1)] | None
    target_threshold: BelowOne | None
    delta: Positive | None
    bins: Annotated[int, Field(ge=2)] | None
    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    sigma: Positive | None
    margin: NotNegative | None
    margin_rare: NotNegative | None
    scale: Positive | None
    sub_centers: Count | None
    ohem: Annotated[float, Field(gt=0, le=1)]
    class_weights: Literal["none", "balanced", "effective"]
    beta: Annotated[float, Field(gt=0, lt=1)] | None


class Distill(Section):
    teacher: Text | None
    kind: Literal["soft", "hard"]
    temperature: Positive
    weight: Annotated[float, Field(gt=0, le=1)]


class Optim(Section):
    name: Text
    lr: Positive
    lr_base_size: Count | None
    lr_base_scale: Literal["linear", "sqrt"]
    momentum: BelowOne | None
    kwargs: dict[Text, bool | int | float | str | list[float]]
    weight_decay: NotNegative
    weight_decay_head: NotNegative | None
    l1: NotNegative
    l1_head: NotNegative | None
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None
    lookahead: Count | None
    clip_grad: Positive | None
    clip_mode: Literal["norm", "value", "agc"]


ScheduleName = Literal[
    "constant", "linear", "step", "plateau", "cosine", "cosine_restarts", "one_cycle", "triangular", "exp_range", "wsd"
]  # fmt: skip


class Schedule(Section):
    name: ScheduleName
    warmup: Duration
    min_lr_ratio: Share
    step_size: Durations
    factor: Annotated[float, Field(gt=0, lt=1)]
    patience: Annotated[int, Field(ge=0)]
    cycles: Count
    cycle_mul: Annotated[float, Field(ge=1)]
    cycle_decay: Annotated[float, Field(gt=0, le=1)]
    start_lr_ratio: Share
    pct_start: Annotated[float, Field(gt=0, lt=1)]
    anneal_strategy: Literal["cosine", "linear"]
    momentum: Annotated[list[BelowOne], Field(min_length=2, max_length=2)] | None
    cooldown: Duration


class Stage(Section):
    train: Annotated[
        str, matching(r"head|everything|last [1-9]\d* blocks?", "head, everything, or like last 2 blocks")
    ]
    epochs: Count
    lr: Positive


class Train(Section):
    stages: list[Stage]
    epochs: Count
    batch_size: Count
    grad_accum_steps: Count
    amp: Literal["fp32", "fp16", "bf16"]
    ema_decay: BelowOne | None
    grad_checkpointing: bool
    channels_last: bool
    compile: bool
    threads: Count
    checkpoint_every: Annotated[int, Field(ge=0)]
    seeds: Annotated[list[int], Field(min_length=1)]
    max_samples: Count | None


WeightsName = Literal["raw", "ema", "swa", "tail", "uniform", "greedy"]


class Snapshots(Section):
    cycles: Annotated[int, Field(ge=2)] | None
    restarts: bool
    last: Annotated[int, Field(ge=2)]


class Average(Section):
    predict_with: Literal["default", "raw", "ema", "swa", "tail", "uniform", "greedy"]
    members: list[WeightsName]
    swa_start: BelowOne
    tail_epochs: Annotated[int, Field(ge=2)]


class Select(Section):
    name: Literal["last", "best"]
    on: Literal["inner", "fold"]
    validation_fraction: Annotated[float, Field(gt=0, le=0.5)]
    patience: Count | None


class Predict(Section):
    tta: OneOrMore
    n_neighbors: Count | None
    averaging_space: Literal["probability", "logit", "geometric"]
    batch_size: Count


class Machine(Section):
    device: Annotated[str, matching(r"auto|cpu|mps|cuda(:\d+)?", "auto, cpu, mps, cuda or like cuda:1")]
    num_workers: Annotated[int, Field(ge=0)]
    gpu_cache_mb: Annotated[int, Field(ge=0)]
    progress: bool


class Track(Section):
    mode: Literal["none", "offline", "online"]
    project: str | None
    entity: str | None
    log_model: bool


class Keep(Section):
    optimizer_state: bool


class Config(Section):
    competition: Competition
    data: Data
    augment: Augment
    sampling: Sampling
    model: Model
    loss: Loss
    distill: Distill
    optim: Optim
    schedule: Schedule
    train: Train
    snapshots: Snapshots
    average: Average
    select: Select
    predict: Predict
    machine: Machine
    track: Track
    keep: Keep

    # Raise ValueError("section.key: what; remedy"): resolve.py makes a UserError of it.
    @model_validator(mode="after")
    def _validate_balance(self) -> Config:
        balance, weights = self.sampling.balance, self.loss.class_weights
        if balance == "none" and self.sampling.strength != 1:
            raise ValueError(
                f"sampling.strength: {self.sampling.strength} has no effect with sampling.balance: none; "
                "set it to 1"
            )
        if balance != "none" and weights != "none":
            raise ValueError(
                f"loss.class_weights: {weights} and sampling.balance: {balance} both compensate for rare "
                "classes; use one of them"
            )
        return self

    @model_validator(mode="after")
    def _validate_augment(self) -> Config:
        augment, epochs = self.augment, self.train.epochs
        last = augment.disable_last_epochs
        if last and not augment.strong_ops:
            raise ValueError(
                f"augment.disable_last_epochs: {last} has no effect without auto_augment, random_erasing, "
                "mixup, cutmix or mosaic; set it to 0"
            )
        if augment.strong_ops and last >= epochs:
            raise ValueError(
                f"augment.disable_last_epochs: {last} leaves no epoch with "
                f"augment.{augment.strong_ops[0]}, train.epochs is {epochs}"
            )
        if augment.mixup_prob != 1 and not (augment.mixup or augment.cutmix):
            raise ValueError(
                f"augment.mixup_prob: {augment.mixup_prob} has no effect without mixup or cutmix; set it to 1"
            )
        mixes = bool(augment.mixup or augment.cutmix or augment.mosaic)
        if mixes and augment.jsd_views > 1:
            raise ValueError(
                f"augment.jsd_views: {augment.jsd_views} views of an image are consecutive in the batch, "
                "so mixup, cutmix and mosaic would mix an image with itself; set it to 1"
            )
        size = augment.group_size
        if self.train.batch_size % size:
            group = f"views of an image (augment.jsd_views: {size})"
            if mixes:
                group = "fours of augment.mosaic" if size == 4 else "pairs of mixup and cutmix"
            raise ValueError(
                f"train.batch_size: {self.train.batch_size} would split the {group}; use a multiple of {size}"
            )
        return self

    @model_validator(mode="after")
    def _validate_sizes(self) -> Config:
        data, sizes = self.data, self.augment.progressive_sizes
        if data.whiten != "none" and (values := data.channels * data.size**2) > MAX_WHITENED:
            raise ValueError(
                f"data.whiten: {data.whiten} is for small images: "
                f"{data.channels} x {data.size} x {data.size} are {values} values, "
                f"at most {MAX_WHITENED} are supported"
            )
        if data.whiten != "none" and sizes:
            raise ValueError(
                "data.whiten: needs images of one size, data.size; set augment.progressive_sizes to null"
            )
        if sizes and len(sizes) > self.train.epochs:
            raise ValueError(
                f"augment.progressive_sizes: {len(sizes)} sizes are more than train.epochs: "
                f"{self.train.epochs}"
            )
        if len(set(self.train.seeds)) < len(self.train.seeds):
            raise ValueError(f"train.seeds: {self.train.seeds} contains a seed twice")
        if error := weights_error(self):
            raise ValueError(error)
        return self


def weights_error(cfg: Config) -> str:
    """The error of a combination of snapshots, averages and selection that is impossible or has an unused
    knob; empty if there is none."""
    stages = cfg.train.stages
    cycles, average, select, epochs = cfg.snapshots.cycles, cfg.average, cfg.select, cfg.train.epochs
    default = "raw" if cfg.train.ema_decay is None else "ema"
    final = default if average.predict_with == "default" else average.predict_with
    wanted = {final, *average.members}
    selects = select.name == "best" or "greedy" in wanted
    tail = "tail" in wanted or ("greedy" in wanted and cycles is None)
    errors = {
        f"snapshots.cycles: {cycles} cycles are more than train.epochs: {epochs}": (cycles or 0) > epochs,
        f"snapshots.cycles: follow a cosine, so schedule.name: {cfg.schedule.name} has no effect; set it to cosine":
            cycles is not None and cfg.snapshots.restarts and cfg.schedule.name != "cosine",
        f"train.stages: have {sum(stage.epochs for stage in stages)} epochs, train.epochs is {epochs}":
            bool(stages) and sum(stage.epochs for stage in stages) != epochs,
        "train.stages: each stage has a schedule of its own; remove snapshots.cycles or train.stages": bool(stages) and cycles is not None,
        "train.stages: plateau would compare losses of different stages; use another schedule.name":
            bool(stages) and cfg.schedule.name == "plateau",
        f"average.members: contains {final}, which are the run's own weights; remove it": final in average.members,
        "snapshots.restarts: false has no effect without snapshots.cycles": not cfg.snapshots.restarts and cycles is None,
        "average.members: contains a name twice": len(set(average.members)) < len(average.members),
        "average: ema needs train.ema_decay; set it to 0.999 or so": "ema" in wanted and cfg.train.ema_decay is None,
        f"train.ema_decay: has no effect, since average.predict_with is {final} and average.members has no ema; set train.ema_decay: null, or average.members: [ema]":
            cfg.train.ema_decay is not None and "ema" not in wanted,
        "average: uniform is the mean of snapshots; set snapshots.cycles, or use tail": "uniform" in wanted and cycles is None,
        f"average.tail_epochs: {average.tail_epochs} are more than train.epochs: {epochs}": tail and average.tail_epochs > epochs,
        f"select.name: best selects one epoch, but average.predict_with: {final} averages several; use one of them":
            select.name == "best" and final not in ("raw", "ema"),
        "select.patience: has no effect without select.name: best": select.patience is not None and select.name != "best",
        "select.patience: may stop training before all snapshots, swa or tail epochs; remove those, or set patience: null":
            select.patience is not None and (cycles is not None or bool(wanted & {"swa", "tail", "greedy"})),
        "select.on: has no effect, since nothing is selected; set select.name: best, or average.predict_with: greedy":
            select.on == "fold" and not selects,
    }  # fmt: skip
    return next((error for error, wrong in errors.items() if wrong), "")
