"""The loss of each head, and which knobs of `loss:` it takes. The formulas are in comp/losses.py.

A knob that is null has the default of the loss, in DEFAULTS. A knob that is set although no loss of the run
takes it raises UserError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.config import run_members
from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.errors import UserError, joined
from comp.engine.tasks.kinds import Head, HeadLoss

OFF = None
DEFAULTS: dict[str, dict[str, Any]] = {  # loss -> knob -> default
    "cross_entropy": {"label_smoothing": 0.0},
    "kl": {"label_smoothing": 0.0},
    "focal": {"label_smoothing": 0.0, "gamma": 2.0, "alpha": OFF},
    "poly": {"label_smoothing": 0.0, "epsilon": 1.0},
    "jensen_shannon": {"label_smoothing": 0.0, "js_weight": 0.5},
    "bce": {"label_smoothing": 0.0, "target_threshold": OFF},
    "asymmetric": {"label_smoothing": 0.0, "gamma": 4.0, "gamma_pos": 1.0, "clip": 0.05},
    "mse": {},
    "l1": {},
    "huber": {"delta": 1.0},
    "log_cosh": {},
    "bins": {"label_smoothing": 0.0, "bins": 32, "range": OFF},
    "cumulative": {},
    "soft_labels": {"sigma": 0.5},
    "arcface": {"margin": 0.3, "margin_rare": OFF, "scale": 30.0, "sub_centers": 1},
    "contrastive": {"margin": 1.0},
    "triplet": {"margin": 0.3},
    "loss": {},  # the function of comp/competition.py
}
METRIC_LEARNING = (
    "arcface",
    "contrastive",
    "triplet",
)  # trained on embeddings; predictions come from the nearest neighbors
EMBEDDING_SIZE, N_NEIGHBORS = 256, 5  # defaults of model.embedding_size and predict.n_neighbors
BETA = 0.999  # default of loss.beta
COMMON = ("name", "ohem", "class_weights")  # knobs that every loss takes


def metric_learning_loss(cfg: Config, heads: Sequence[Head]) -> HeadLoss | None:
    """The loss of a run that learns embeddings (arcface, contrastive, triplet), otherwise None."""
    loss = head_losses(cfg, heads)[0]
    return loss if loss.name in METRIC_LEARNING else None


def head_losses(cfg: Config, heads: Sequence[Head]) -> list[HeadLoss]:
    """The loss of each head. Raises one UserError for all unused knobs and impossible combinations."""
    losses = [_head_loss(cfg, head) for head in heads]
    if errors := [*_unused(cfg, heads, losses), *_incompatible(cfg, heads, losses)]:
        raise joined(errors)
    return losses


def _head_loss(cfg: Config, head: Head) -> HeadLoss:
    suitable, name = head.spec.losses, cfg.loss.name
    name = suitable[0] if name == "default" else name
    takes = f"{head.task} takes {', '.join(suitable)}"
    if name not in DEFAULTS:
        close = nearest(name, suitable)[0]
        raise UserError(
            "loss-unknown",
            key="loss.name",
            what=f"there is no {name!r}",
            remedy=f"the nearest is {close}, {takes}",
        )
    if name != "loss" and name not in suitable:
        raise UserError(
            "loss-unsuitable", key="loss.name", what=f"{name} does not fit task {head.task}", remedy=takes
        )
    values = cfg.loss.model_dump()
    knobs = {key: default if values[key] is None else values[key] for key, default in DEFAULTS[name].items()}
    if name in METRIC_LEARNING:
        knobs["embedding"] = cfg.model.embedding_size or EMBEDDING_SIZE
    return HeadLoss(name, knobs)


def _unused(cfg: Config, heads: Sequence[Head], losses: Sequence[HeadLoss]) -> list[UserError]:
    """Knobs that have no effect on the losses of the run."""
    names = ", ".join(dict.fromkeys(loss.name for loss in losses))
    taken = {knob for loss in losses for knob in loss.knobs}
    out = []
    for knob, value in cfg.loss.model_dump().items():
        if knob in (*COMMON, "beta") or knob in taken or value is None or value == 0:
            continue
        used_by = _only([loss for loss, knobs in DEFAULTS.items() if knob in knobs])
        out.append(_no_effect(f"loss.{knob}", f"{value} has no effect on loss {names}", used_by))
    weights = cfg.loss.class_weights
    if weights != "none" and not any(has_classes(head) for head in heads):
        what = f"{weights} has no effect on {heads[0].task}: no classes"
        out.append(_no_effect("loss.class_weights", what, "set it to none"))
    if weights != "none" and "loss" in (loss.name for loss in losses):
        what = "has no effect on the loss of comp/competition.py"
        out.append(_no_effect("loss.class_weights", what, "weight the classes in that function"))
    if cfg.loss.beta is not None and weights != "effective":
        what = f"{cfg.loss.beta} has no effect with class_weights: {weights}"
        out.append(_no_effect("loss.beta", what, "set it to null"))
    if not any(loss.name in METRIC_LEARNING for loss in losses):
        for key, value in (
            ("model.embedding_size", cfg.model.embedding_size),
            ("predict.n_neighbors", cfg.predict.n_neighbors),
        ):
            if value is not None:
                what = f"{value} has no effect on loss {names}"
                out.append(_no_effect(key, what, _only(METRIC_LEARNING)))
    return out


def _only(losses: Sequence[str]) -> str:
    *others, last = losses
    return f"only {', '.join(others)} and {last} use it" if others else f"only {last} uses it"


def _incompatible(cfg: Config, heads: Sequence[Head], losses: Sequence[HeadLoss]) -> list[UserError]:
    """Combinations of knobs and heads that cannot work."""
    out = []
    embedding = next((loss.name for loss in losses if loss.name in METRIC_LEARNING), "")
    if embedding and len(heads) > 1:
        what = f"{embedding} needs a single target"
        out.append(_invalid("loss.name", what, "with several targets retrieval takes cross_entropy"))
    if embedding and embedding != "arcface" and cfg.sampling.m_per_class < 2:
        what = f"{embedding} is computed on pairs within a batch"
        out.append(_invalid("loss.name", what, "set sampling.m_per_class to 4 or so"))
    if embedding and embedding != "arcface" and run_members.selects_by_score(cfg):
        what = f"{embedding} has no class centers to score an epoch with, so nothing can be selected"
        out.append(_invalid("loss.name", what, "use arcface"))
    for head, loss in zip(heads, losses, strict=True):
        if loss.knobs.get("alpha") is not None and head.exclusive:
            what = f"weights positive against negative labels, and {head.task} has exclusive classes"
            out.append(_invalid("loss.alpha", what, "use loss.class_weights"))
        if loss.knobs.get("target_threshold") is not None and loss.knobs["label_smoothing"]:
            what = "is undone by loss.target_threshold"
            out.append(_invalid("loss.label_smoothing", what, "set one of them"))
        if loss.name == "bins" and loss.knobs["range"] is None:
            what = "bins needs the lowest and highest possible target"
            out.append(_invalid("loss.range", what, "set it to [0, 100] or so"))
    return out


def _no_effect(key: str, what: str, remedy: str) -> UserError:
    return UserError("knob-unused", key=key, what=what, remedy=remedy)


def _invalid(key: str, what: str, remedy: str) -> UserError:
    return UserError("knob-invalid", key=key, what=what, remedy=remedy)


def has_classes(head: Head) -> bool:
    """Whether loss.class_weights applies: all tasks but regression."""
    return head.task != "regression"


def validate_range(objective: HeadLoss, head: Head, values: NDArray[np.floating]) -> None:
    """`values`: the targets of the training rows, for the loss bins."""
    low, high = objective.knobs["range"]
    if values.min() < low or values.max() > high:
        raise UserError(
            "target-out-of-range",
            key="loss.range",
            what=f"{low:g} to {high:g} does not contain the targets of {head.name}, "
            f"{values.min():g} to {values.max():g}",
            remedy="widen it",
        )
