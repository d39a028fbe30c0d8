"""Applies one fitted method to predictions: weights, linear models, networks, trees, from the numbers in
apply.json.

In plain numpy, so that a Kaggle kernel needs no matching version of scikit-learn and nothing that is loaded
can run code. Sums run over members or features one after the other, so one row gives the same bits alone and
in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank.predictions import average
from comp.engine.ensemble.spaces import to_space
from comp.engine.errors import UserError
from comp.engine.tasks.kinds import Array, Head, log_softmax, logit, sigmoid

LOGIT_RANGE = 30.0  # logits are clipped to it as inputs of a stacker: larger ones only destabilise the fit
BLOCK = 65_536  # numbers of all members per block of rows
CLIP = 1e-6  # a stacker's probabilities are clipped to CLIP .. 1 - CLIP: log loss at 0 is infinite


def predict(
    params: Mapping[str, Any], parts: Sequence[NDArray[Any]], head: Head, space: str, frame: Any = None
) -> Array:
    """(rows, outputs), as stored. frame: the rows of the samples table, for methods with metadata."""
    kind = params["kind"]
    if kind == "weights":
        return weighted(parts, head, space, np.asarray(params["weights"], np.float64))
    if kind in POINTWISE:
        return _pointwise(params, parts, head, space)
    return _to_stored(KINDS[kind](params, inputs(params, parts, head, frame)), params["link"], head)


def weighted(parts: Sequence[NDArray[Any]], head: Head, space: str, weights: Array) -> Array:
    """weights: (members,), or (members, outputs) for separate weights per output."""
    if weights.ndim == 1:
        return average(parts, head, space, weights.tolist())
    forward, inverse = head.spec.spaces[space]
    total: Any = 0.0
    for part, weight in zip(parts, weights, strict=True):
        values = forward(np.asarray(part, np.float64))
        total = total + values * weight.reshape(-1, *[1] * (values.ndim - 2))
    return inverse(total)


def _pointwise(params: Mapping[str, Any], parts: Sequence[NDArray[Any]], head: Head, space: str) -> Array:
    """In blocks of rows, since these need all members at once in float64."""
    forward, inverse = head.spec.spaces[space]
    rows = max(1, BLOCK // (len(parts) * len(head.outputs)))

    def block(low: int) -> Array:
        values = [forward(np.asarray(part[low : low + rows], np.float64)) for part in parts]
        return inverse(POINTWISE[params["kind"]](params, values, head))

    return np.concatenate([block(low) for low in range(0, max(1, len(parts[0])), rows)])


def _median(params: Mapping[str, Any], values: list[Array], head: Head) -> Array:
    return np.median(np.stack(values), axis=0)


def _trimmed(params: Mapping[str, Any], values: list[Array], head: Head) -> Array:
    """The mean of each output without the share `trim` of the lowest and of the highest members."""
    order = np.sort(np.stack(values), axis=0)
    cut = min(int(params["trim"] * len(order)), (len(order) - 1) // 2)
    inner = order[cut : len(order) - cut]
    total = inner[0].copy()
    for part in inner[1:]:
        total += part
    return total / len(inner)


def _power(params: Mapping[str, Any], values: list[Array], head: Head) -> Array:
    """(mean of p ** power) ** (1 / power): above 1, confident members count more. Negative values keep their
    sign."""
    power, total = float(params["power"]), np.zeros_like(values[0])
    for part in values:
        total += np.sign(part) * np.abs(part) ** power
    total /= len(values)
    return np.sign(total) * np.abs(total) ** (1 / power)


POINTWISE: dict[str, Callable[[Mapping[str, Any], list[Array], Head], Array]] = {
    "median": _median,
    "trimmed": _trimmed,
    "power": _power,
}


# --- inputs -------------------------------------------------------------------------------------------------


def inputs(params: Mapping[str, Any], parts: Sequence[NDArray[Any]], head: Head, frame: Any) -> Array:
    """(rows, features): the members' outputs, then the metadata, standardized as in the fit."""
    columns = [stacker_inputs(parts, head, params["space"])]
    for spec in params["columns"]:
        if frame is None or spec["name"] not in frame:
            raise UserError(
                "column-missing",
                key=spec["name"],
                what="the stacker was fitted with this column; these rows have none",
            )
        columns.append(metadata_features(spec, frame[spec["name"]]))
    wide = np.concatenate(columns, axis=1)
    return (wide - np.asarray(params["mean"])) / np.asarray(params["scale"])


