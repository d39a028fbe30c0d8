"""Class imbalance: samplers that balance an epoch, and class weights of the loss. Both use the training rows
of the fold only.

The class of a row is the most probable one of a soft label, and the rarest one of several labels.
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
from comp.engine.errors import UserError
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import Head

Codes = NDArray[np.int64]
# (train_rows, random generator) -> the rows of one epoch, in order
Sampler = Callable[[Positions, np.random.Generator], Positions]


def shuffle(rows: Positions, random: np.random.Generator) -> Positions:
    return random.permutation(rows)


def make_sampler(cfg: Config, samples: Samples, train_rows: Positions) -> Sampler:
    """The sampler of the section `sampling`. Every epoch has the same length."""
    sampling, views = cfg.sampling, cfg.augment.jsd_views
    if views > 1:  # views of a row are consecutive, and augmented independently
        one_view = cfg.augment.model_copy(update={"jsd_views": 1})
        once = make_sampler(cfg.model_copy(update={"augment": one_view}), samples, train_rows)
        return lambda rows, random: np.repeat(once(rows, random), views)
    if sampling.balance == "none" and sampling.m_per_class == 1:
        return shuffle
    codes = np.full(len(samples.frame), -1, np.int64)
    codes[train_rows] = class_codes(_balanced_head(samples, sampling.balance), samples, train_rows)

    def sample(rows: Positions, random: np.random.Generator) -> Positions:
        drawn = BALANCES[sampling.balance](rows, codes[rows], sampling.strength, random)
        if sampling.m_per_class > 1:
            return m_per_class(drawn, codes[drawn], sampling.m_per_class, random)
        return drawn

    return sample


def class_codes(head: Head, samples: Samples, rows: Positions) -> Codes:
    """(rows,): the class of each row."""
    targets = samples.targets(head)[rows]
    if head.task == "multilabel":
        has = targets >= 0.5
        rarest = np.where(has, has.sum(axis=0), len(rows) + 1).argmin(axis=1)
        return np.where(has.any(axis=1), rarest, targets.shape[1])  # rows without a label are one more class
    if targets.shape[1] > 1:
        return targets.argmax(axis=1)
    return np.rint(targets[:, 0]).astype(np.int64)


def _balanced_head(samples: Samples, balance: str) -> Head:
    key = "sampling.balance" if balance != "none" else "sampling.m_per_class"
    if len(samples.heads) > 1:
        names = ", ".join(head.name for head in samples.heads)
        raise UserError(
            "sampling-several-targets",
            key=key,
            what=f"the sampler balances one target, and there are several: {names}",
            remedy="use loss.class_weights",
        )
    head = samples.heads[0]
    if not loss_knobs.has_classes(head):
        raise UserError(
            "knob-without-effect",
            key=key,
            what=f"has no effect on task {head.task}, which has no classes",
            remedy="set it back to its default",
        )
    return head


# --- samplers ----------------------------------------------------------------------------------------------


def no_balance(rows: Positions, codes: Codes, strength: float, random: np.random.Generator) -> Positions:
    return shuffle(rows, random)


def weighted(rows: Positions, codes: Codes, strength: float, random: np.random.Generator) -> Positions:
    """Draws as many rows as there are, with replacement, like torch's WeightedRandomSampler."""
    _, index, count = np.unique(codes, return_inverse=True, return_counts=True)
    weight = (1.0 / count**strength)[index]
    return random.choice(rows, len(rows), p=weight / weight.sum())


def undersample(rows: Positions, codes: Codes, strength: float, random: np.random.Generator) -> Positions:
    """Draws each class as often as the rarest one, with different rows in every epoch."""
    return _resample(rows, codes, strength, random, np.min)


def oversample(rows: Positions, codes: Codes, strength: float, random: np.random.Generator) -> Positions:
    """Draws each class as often as the most frequent one: every row at least once, rows of rare classes
    several times."""
    return _resample(rows, codes, strength, random, np.max)


