"""Every knob of a run, typed. Knobs have no default here: configs/base.yaml is the one place where defaults, units and costs
stand. The section `competition` is comp/engine/config/competition_schema.py.
"""

from __future__ import annotations

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
)

MAX_WHITENED = 4096  # numbers of a picture: 64 x 64 grey, 36 x 36 in colour; the matrix is their square


def _lasting(value: object) -> float | str:
    try:
        duration.parse(value)
    except ValueError as error:
        raise PydanticCustomError("duration", "{said}", {"said": str(error)}) from None
    return value if isinstance(value, str) else float(value)  # type: ignore[arg-type]


# Kept as it was written: how many steps it is depends on the fold.
Duration = Annotated[int | float | str, PlainValidator(_lasting)]
Durations = Annotated[
    int | float | str | list[int | float | str],
    PlainValidator(
        lambda value: [_lasting(v) for v in value] if isinstance(value, list) else _lasting(value)
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
        """Neighbours in the epoch's list that belong together: no pass may part them."""
        return 4 if self.mosaic else 2 if self.mixup or self.cutmix else self.jsd_views

    @property
    def strong_ops(self) -> list[str]:
        """What is on of what augment.disable_last_epochs can switch off."""
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
    pretrained: bool | Annotated[str, Field(pattern=r"^run:[A-Za-z0-9][\w.-]*$|\.(safetensors|pth|pt|bin)$")]
    freeze_norm: bool
    drop_rate: BelowOne
    drop_path_rate: BelowOne
    image_pool: Literal["mean", "max", "attention"]
    global_pool: Literal["default", "gem"]
    embedding_size: Count | None
    metadata: bool


class Loss(Section):
    """Which loss takes which knob stands in comp/engine/tasks/loss_knobs.py."""

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
    train: Annotated[str, Field(pattern=r"^(head|everything|last [1-9]\d* blocks?)$")]
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
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
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
        knobs, epochs = self.augment, self.train.epochs
        if knobs.disable_last_epochs and not knobs.strong_ops:
            raise ValueError(
                f"augment.disable_last_epochs: {knobs.disable_last_epochs} has no effect, there is no auto_augment, random_erasing, mixup, cutmix or mosaic; set it to 0"
            )
        if knobs.strong_ops and knobs.disable_last_epochs >= epochs:
            raise ValueError(
                f"augment.disable_last_epochs: {knobs.disable_last_epochs} leaves no epoch with augment.{knobs.strong_ops[0]}, train.epochs is {epochs}"
            )
        if knobs.mixup_prob != 1 and not (knobs.mixup or knobs.cutmix):
            raise ValueError(
                f"augment.mixup_prob: {knobs.mixup_prob} has no effect without mixup or cutmix; set it to 1"
            )
        mixes = bool(knobs.mixup or knobs.cutmix or knobs.mosaic)
        if mixes and knobs.jsd_views > 1:
            raise ValueError(
                f"augment.jsd_views: {knobs.jsd_views} of a picture stand side by side, so mixup, cutmix and mosaic would mix it with itself; set it to 1"
            )
        if self.train.batch_size % knobs.group_size:
            those = {
                True: {4: "fours of augment.mosaic", 2: "pairs of mixup and cutmix"},
                False: {knobs.group_size: "views of a picture"},
            }
            raise ValueError(
                f"train.batch_size: {self.train.batch_size} would part the {those[mixes][knobs.group_size]}; a multiple of {knobs.group_size} keeps them together"
            )
        data = self.data
        if data.whiten != "none" and (features := data.channels * data.size**2) > MAX_WHITENED:
            raise ValueError(
                f"data.whiten: {data.whiten} is for small pictures: {data.channels} x {data.size} x {data.size} are {features} numbers, and {MAX_WHITENED} the most"
            )
        if data.whiten != "none" and knobs.progressive_sizes:
            raise ValueError(
                "data.whiten: knows pictures of data.size only; set augment.progressive_sizes to null"
            )
        if knobs.progressive_sizes and len(knobs.progressive_sizes) > epochs:
            raise ValueError(
                f"augment.progressive_sizes: {len(knobs.progressive_sizes)} sizes do not fit into train.epochs {epochs}"
            )
        if len(set(self.train.seeds)) < len(self.train.seeds):
            raise ValueError(f"train.seeds: {self.train.seeds} names a seed twice")
        if fault := weights_error(self):
            raise ValueError(fault)
        return self


def weights_error(cfg: Config) -> str:
    """Why the weights that a run is to keep cannot be had, or would be kept in vain."""
    stages = cfg.train.stages
    cycles, average, select, epochs = cfg.snapshots.cycles, cfg.average, cfg.select, cfg.train.epochs
    said = average.predict_with
    speaks = ("raw" if cfg.train.ema_decay is None else "ema") if said == "default" else said
    wanted = {speaks, *average.members}
    chooses = select.name == "best" or "greedy" in wanted
    tail = "tail" in wanted or ("greedy" in wanted and cycles is None)
    faults = {
        f"snapshots.cycles: {cycles} cycles do not fit into {epochs} epochs": (cycles or 0) > epochs,
        f"snapshots.cycles: are cosines; schedule.name: {cfg.schedule.name} has no effect beside them, set it to cosine":
            cycles is not None and cfg.snapshots.restarts and cfg.schedule.name != "cosine",
        f"train.stages: their {sum(stage.epochs for stage in stages)} epochs are not the {epochs} of train.epochs":
            bool(stages) and sum(stage.epochs for stage in stages) != epochs,
        "train.stages: each has a schedule of its own, so snapshots.cycles has no place; one of the two": bool(stages) and cycles is not None,
        "train.stages: plateau looks back over stages; take another schedule.name": bool(stages) and cfg.schedule.name == "plateau",
        f"average.members: {speaks} is the run itself": speaks in average.members,
        "snapshots.restarts: has no effect without snapshots.cycles": not cfg.snapshots.restarts and cycles is None,
        "average.members: names one twice": len(set(average.members)) < len(average.members),
        "average: ema needs train.ema_decay, a decay like 0.999": "ema" in wanted and cfg.train.ema_decay is None,
        f"train.ema_decay: has no effect where average.predict_with is {speaks} and average.members has no ema":
            cfg.train.ema_decay is not None and "ema" not in wanted,
        "average: uniform is the mean of snapshots, and there are none; set snapshots.cycles, or take tail":
            "uniform" in wanted and cycles is None,
        f"average.tail_epochs: the last {average.tail_epochs} of {epochs} epochs are more than there are": tail and average.tail_epochs > epochs,
        f"select.name: best picks an epoch, and average.predict_with: {speaks} is made of several; one of the two":
            select.name == "best" and speaks not in ("raw", "ema"),
        "select.patience: has no effect without select.name: best": select.patience is not None and select.name != "best",
        "select.patience: may end training before all snapshots, swa or tail are there; without them, or patience: null":
            select.patience is not None and (cycles is not None or bool(wanted & {"swa", "tail", "greedy"})),
        "select.on: has no effect, nothing is chosen; set select.name: best, or average.predict_with: greedy":
            select.on == "fold" and not chooses,
    }  # fmt: skip
    return next((fault for fault, true in faults.items() if true), "")
