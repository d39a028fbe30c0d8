"""What a fitted method says of a row, from numbers in apply.json and nothing else: weights, linear models, networks, trees.

Plain numpy, so that a Kaggle kernel needs no scikit-learn of the right version, and nothing that can run code is loaded.
Every sum runs over members or features one after the other: a row alone gets the same bits as in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank.predictions import average
from comp.engine.ensemble.spaces import to_space
from comp.engine.errors import Refused
from comp.engine.tasks.kinds import Array, Head, log_softmax, logit, sigmoid

LOGIT_RANGE = 30.0  # of a stacker's inputs: beyond, a member was sure, and how sure only unsettles the fit
BLOCK = 65_536  # numbers of all members at once
SURE = 1e-6  # a stacker never says 0 or 1: one row would cost it everything


def predict(
    params: Mapping[str, Any], parts: Sequence[NDArray[Any]], head: Head, space: str, frame: Any = None
) -> Array:
    """(rows, outputs), as stored. frame: the rows' columns of the samples table, where the method wants metadata."""
    kind = params["kind"]
    if kind == "weights":
        return weighted(parts, head, space, np.asarray(params["weights"], np.float64))
    if kind in ROBUST:
        return _robust(params, parts, head, space)
    return _answer(KINDS[kind](params, inputs(params, parts, head, frame)), params["link"], head)


def weighted(parts: Sequence[NDArray[Any]], head: Head, space: str, weights: Array) -> Array:
    """weights: (members,), or (members, outputs) where each output has its own."""
    if weights.ndim == 1:
        return average(parts, head, space, weights.tolist())
    there, back = head.spec.spaces[space]
    total: Any = 0.0
    for part, weight in zip(parts, weights, strict=True):
        values = there(np.asarray(part, np.float64))
        total = total + values * weight.reshape(-1, *[1] * (values.ndim - 2))
    return back(total)


def _robust(params: Mapping[str, Any], parts: Sequence[NDArray[Any]], head: Head, space: str) -> Array:
    """In blocks of rows: these need all members of a row at once, in float64."""
    there, back = head.spec.spaces[space]
    rows = max(1, BLOCK // (len(parts) * len(head.outputs)))

    def block(low: int) -> Array:
        moved_ = [there(np.asarray(part[low : low + rows], np.float64)) for part in parts]
        return back(ROBUST[params["kind"]](params, moved_, head))

    return np.concatenate([block(low) for low in range(0, max(1, len(parts[0])), rows)])


def _median(params: Mapping[str, Any], moved_: list[Array], head: Head) -> Array:
    return np.median(np.stack(moved_), axis=0)


def _trimmed(params: Mapping[str, Any], moved_: list[Array], head: Head) -> Array:
    """The mean of each output without a share of the lowest and as many of the highest members."""
    order = np.sort(np.stack(moved_), axis=0)
    cut = min(int(params["trim"] * len(order)), (len(order) - 1) // 2)
    kept = order[cut : len(order) - cut]
    total = kept[0].copy()
    for each in kept[1:]:
        total += each
    return total / len(kept)


def _power(params: Mapping[str, Any], moved_: list[Array], head: Head) -> Array:
    """(mean of p ** power) ** (1 / power): above 1 the surest member is heard most. Values may be negative, so they keep
    their sign."""
    power, total = float(params["power"]), np.zeros_like(moved_[0])
    for each in moved_:
        total += np.sign(each) * np.abs(each) ** power
    total /= len(moved_)
    return np.sign(total) * np.abs(total) ** (1 / power)


ROBUST: dict[str, Callable[[Mapping[str, Any], list[Array], Head], Array]] = {
    "median": _median,
    "trimmed": _trimmed,
    "power": _power,
}


# --- inputs --------------------------------------------------------------------------------------------------------------


def inputs(params: Mapping[str, Any], parts: Sequence[NDArray[Any]], head: Head, frame: Any) -> Array:
    """(rows, features): every member's outputs, then the metadata, scaled as it was when fitted."""
    columns = [stacker_inputs(parts, head, params["space"])]
    for spec in params["columns"]:
        if frame is None or spec["name"] not in frame:
            raise Refused(
                f"{spec['name']}: the stacker was fitted with this column, and these rows have none"
            )
        columns.append(metadata_features(spec, frame[spec["name"]]))
    wide = np.concatenate(columns, axis=1)
    return (wide - np.asarray(params["mean"])) / np.asarray(params["scale"])


def stacker_inputs(parts: Sequence[NDArray[Any]], head: Head, space: str) -> Array:
    said = [to_space(part, head, space) for part in parts]
    if space == "logit" and head.spec.space == "logit":
        said = [np.clip(each, -LOGIT_RANGE, LOGIT_RANGE) for each in said]
    return np.concatenate(said, axis=1)


def metadata_features(spec: Mapping[str, Any], values: Any) -> Array:
    """One metadata column as features. A value never seen at fitting is no class, and the mean of a number or target."""
    import pandas as pd

    if spec["kind"] == "number":
        numbers = pd.to_numeric(values, errors="coerce").to_numpy(np.float64)
        return np.where(np.isnan(numbers), spec["mean"], numbers)[:, None]
    text = values.astype(object).where(values.notna(), "").astype(str).to_numpy(object)
    if spec["kind"] == "classes":
        return np.stack([(text == each).astype(np.float64) for each in spec["classes"]], axis=1)
    return np.array([spec["table"].get(each, spec["else"]) for each in text], np.float64)


# --- models --------------------------------------------------------------------------------------------------------------


def _linear(params: Mapping[str, Any], x: Array) -> Array:
    return _dense(x, np.asarray(params["coef"]), np.asarray(params["intercept"]))


def _dense(x: Array, coef: Array, intercept: Array) -> Array:
    """x @ coef + intercept, added up feature by feature: a matrix product rounds differently for one row and for many."""
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
    """Trees as arrays: feature (-1 in a leaf), threshold, the node to the left and right, value. Left where x <= threshold."""
    out = np.zeros((len(x), params["outputs"]))
    for number, tree in enumerate(params["trees"]):
        feature, left, right = (np.asarray(tree[key], np.int64) for key in ("feature", "left", "right"))
        threshold, node = np.asarray(tree["threshold"]), np.zeros(len(x), np.int64)
        inside = feature[node] >= 0
        while inside.any():
            at = np.flatnonzero(inside)
            here = node[at]
            lower = x[at, feature[here]] <= threshold[here]
            node[at] = np.where(lower, left[here], right[here])
            inside = feature[node] >= 0
        out[:, number % params["outputs"]] += np.asarray(tree["value"])[node]
    return out


KINDS: dict[str, Callable[[Mapping[str, Any], Array], Array]] = {
    "linear": _linear,
    "network": _network,
    "trees": _trees,
}


def _answer(raw: Array, link: str, head: Head) -> Array:
    """From what a model puts out to what is stored, never surer than SURE."""
    if head.spec.space == "value":
        return raw
    if not head.exclusive:
        p = sigmoid(raw) if link == "logistic" else raw
        return logit(np.clip(p, SURE, 1 - SURE))
    if link == "logistic":
        raw = np.exp(log_softmax(raw))
    return log_softmax(np.log(np.clip(raw, SURE, 1.0)))
