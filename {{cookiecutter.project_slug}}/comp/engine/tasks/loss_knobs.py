"""What a head minimises: its loss by name, and the knobs that this loss takes. Names and numbers; the arithmetic is in comp/train.

A knob of `loss:` that is null means the loss's own value, the one in TAKES. A knob that no loss of the run takes is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comp.engine.config import run_members
from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.errors import Refused
from comp.engine.tasks.kinds import Head, HeadLoss

OFF = None
DEFAULTS: dict[str, dict[str, Any]] = {  # loss -> knob -> its own value
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
    "loss": {},  # your own
}
METRIC_LEARNING = ("arcface", "contrastive", "triplet")  # their predictions come from neighbours
EMBEDDING_SIZE, N_NEIGHBORS = 256, 5  # of an embedding; that vote
BETA = 0.999  # of class_weights: effective
COMMON = ("name", "ohem", "class_weights")  # beside those of TAKES


def metric_learning_loss(cfg: Config, heads: Sequence[Head]) -> HeadLoss | None:
    """The objective of a run that puts pictures of one class close together, or None."""
    found = head_losses(cfg, heads)[0]
    return found if found.name in METRIC_LEARNING else None


def head_losses(cfg: Config, heads: Sequence[Head]) -> list[HeadLoss]:
    """One for each head. What has no effect on any of them is refused by name, all at once."""
    found = [_head_loss(cfg, head) for head in heads]
    faults = [f"{knob}: {why}" for knob, why in _errors(cfg, heads, found)]
    if faults:
        raise Refused(*faults)
    return found


def _head_loss(cfg: Config, head: Head) -> HeadLoss:
    fit, name = head.spec.losses, cfg.loss.name
    name = fit[0] if name == "default" else name
    if name not in DEFAULTS:
        raise Refused(
            f"loss.name: there is no {name!r}; the nearest is {nearest(name, fit)[0]}, {head.task} takes {', '.join(fit)}"
        )
    if name != "loss" and name not in fit:
        raise Refused(f"loss.name: {name} does not fit task {head.task}; it takes {', '.join(fit)}")
    given = cfg.loss.model_dump()
    knobs = {key: own if given[key] is None else given[key] for key, own in DEFAULTS[name].items()}
    if name in METRIC_LEARNING:
        knobs["embedding"] = cfg.model.embedding_size or EMBEDDING_SIZE
    return HeadLoss(name, knobs)


def _errors(cfg: Config, heads: Sequence[Head], found: Sequence[HeadLoss]) -> list[tuple[str, str]]:
    names = ", ".join(dict.fromkeys(objective.name for objective in found))
    taken = {knob for objective in found for knob in objective.knobs}
    out = []
    for knob, value in cfg.loss.model_dump().items():
        if knob in (*COMMON, "beta") or knob in taken or value is None or value == 0:
            continue
        fit = [loss for loss, takes in DEFAULTS.items() if knob in takes]
        out.append((f"loss.{knob}", f"{value} has no effect on loss {names}; {', '.join(fit)} takes it"))
    if cfg.loss.class_weights != "none" and not any(has_classes(head) for head in heads):
        out.append(
            ("loss.class_weights", f"{cfg.loss.class_weights} has no effect on {heads[0].task}: no classes")
        )
    if cfg.loss.class_weights != "none" and "loss" in (objective.name for objective in found):
        out.append(("loss.class_weights", "has no effect on a loss of your own; weigh the classes in it"))
    if cfg.loss.beta is not None and cfg.loss.class_weights != "effective":
        out.append(
            ("loss.beta", f"{cfg.loss.beta} has no effect with class_weights: {cfg.loss.class_weights}")
        )
    embeds = [objective.name for objective in found if objective.name in METRIC_LEARNING]
    for knob, value in (
        ("model.embedding_size", cfg.model.embedding_size),
        ("predict.n_neighbors", cfg.predict.n_neighbors),
    ):
        if value is not None and not embeds:
            out.append(
                (knob, f"{value} has no effect on loss {names}; {', '.join(METRIC_LEARNING)} takes it")
            )
    if embeds and len(heads) > 1:
        out.append(
            (
                "loss.name",
                f"{embeds[0]} wants the one target alone; beside others retrieval takes cross_entropy",
            )
        )
    if embeds and embeds[0] != "arcface" and cfg.sampling.m_per_class < 2:
        out.append(
            ("loss.name", f"{embeds[0]} learns from pairs in a batch; set sampling.m_per_class to 4 or so")
        )
    if embeds and embeds[0] != "arcface" and run_members.selects_by_score(cfg):
        out.append(
            (
                "loss.name",
                f"{embeds[0]} has no centres to score an epoch by, so nothing can be chosen; arcface has",
            )
        )
    for head, objective in zip(heads, found, strict=True):
        if objective.knobs.get("alpha") is not None and head.exclusive:
            out.append(
                ("loss.alpha", f"parts yes from no; the classes of {head.task} are weighed by class_weights")
            )
        if objective.knobs.get("target_threshold") is not None and objective.knobs["label_smoothing"]:
            out.append(("loss.label_smoothing", "is undone by loss.target_threshold; set one of them"))
        if objective.name == "bins" and objective.knobs["range"] is None:
            out.append(("loss.range", "bins needs the lowest and highest target that can be, like [0, 100]"))
    return out


def has_classes(head: Head) -> bool:
    """Has classes that can be rare."""
    return head.task != "regression"
