"""Applies apply.json to the predictions of the members: one function for OOF rows, test rows and single new
rows.

All parameters are in apply.json and were fitted on OOF rows; the result of a row does not depend on other
rows.

Method rank: each value is replaced by the share of its member's OOF values below it; the mean of these shares
is mapped back through the members' quantiles. The order is that of the mean rank, the result a probability or
value again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank.predictions import PredictionSet
from comp.engine.data.samples import Samples
from comp.engine.ensemble import apply as methods
from comp.engine.ensemble import calibration
from comp.engine.errors import UserError
from comp.engine.tasks.kinds import Array, Head

KNOTS = 2048  # of a quantile map, which is linear between them
Values = Mapping[str, NDArray[Any]]  # head -> (rows, outputs), as stored


def build_recipe(
    samples: Samples,
    members: Sequence[str],
    oof: Sequence[PredictionSet],
    shares: Sequence[float],
    space: str,
    recipes: Mapping[str, Any],
    params: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of apply.json. recipes: address of a member that is an ensemble -> its apply.json. params,
    after: head -> the fitted parameters and steps."""
    heads = [
        {"name": h.name, "task": h.task, "outputs": list(h.outputs), "classes": list(h.classes)}
        for h in samples.heads
    ]
    listed: list[dict[str, Any]] = []
    for address, predictions, share in zip(members, oof, shares, strict=True):
        listed.append({"address": address, "weight": share})
        if space == "rank":
            maps = {head.name: quantiles(predictions.heads[head.name]) for head in samples.heads}
            listed[-1]["quantiles"] = maps
        if address in recipes:
            listed[-1]["recipe"] = recipes[address]
    fitted = {"params": dict(params)} if params else {}
    steps = {"after": dict(after)} if after and any(after.values()) else {}
    return {"space": space, "heads": heads, "members": listed, **fitted, **steps}


def apply(
    recipe: Mapping[str, Any], predictions: Mapping[str, Values], frame: Any = None, corrected: bool = True
) -> dict[str, NDArray[np.float32]]:
    """predictions: member -> head -> (rows, outputs) as stored. The bits of a row do not depend on the number
    of rows.

    A member that is an ensemble can be omitted if its own members are given. frame: the rows of the samples
    table, for stackers with metadata. corrected: includes the corrections fitted for test rows; OOF rows go
    without.
    """
    values = [
        predictions[member["address"]]
        if member["address"] in predictions
        else _nested_ensemble(member, predictions, frame)
        for member in recipe["members"]
    ]
    shares = [float(member["weight"]) for member in recipe["members"]]
    out = {}
    for described in recipe["heads"]:
        name = described["name"]
        head = Head(name, described["task"], tuple(described["outputs"]), (), tuple(described["classes"]))
        parts = [np.asarray(value[name]) for value in values]
        params = recipe.get("params", {}).get(name, {"kind": "weights", "weights": shares})
        maps = None
        if recipe["space"] == "rank":
            maps = [member["quantiles"][name] for member in recipe["members"]]
        blended = combine(params, parts, maps, head, recipe["space"], frame)
        steps = list(recipe.get("after", {}).get(name, []))
        if corrected and name in recipe.get("correct", {}):
            steps.append(recipe["correct"][name])
        for step in steps:
            blended = calibration.apply(step, blended, head)
        out[name] = _as_stored(blended, parts, head)
    return out


def combine(
    params: Mapping[str, Any], parts: Sequence[Array], maps: Any, head: Head, space: str, frame: Any
) -> Array:
    """One head, as stored. maps: the members' quantiles for method rank, else None."""
    if maps is not None:
        return _by_rank(parts, maps, params["weights"], head)
    return methods.predict(params, parts, head, space, frame)


def leaves(recipe: Mapping[str, Any]) -> list[str]:
    """The runs and members of runs that have to predict a new row."""
    found: list[str] = []
    for member in recipe["members"]:
        found += leaves(member["recipe"]) if "recipe" in member else [member["address"]]
    return list(dict.fromkeys(found))


def _nested_ensemble(member: Mapping[str, Any], predictions: Mapping[str, Values], frame: Any) -> Values:
    if "recipe" not in member:
        raise UserError(
            "member-missing",
            where=member["address"],
            what=f"no predictions of these rows, only of {', '.join(predictions)}",
        )
    return apply(member["recipe"], predictions, frame)


def _as_stored(blended: Array, parts: Sequence[Array], head: Head) -> NDArray[np.float32]:
    """float32, NaN in rows that a member did not predict. Raises if any other row is not finite."""
    predicted = ~np.any([np.isnan(part).any(axis=1) for part in parts], axis=0)
    with np.errstate(over="ignore"):
        stored = np.where(predicted[:, None], blended, np.nan).astype(np.float32)
    wrong = np.flatnonzero(predicted & ~np.isfinite(stored).all(axis=1))
    if len(wrong):
        raise UserError(
            "blend-not-finite",
            key=head.name,
            what=f"the blend of row {wrong[0]} is not finite in float32; {len(wrong)} such rows",
        )
    return stored


# --- ranks --------------------------------------------------------------------------------------------------


def quantiles(values: NDArray[Any]) -> list[dict[str, list[float]]]:
    """Of every output: its OOF values, ascending, and the share of rows below each (ties count half)."""
    maps = []
    for column in np.asarray(values, np.float64).T:
        level, count = np.unique(column[~np.isnan(column)], return_counts=True)
        if not len(level):
            raise UserError(
                "member-empty", key="method", what="rank needs OOF predictions, and a member has none"
            )
        share = (count.cumsum() - count / 2) / count.sum()
        knots = np.unique(np.linspace(0, len(level) - 1, min(KNOTS, len(level))).round().astype(np.int64))
        maps.append({"value": level[knots].tolist(), "share": share[knots].tolist()})
    return maps


def ranks(part: NDArray[Any], maps: Sequence[Mapping[str, Any]]) -> Array:
    """(rows, outputs): the share of the member's OOF values below each value."""
    columns = [
        np.interp(np.asarray(column, np.float64), m["value"], m["share"])
        for column, m in zip(part.T, maps, strict=True)
    ]
    return np.stack(columns, axis=1)


def _by_rank(
    parts: Sequence[Array], maps: Sequence[Sequence[Mapping[str, Any]]], shares: Sequence[float], head: Head
) -> Array:
    out = np.empty((len(parts[0]), len(head.outputs)))
    for column in range(len(head.outputs)):
        knots = [(np.asarray(m[column]["value"]), np.asarray(m[column]["share"])) for m in maps]
        rank = np.zeros(len(out))
        for part, (value, share), weight in zip(parts, knots, shares, strict=True):
            rank += weight * np.interp(part[:, column], value, share)
        rank = np.round(rank, 12)  # rows with the same mean rank stay equal, whatever the order of the sum
        out[:, column] = 0.0
        for (value, share), weight in zip(knots, shares, strict=True):
            out[:, column] += weight * np.interp(rank, share, value)
    return head.spec.spaces["logit"][1](out)
