"""Rare classes: how often an epoch draws them, and how much their samples weigh. Both from the training part of the fold alone.

A row counts as its class: the likeliest where labels are shares, the rarest of its labels where it has several.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comp.engine.config.schema import Config
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import Refused
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import Head

Codes = NDArray[np.int64]
Sampler = Callable[
    [Positions, np.random.Generator], Positions
]  # which samples an epoch draws, in which order


def shuffle(rows: Positions, random: np.random.Generator) -> Positions:
    return random.permutation(rows)


def make_sampler(cfg: Config, samples: Samples, taught: Positions) -> Sampler:
    """How `sampling` makes the list of an epoch. Its length is the same in every epoch."""
    rules, views = cfg.sampling, cfg.augment.jsd_views
    if views > 1:  # side by side, each a draw of its own
        once = make_sampler(
            cfg.model_copy(update={"augment": cfg.augment.model_copy(update={"jsd_views": 1})}),
            samples,
            taught,
        )
        return lambda rows, random: np.repeat(once(rows, random), views)
    if rules.balance == "none" and rules.m_per_class == 1:
        return shuffle
    codes = np.full(len(samples.frame), -1, np.int64)
    codes[taught] = class_codes(_head(samples, rules.balance), samples, taught)

    def draw(rows: Positions, random: np.random.Generator) -> Positions:
        listed = BALANCES[rules.balance](rows, codes[rows], rules.strength, random)
        return (
            m_per_class(listed, codes[listed], rules.m_per_class, random) if rules.m_per_class > 1 else listed
        )

    return draw


def class_codes(head: Head, samples: Samples, rows: Positions) -> Codes:
    """What each row counts as."""
    targets = samples.targets(head)[rows]
    if head.task == "multilabel":
        has = targets >= 0.5
        rare = np.where(has, has.sum(axis=0), len(rows) + 1).argmin(axis=1)
        return np.where(has.any(axis=1), rare, targets.shape[1])  # rows without any label are a class too
    if targets.shape[1] > 1:
        return targets.argmax(axis=1)
    return np.rint(targets[:, 0]).astype(np.int64)


def _head(samples: Samples, balance: str) -> Head:
    what = f"sampling.balance: {balance}" if balance != "none" else "sampling.m_per_class"
    if len(samples.heads) > 1:
        names = ", ".join(head.name for head in samples.heads)
        raise Refused(
            f"{what}: which of {names} should be balanced? With several targets use loss.class_weights"
        )
    if not loss_knobs.has_classes(samples.heads[0]):
        raise Refused(
            f"{what}: has no effect on task {samples.heads[0].task}, which has no classes; set it back"
        )
    return samples.heads[0]


# --- the list of an epoch ------------------------------------------------------------------------------------------------


def weighted(rows: Positions, codes: Codes, strength: float, random: np.random.Generator) -> Positions:
    """As many draws as there are rows, with replacement: some rows come twice, some not at all."""
    _, place, count = np.unique(codes, return_inverse=True, return_counts=True)
    chance = (1.0 / count**strength)[place]
    return random.choice(rows, len(rows), p=chance / chance.sum())


def undersample(rows: Positions, codes: Codes, strength: float, random: np.random.Generator) -> Positions:
    """Each class as often as the rarest: others in every epoch."""
    return _as_often(rows, codes, strength, random, np.min)


def oversample(rows: Positions, codes: Codes, strength: float, random: np.random.Generator) -> Positions:
    """Each class as often as the most frequent: every row at least once, rare ones again, augmented anew each time."""
    return _as_often(rows, codes, strength, random, np.max)


def no_balance(rows: Positions, codes: Codes, strength: float, random: np.random.Generator) -> Positions:
    return shuffle(rows, random)


def _as_often(
    rows: Positions,
    codes: Codes,
    strength: float,
    random: np.random.Generator,
    like: Callable[[Codes], np.int64],
) -> Positions:
    each, count = np.unique(codes, return_counts=True)
    wanted = np.rint(count ** (1 - strength) * float(like(count)) ** strength).astype(np.int64)
    parts = []
    for code, often in zip(each, wanted.tolist(), strict=True):
        members = rows[codes == code]
        whole, rest = divmod(often, len(members))
        parts += [np.tile(members, whole), random.permutation(members)[:rest]]
    return random.permutation(np.concatenate(parts))


BALANCES = {"none": no_balance, "weighted": weighted, "under": undersample, "over": oversample}


def m_per_class(listed: Positions, codes: Codes, size: int, random: np.random.Generator) -> Positions:
    """Runs of `size` samples of one class, so that a batch holds pairs. What is left over of a class comes last."""
    order = np.argsort(codes, kind="stable")
    by_class = np.split(listed[order], np.flatnonzero(np.diff(codes[order])) + 1)
    runs = [part[at : at + size] for part in by_class for at in range(0, len(part), size)]
    runs = [runs[i] for i in random.permutation(len(runs))]
    return np.concatenate(sorted(runs, key=lambda run: len(run) < size))


# --- weights -------------------------------------------------------------------------------------------------------------


def class_weights(
    cfg: Config, head: Head, samples: Samples, taught: Positions
) -> Callable[[Tensor], Tensor] | None:
    """target -> a weight a sample, or a weight a label where yes and no are parted. Their mean over the taught rows is 1."""
    if cfg.loss.class_weights == "none" or not loss_knobs.has_classes(head):
        return None
    count = class_counts(head, samples, taught)
    beta = loss_knobs.BETA if cfg.loss.beta is None else cfg.loss.beta
    weight = balanced(count) if cfg.loss.class_weights == "balanced" else effective(count, beta)

    @cache
    def on(device: torch.device) -> Tensor:
        return torch.tensor(weight, dtype=torch.float32, device=device)

    def weigh(target: Tensor) -> Tensor:
        of = on(target.device)
        if of.ndim == 2:
            return of[1] * target + of[0] * (1 - target)
        return target @ of if target.ndim == 2 else of[target.long()]

    return weigh


def class_counts(head: Head, samples: Samples, taught: Positions) -> NDArray[np.float64]:
    """(classes,), or no and yes of each label, (2, labels)"""
    targets = samples.targets(head)[taught]
    if head.task in ("binary", "multilabel"):
        return np.stack([(1 - targets).sum(axis=0), targets.sum(axis=0)])
    if targets.shape[1] > 1:
        return np.asarray(targets.sum(axis=0))
    return np.bincount(targets[:, 0].astype(np.int64), minlength=len(head.classes)).astype(np.float64)


def balanced(count: NDArray[np.float64]) -> NDArray[np.float64]:
    """Every class weighs alike in the sum."""
    with np.errstate(divide="ignore"):
        return _mean_one(1 / count, count)


def effective(count: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    """Cui et al. 2019: of n samples only (1 - beta^n) / (1 - beta) say something new."""
    with np.errstate(divide="ignore"):
        return _mean_one((1 - beta) / -np.expm1(count * np.log(beta)), count)


def _mean_one(raw: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rate keeps its meaning. A class that is not taught weighs 1: only validation meets it."""
    there = count > 0
    raw = np.where(there, raw, 0.0)
    return np.where(there, raw * count.sum(axis=0) / (raw * count).sum(axis=0), 1.0)
