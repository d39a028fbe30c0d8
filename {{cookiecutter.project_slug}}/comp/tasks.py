"""One row a task: how a target is read, what the network puts out, and how a prediction is stored, merged and scored.

Classification is a row here, not the frame. A head is one target of a competition with its task; everything above works
on a tuple of heads, so several targets of different kinds are several heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Head:
    name: str
    task: str
    outputs: tuple[str, ...]  # names of the stored columns, in order
    columns: tuple[str, ...]  # target columns of the samples table
    classes: tuple[str, ...] = ()  # labels as the raw table writes them, by code

    @property
    def row(self) -> Task:
        return TASKS[self.task]


@dataclass(frozen=True)
class Task:
    losses: tuple[str, ...]  # that fit it, the default first
    metric: str  # the default
    space: str  # stored predictions are logits (nothing saturates in float32) or values
    raw_outputs: Callable[[Head, str], int]  # network outputs for a head under a loss
    target: Callable[[Array], NDArray]  # float columns (rows, columns) -> what loss and metric take
    decode: Callable[[Array, str], Array]  # network output under a loss -> what is stored
    probability: Callable[[Array], Array]  # stored -> what a metric or a submission takes
    store: Callable[[Array], Array]  # the way back
    label: Callable[[Array], NDArray[np.int64]]  # probability (or value) -> class codes, without fitted cut points


def softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def sigmoid(logits: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -logits))


def logit(p: Array) -> Array:
    return np.log(p) - np.log1p(-p)


# What keeps a stored logit finite. 1e-30 still orders rows; a probability of exactly 0 or 1 would not survive a logarithm.
SMALLEST = 1e-30


def _codes(columns: Array) -> NDArray:
    """One column of class codes, or one share per class (soft labels)."""
    return columns[:, 0].astype(np.int64) if columns.shape[1] == 1 else columns


def _above(scores: Array) -> Array:
    """Cumulative head: output k says how likely the grade is above k, so the expected grade is their sum."""
    return sigmoid(scores).sum(axis=1, keepdims=True)


def _identity(x: Array) -> Array:
    return x


TASKS: dict[str, Task] = {
    "binary": Task(
        losses=("bce",),
        metric="roc_auc",
        space="logit",
        raw_outputs=lambda head, loss: 1,
        target=lambda columns: columns[:, 0],
        decode=lambda raw, loss: raw,
        probability=sigmoid,
        store=lambda p: logit(np.clip(p, SMALLEST, 1 - 2**-53)),
        label=lambda p: (p[:, 0] >= 0.5).astype(np.int64),
    ),
    "multiclass": Task(
        losses=("cross_entropy",),
        metric="accuracy",
        space="logit",
        raw_outputs=lambda head, loss: len(head.outputs),
        target=_codes,
        decode=lambda raw, loss: log_softmax(raw),
        probability=softmax,
        store=lambda p: np.log(np.clip(p, SMALLEST, None)),
        label=lambda p: p.argmax(axis=1),
    ),
    "regression": Task(
        losses=("mse", "l1", "huber"),
        metric="rmse",
        space="value",
        raw_outputs=lambda head, loss: len(head.outputs),
        target=lambda columns: columns[:, 0] if columns.shape[1] == 1 else columns,
        decode=lambda raw, loss: raw,
        probability=_identity,
        store=_identity,
        label=lambda value: np.rint(value[:, 0]).astype(np.int64),
    ),
    "ordinal": Task(
        losses=("mse", "cumulative", "l1", "huber"),
        metric="qwk",
        space="value",
        raw_outputs=lambda head, loss: len(head.classes) - 1 if loss == "cumulative" else 1,
        target=lambda columns: columns[:, 0],
        decode=lambda raw, loss: _above(raw) if loss == "cumulative" else raw,
        probability=_identity,
        store=_identity,
        label=lambda value: np.rint(value[:, 0]).astype(np.int64),
    ),
}
