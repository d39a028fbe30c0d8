"""Mean, weighted, rank and geometric averages of members, applied by one function to OOF rows, test rows and single new ones.

What it needs to know stands in apply.json and is fitted on OOF rows alone; nothing looks at the rows beside the one at hand.

rank: each member's value becomes the share of its own OOF values below it; the mean of these shares is read back through
the members' quantiles. So the order is that of the mean rank, and what leaves is a probability or a value again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank.predictions import PredictionSet
from comp.engine.data.samples import Samples
from comp.engine.ensemble import apply as fitted
from comp.engine.ensemble import calibration as later
from comp.engine.errors import Refused
from comp.engine.tasks.kinds import Array, Head

KNOTS = 2048  # of a quantile map: more OOF values than this are thinned out, and the map is linear between
Values = Mapping[str, NDArray[Any]]  # head -> (rows, outputs), as stored


def build_recipe(
    samples: Samples,
    members: Sequence[str],
    oof: Sequence[PredictionSet],
    shares: Sequence[float],
    space: str,
    nested: Mapping[str, Any],
    params: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What apply.json holds. nested: address of a member that is an ensemble itself -> its own apply.json. params and
    after: head -> what was fitted for it."""
    heads = [
        {"name": h.name, "task": h.task, "outputs": list(h.outputs), "classes": list(h.classes)}
        for h in samples.heads
    ]
    said: list[dict[str, Any]] = []
    for address, predictions, share in zip(members, oof, shares, strict=True):
        said.append({"address": address, "weight": share})
        if space == "rank":
            maps = {head.name: quantiles(predictions.heads[head.name]) for head in samples.heads}
            said[-1]["quantiles"] = maps
        if address in nested:
            said[-1]["recipe"] = nested[address]
    fitted_ = {"params": dict(params)} if params else {}
    steps = {"after": dict(after)} if after and any(after.values()) else {}
    return {"space": space, "heads": heads, "members": said, **fitted_, **steps}


def apply(
    recipe: Mapping[str, Any], given: Mapping[str, Values], frame: Any = None, corrected: bool = True
) -> dict[str, NDArray[np.float32]]:
    """given: member -> head -> (rows, outputs) as the bank stores them; one row or many, the bits are the same.

    A member that is an ensemble may be left out when its own members are given. frame: the rows' columns of the samples
    table, for stackers with metadata. corrected: with what was fitted for test rows; OOF rows go without.
    """
    values = [
        given[member["address"]] if member["address"] in given else _nested_ensemble(member, given, frame)
        for member in recipe["members"]
    ]
    shares = [float(member["weight"]) for member in recipe["members"]]
    out = {}
    for described in recipe["heads"]:
        name = described["name"]
        head = Head(name, described["task"], tuple(described["outputs"]), (), tuple(described["classes"]))
        parts = [np.asarray(value[name]) for value in values]
        params = recipe.get("params", {}).get(name, {"kind": "weights", "weights": shares})
        maps = (
            [member["quantiles"][name] for member in recipe["members"]] if recipe["space"] == "rank" else None
        )
        blended = combine(params, parts, maps, head, recipe["space"], frame)
        steps = list(recipe.get("after", {}).get(name, []))
        if corrected and name in recipe.get("correct", {}):
            steps.append(recipe["correct"][name])
        for step in steps:
            blended = later.apply(step, blended, head)
        out[name] = _valid(blended, parts, head)
    return out


def combine(
    params: Mapping[str, Any], parts: Sequence[Array], maps: Any, head: Head, space: str, frame: Any
) -> Array:
    """One head of one blend, as stored: by ranks, where maps has the members' quantiles, or by what was fitted."""
    if maps is not None:
        return _by_rank(parts, maps, params["weights"], head)
    return fitted.predict(params, parts, head, space, frame)


def leaves(recipe: Mapping[str, Any]) -> list[str]:
    """The runs and members that have to predict a new row."""
    found: list[str] = []
    for member in recipe["members"]:
        found += leaves(member["recipe"]) if "recipe" in member else [member["address"]]
    return list(dict.fromkeys(found))


def _nested_ensemble(member: Mapping[str, Any], given: Mapping[str, Values], frame: Any) -> Values:
    if "recipe" not in member:
        raise Refused(
            f"{member['address']}: its predictions of these rows are not given, only {', '.join(given)}"
        )
    return apply(member["recipe"], given, frame)


def _valid(blended: Array, parts: Sequence[Array], head: Head) -> NDArray[np.float32]:
    """What leaves is a finite number for every row that all members predicted, as its task wants it, or it does not leave."""
    told = ~np.any([np.isnan(part).any(axis=1) for part in parts], axis=0)
    with np.errstate(over="ignore"):
        stored = np.where(told[:, None], blended, np.nan).astype(np.float32)
    wrong = np.flatnonzero(told & ~np.isfinite(stored).all(axis=1))
    if len(wrong):
        raise Refused(
            f"{head.name}: the blend of row {wrong[0]} is no number that float32 can hold; {len(wrong)} rows are like it"
        )
    return stored


# --- ranks ---------------------------------------------------------------------------------------------------------------


def quantiles(values: NDArray[Any]) -> list[dict[str, list[float]]]:
    """For every output its OOF values, rising, and the share of rows below each (ties count half)."""
    maps = []
    for column in np.asarray(values, np.float64).T:
        level, count = np.unique(column[~np.isnan(column)], return_counts=True)
        if not len(level):
            raise Refused("rank: a member has no OOF predictions to take quantiles from")
        share = (count.cumsum() - count / 2) / count.sum()
        kept = np.unique(np.linspace(0, len(level) - 1, min(KNOTS, len(level))).round().astype(np.int64))
        maps.append({"value": level[kept].tolist(), "share": share[kept].tolist()})
    return maps


def ranks(part: NDArray[Any], maps: Sequence[Mapping[str, Any]]) -> Array:
    """Each value as the share of its member's OOF values below it."""
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