def stacker_inputs(parts: Sequence[NDArray[Any]], head: Head, space: str) -> Array:
    """(rows, members x outputs)"""
    columns = [to_space(part, head, space) for part in parts]
    if space == "logit" and head.spec.space == "logit":
        columns = [np.clip(values, -LOGIT_RANGE, LOGIT_RANGE) for values in columns]
    return np.concatenate(columns, axis=1)


def metadata_features(spec: Mapping[str, Any], values: Any) -> Array:
    """One metadata column as features. A value that the fit did not have is no class (all 0), or the mean."""
    import pandas as pd

    if spec["kind"] == "number":
        numbers = pd.to_numeric(values, errors="coerce").to_numpy(np.float64)
        return np.where(np.isnan(numbers), spec["mean"], numbers)[:, None]
    text = values.astype(object).where(values.notna(), "").astype(str).to_numpy(object)
    if spec["kind"] == "classes":
        return np.stack([(text == name).astype(np.float64) for name in spec["classes"]], axis=1)
    return np.array([spec["table"].get(name, spec["else"]) for name in text], np.float64)


# --- models -------------------------------------------------------------------------------------------------


def _linear(params: Mapping[str, Any], x: Array) -> Array:
    return _dense(x, np.asarray(params["coef"]), np.asarray(params["intercept"]))


def _dense(x: Array, coef: Array, intercept: Array) -> Array:
    """x @ coef + intercept, summed feature by feature: a matrix product rounds differently for one row and
    for many."""
    out = np.repeat(intercept[None, :], len(x), axis=0)
    for feature, weights in zip(x.T, coef, strict=True):
        out += feature[:, None] * weights
    return out


def _network(params: Mapping[str, Any], x: Array) -> Array:
    for layer in params["layers"][:-1]:
        x = np.maximum(_dense(x, np.asarray(layer["coef"]), np.asarray(layer["intercept"])), 0.0)
    last = params["layers"][-1]
    return _dense(x, np.asarray(last["coef"]), np.asarray(last["intercept"]))


def _trees(params: Mapping[str, Any], x: Array) -> Array:
    """Trees as arrays: feature (-1 in a leaf), threshold, the node to the left and right, value. Left where x
    <= threshold."""
    out = np.zeros((len(x), params["outputs"]))
    for i, tree in enumerate(params["trees"]):
        feature, left, right = (np.asarray(tree[key], np.int64) for key in ("feature", "left", "right"))
        threshold, node = np.asarray(tree["threshold"]), np.zeros(len(x), np.int64)
        inside = feature[node] >= 0
        while inside.any():
            at = np.flatnonzero(inside)
            here = node[at]
            lower = x[at, feature[here]] <= threshold[here]
            node[at] = np.where(lower, left[here], right[here])
            inside = feature[node] >= 0
        out[:, i % params["outputs"]] += np.asarray(tree["value"])[node]
    return out


KINDS: dict[str, Callable[[Mapping[str, Any], Array], Array]] = {
    "linear": _linear,
    "network": _network,
    "trees": _trees,
}


def _to_stored(raw: Array, link: str, head: Head) -> Array:
    """The output of a model as stored, with clipped probabilities."""
    if head.spec.space == "value":
        return raw
    if not head.exclusive:
        p = sigmoid(raw) if link == "logistic" else raw
        return logit(np.clip(p, CLIP, 1 - CLIP))
    if link == "logistic":
        raw = np.exp(log_softmax(raw))
    return log_softmax(np.log(np.clip(raw, CLIP, 1.0)))
