"""The tasks: binary, multiclass, multilabel, regression, ordinal, retrieval. An entry of TASKS defines the
encoding of a target, the number of outputs of the network, and how predictions are stored, averaged and
converted.

A head is one target of the competition with its task. All other code works on a tuple of heads, so a
competition with several targets of different kinds has several heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# A space in which predictions are averaged: (from stored values, back to stored values).
Space = tuple[Callable[[Array], Array], Callable[[Array], Array]]


@dataclass(frozen=True)
class Head:
    name: str
    task: str
    outputs: tuple[str, ...]  # names of the stored columns, in order
    columns: tuple[str, ...]  # target columns of the samples table
    classes: tuple[str, ...] = ()  # label of each class code, as in the raw table
    graded: tuple[str, ...] = ()  # outputs that the host scores; empty: all of them
    unknown: str = ""  # the class of rows that belong to none of the others

    @property
    def scored_indices(self) -> list[int]:
        """Indices of the outputs that the host scores."""
        return [i for i, name in enumerate(self.outputs) if not self.graded or name in self.graded]

    @property
    def spec(self) -> Task:
        return TASKS[self.task]

    @property
    def exclusive(self) -> bool:
        """Whether exactly one class is true: the outputs are one distribution."""
        return self.spec.spaces is EXCLUSIVE


@dataclass(frozen=True)
class HeadLoss:
    """The loss of a head with the values of its knobs; see loss_knobs.py."""

    name: str
    knobs: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    losses: tuple[str, ...]  # suitable ones, the default first
    metric: str  # default
    space: str  # stored predictions are "logit" (does not saturate in float32) or "value"
    num_outputs: Callable[[Head, HeadLoss], int]  # of the network, for a head with this loss
    encode_target: Callable[[Array], NDArray]  # (rows, columns) -> what loss and metric take
    decode: Callable[[Array, HeadLoss], Array]  # network output -> stored prediction
    to_probability: Callable[[Array], Array]  # stored prediction -> what a metric or a submission takes
    from_probability: Callable[[Array], Array]  # the inverse
    spaces: dict[str, Space]  # by name
    # probability or value -> class codes with default cut points (argmax, 0.5, rounding); multilabel: 0 and 1
    to_label: Callable[[Array], NDArray[np.int64]]


def softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def sigmoid(logits: Array) -> Array:
    with np.errstate(invalid="ignore"):  # NaN (a row never predicted) stays NaN
        return np.exp(-np.logaddexp(0.0, -logits))


def logit(p: Array) -> Array:
    return np.log(p) - np.log1p(-p)


# Lower bound of a probability, so that its logarithm stays finite. Small enough to keep the order of rows.
SMALLEST = 1e-30


def _codes(columns: Array) -> NDArray:
    """(rows,) class codes of a single column, or (rows, classes) soft labels."""
    return columns[:, 0].astype(np.int64) if columns.shape[1] == 1 else columns


def bin_centers(knobs: Mapping[str, Any]) -> Array:
    low, high = knobs["range"]
    return np.linspace(low, high, knobs["bins"])


def _decode_values(raw: Array, loss: HeadLoss) -> Array:
    """(rows, targets). Losses with several outputs per target predict the mean of a distribution."""
    if loss.name == "cumulative":  # output k is the logit of "the grade is above k"
        return sigmoid(raw).sum(axis=1, keepdims=True)
    if loss.name == "soft_labels":  # one output per grade
        return softmax(raw) @ np.arange(raw.shape[1])[:, None]
    if loss.name == "bins":
        centers = bin_centers(loss.knobs)
        return np.stack(
            [
                softmax(raw[:, at : at + len(centers)]) @ centers
                for at in range(0, raw.shape[1], len(centers))
            ],
            axis=1,
        )
    return raw


def _decode_multiclass(raw: Array, loss: HeadLoss) -> Array:
    """bce has an independent logit per class, normalized here to one distribution."""
    return log_softmax(_log_sigmoid(raw) if loss.name == "bce" else raw)


def _decode_embeddings(raw: Array, loss: HeadLoss) -> Array:
    """Log-probabilities of the classes by the class centers, for the log only: the stored predictions come
    from the nearest neighbors. (rows, 0) for losses without class centers."""
    if "embedding" not in loss.knobs:
        return log_softmax(raw)
    cosine = raw[:, loss.knobs["embedding"] :]
    return log_softmax(loss.knobs["scale"] * cosine) if cosine.shape[1] else cosine


def _embedding_outputs(head: Head, loss: HeadLoss) -> int:
    centers = 0 if loss.name in ("contrastive", "triplet") else len(head.outputs)
    return centers + loss.knobs.get("embedding", 0)


def _ordinal_outputs(head: Head, loss: HeadLoss) -> int:
    return {"cumulative": len(head.classes) - 1, "soft_labels": len(head.classes)}.get(loss.name, 1)


def _identity(x: Array) -> Array:
    return x


def _to_both_sides(logits: Array) -> Array:
    """(rows, outputs, 2): p and 1 - p, since floats are far more precise near 0 than near 1."""
    return np.stack([sigmoid(logits), sigmoid(-logits)], axis=-1)


def _from_both_sides(sides: Array) -> Array:
    floor = np.log(np.maximum(sides, 1e-300))  # negative weights can leave the range
    return floor[..., 0] - floor[..., 1]


def _log_sigmoid(logits: Array) -> Array:
    return -np.logaddexp(0.0, -logits)


def _from_log(log_p: Array) -> Array:
    log_p = np.clip(log_p, -690.0, -1e-300)
    return log_p - np.log(-np.expm1(log_p))


def _to_log(p: Array) -> Array:
    return log_softmax(np.log(np.clip(p, SMALLEST, None)))


INDEPENDENT: dict[str, Space] = {  # each output is an independent probability
    "probability": (_to_both_sides, _from_both_sides),
    "logit": (_identity, _identity),
    "geometric": (_log_sigmoid, _from_log),
}
EXCLUSIVE: dict[str, Space] = {  # outputs sum to 1: the normalized geometric mean is the mean of logits
    "probability": (softmax, _to_log),
    "logit": (_identity, log_softmax),
    "geometric": (_identity, log_softmax),
}
# Values are always averaged as they are.
VALUES: dict[str, Space] = dict.fromkeys(("probability", "logit", "geometric"), (_identity, _identity))


TASKS: dict[str, Task] = {
    "binary": Task(
        losses=("bce", "focal", "asymmetric", "poly"),
        metric="roc_auc",
        space="logit",
        num_outputs=lambda head, loss: 1,
        encode_target=lambda columns: columns[:, 0],
        decode=lambda raw, loss: raw,
        to_probability=sigmoid,
        from_probability=lambda p: logit(np.clip(p, SMALLEST, 1 - 2**-53)),
        spaces=INDEPENDENT,
        to_label=lambda p: (p[:, 0] >= 0.5).astype(np.int64),
    ),
    "multiclass": Task(
        losses=("cross_entropy", "kl", "focal", "poly", "jensen_shannon", "bce"),
        metric="accuracy",
        space="logit",
        num_outputs=lambda head, loss: len(head.outputs),
        encode_target=_codes,
        decode=_decode_multiclass,
        to_probability=softmax,
        from_probability=lambda p: np.log(np.clip(p, SMALLEST, None)),
        spaces=EXCLUSIVE,
        to_label=lambda p: p.argmax(axis=1),
    ),
    "multilabel": Task(
        losses=("bce", "focal", "asymmetric", "poly"),
        metric="mean_column_auc",
        space="logit",
        num_outputs=lambda head, loss: len(head.outputs),
        encode_target=_identity,
        decode=lambda raw, loss: raw,
        to_probability=sigmoid,
        from_probability=lambda p: logit(np.clip(p, SMALLEST, 1 - 2**-53)),
        spaces=INDEPENDENT,
        to_label=lambda p: (p >= 0.5).astype(np.int64),
    ),
    "retrieval": Task(
        losses=("arcface", "contrastive", "triplet", "cross_entropy", "focal", "poly", "jensen_shannon"),
        metric="map@5",
        space="logit",
        num_outputs=_embedding_outputs,
        encode_target=_codes,
        decode=_decode_embeddings,
        to_probability=softmax,
        from_probability=lambda p: np.log(np.clip(p, SMALLEST, None)),
        spaces=EXCLUSIVE,
        to_label=lambda p: p.argmax(axis=1),
    ),
    "regression": Task(
        losses=("mse", "l1", "huber", "log_cosh", "bins"),
        metric="rmse",
        space="value",
        num_outputs=lambda head, loss: len(head.outputs) * (loss.knobs["bins"] if loss.name == "bins" else 1),
        encode_target=lambda columns: columns[:, 0] if columns.shape[1] == 1 else columns,
        decode=_decode_values,
        to_probability=_identity,
        from_probability=_identity,
        spaces=VALUES,
        to_label=lambda value: np.rint(value[:, 0]).astype(np.int64),
    ),
    "ordinal": Task(
        losses=("mse", "cumulative", "soft_labels", "l1", "huber", "log_cosh"),
        metric="qwk",
        space="value",
        num_outputs=_ordinal_outputs,
        encode_target=lambda columns: columns[:, 0],
        decode=_decode_values,
        to_probability=_identity,
        from_probability=_identity,
        spaces=VALUES,
        to_label=lambda value: np.rint(value[:, 0]).astype(np.int64),
    ),
}