def _resample(
    rows: Positions,
    codes: Codes,
    strength: float,
    random: np.random.Generator,
    reference: Callable[[Codes], np.int64],
) -> Positions:
    """`strength` interpolates the count of each class between its own (0) and the reference (1), on a log
    scale."""
    classes, count = np.unique(codes, return_counts=True)
    wanted = np.rint(count ** (1 - strength) * float(reference(count)) ** strength).astype(np.int64)
    parts = []
    for code, number in zip(classes, wanted.tolist(), strict=True):
        members = rows[codes == code]
        repeats, rest = divmod(number, len(members))
        parts += [np.tile(members, repeats), random.permutation(members)[:rest]]
    return random.permutation(np.concatenate(parts))


BALANCES = {"none": no_balance, "weighted": weighted, "under": undersample, "over": oversample}


def m_per_class(drawn: Positions, codes: Codes, m: int, random: np.random.Generator) -> Positions:
    """Reorders `drawn` into runs of m rows of one class, so that every batch has pairs of a class. Shorter
    runs, the rest of each class, come last."""
    order = np.argsort(codes, kind="stable")
    by_class = np.split(drawn[order], np.flatnonzero(np.diff(codes[order])) + 1)
    runs = [part[at : at + m] for part in by_class for at in range(0, len(part), m)]
    runs = [runs[i] for i in random.permutation(len(runs))]
    return np.concatenate(sorted(runs, key=lambda run: len(run) < m))


# --- class weights -----------------------------------------------------------------------------------------


def class_weights(
    cfg: Config, head: Head, samples: Samples, train_rows: Positions
) -> Callable[[Tensor], Tensor] | None:
    """Returns a function of the target: the weights of loss.class_weights, (batch,), or (batch, labels) for
    independent labels. Their mean over the training rows is 1."""
    if cfg.loss.class_weights == "none" or not loss_knobs.has_classes(head):
        return None
    count = class_counts(head, samples, train_rows)
    beta = loss_knobs.BETA if cfg.loss.beta is None else cfg.loss.beta
    weight = balanced(count) if cfg.loss.class_weights == "balanced" else effective(count, beta)

    @cache
    def on(device: torch.device) -> Tensor:
        return torch.tensor(weight, dtype=torch.float32, device=device)

    def weigh(target: Tensor) -> Tensor:
        of_class = on(target.device)
        if of_class.ndim == 2:
            return of_class[1] * target + of_class[0] * (1 - target)
        return target @ of_class if target.ndim == 2 else of_class[target.long()]

    return weigh


def class_counts(head: Head, samples: Samples, train_rows: Positions) -> NDArray[np.float64]:
    """(classes,); or (2, labels), the number of rows without and with each label."""
    targets = samples.targets(head)[train_rows]
    if head.task in ("binary", "multilabel"):
        return np.stack([(1 - targets).sum(axis=0), targets.sum(axis=0)])
    if targets.shape[1] > 1:
        return np.asarray(targets.sum(axis=0))
    return np.bincount(targets[:, 0].astype(np.int64), minlength=len(head.classes)).astype(np.float64)


def balanced(count: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse frequency: every class has the same sum of weights."""
    with np.errstate(divide="ignore"):
        return _normalized(1 / count, count)


def effective(count: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    """Class-balanced loss, Cui et al. 2019: inverse to the effective number of samples, (1 - beta^n) / (1 -
    beta)."""
    with np.errstate(divide="ignore"):
        return _normalized((1 - beta) / -np.expm1(count * np.log(beta)), count)


def _normalized(raw: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scales weights to a mean of 1 over the training rows, so that the learning rate keeps its meaning. A
    class without training rows, which occurs in validation only, has weight 1."""
    present = count > 0
    raw = np.where(present, raw, 0.0)
    return np.where(present, raw * count.sum(axis=0) / (raw * count).sum(axis=0), 1.0)
