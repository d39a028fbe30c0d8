"""Reading the members of an ensemble: their predictions, and recipes and refits of members that are
ensembles."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from comp.engine.bank import bank
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import run_members
from comp.engine.ensemble import blend_config, fit
from comp.engine.ensemble.blend_config import BlendConfig
from comp.engine.ensemble.context import Refit, Setup
from comp.engine.errors import UserError, joined
from comp.engine.store import artifacts


def predictions(config: BlendConfig, kind: str, setup: Setup) -> list[PredictionSet]:
    """The members' predictions, all of the same rows. Raises with every reason why they cannot be blended."""
    found, errors = [], []
    files = (bank.folder(_address(member, kind)) / f"{kind}.arrow" for member in config.blend.members)
    artifacts.hash_files(file for file in files if file.exists())
    for i, member in enumerate(config.blend.members):
        address = _address(member, kind)
        prefix = (
            "" if address == member else f"{member} takes its weight from the OOF predictions of {address}: "
        )
        try:
            found.append(bank.load(address, kind, setup.samples, setup.folds))
        except UserError as error:
            for each in error.errors:
                what = ": ".join(part for part in (each.where, each.key, each.what) if part)
                errors.append(config.member_error(i, each.code, f"{prefix}{what}", each.remedy))
    if errors:
        raise joined(errors)
    first = found[0]
    for i, part in enumerate(found):
        if not np.array_equal(part.row, first.row) or not np.array_equal(part.predicted, first.predicted):
            names = config.blend.members
            what = (
                f"{names[i]} and {names[0]} predict different {kind} rows "
                f"({part.predicted.sum()} and {first.predicted.sum()})"
            )
            remedy = "a --debug run cannot be blended with a full one"
            errors.append(config.member_error(i, "member-rows-differ", what, remedy))
    if errors:
        raise joined(errors)
    return found


def file(member: str, kind: str) -> Path:
    """The prediction file of a member."""
    return bank.find(_address(member, kind), kind)


def _address(member: str, kind: str) -> str:
    """exp001:full was trained on all rows and has no OOF predictions, so its weight is fitted on those of
    exp001."""
    return run_members.cv_address(member) if kind == "oof" else member


def recipes(config: BlendConfig) -> dict[str, Any]:
    """Address of a member that is an ensemble -> its apply.json. Raises if ensembles contain each other."""
    found = {}
    for i, address in enumerate(config.blend.members):
        path = bank.folder(address) / "apply.json"
        if path.exists():
            found[address] = artifacts.read_json(artifacts.verified(path, f"comp ensemble {address}"))
            if config.name in _addresses_in(found[address]):
                raise config.member_error(
                    i, "member-recursive", f"{address} is itself an ensemble of {config.name}"
                )
    return found


def _addresses_in(recipe: dict[str, Any]) -> set[str]:
    return {member["address"] for member in recipe["members"]}.union(
        *(_addresses_in(member["recipe"]) for member in recipe["members"] if "recipe" in member)
    )


def refits(config: BlendConfig, setup: Setup) -> dict[str, Refit]:
    """Address of a member that was fitted on labels -> the function that fits it again on given rows alone.
    It follows the member's config file, which must be the one that the member was made from."""
    found: dict[str, Refit] = {}
    for i, address in enumerate(config.blend.members):
        if not _fitted_on_labels(address):
            continue
        if stale(address, artifacts.read_json(bank.folder(address) / "score.json")):
            raise config.member_error(
                i,
                "member-stale",
                f"{address} has to be fitted again without each fold, but its config or a member changed",
                f"make it again: comp ensemble {address}",
            )
        inner = blend_config.read(address)
        oof, inner_refits = predictions(inner, "oof", setup), refits(inner, setup)
        found[address] = partial(fit.refit, setup, inner.blend, oof, inner_refits)
    return found


def _fitted_on_labels(address: str) -> bool:
    """Whether labels determined parameters of this ensemble or of one of its members."""
    path = bank.folder(address) / "score.json"
    if not (bank.folder(address) / "apply.json").exists() or not artifacts.manifest_entry(path):
        return False
    record = artifacts.read_json(artifacts.verified(path))
    return record["in_sample"] is not None or any(_fitted_on_labels(m["address"]) for m in record["members"])


def stale(name: str, record: dict[str, Any]) -> bool:
    """Whether the config file or a member has changed since this ensemble was made. record: its
    score.json."""
    try:
        if blend_config.read(name).hash != record["config"]:
            return True
    except UserError:
        return True
    for member in record["members"]:
        for kind, sha256 in member["sha256"].items():
            entry = artifacts.manifest_entry(bank.folder(_address(member["address"], kind)) / f"{kind}.arrow")
            if entry is not None and entry["sha256"] != sha256:
                return True
    return False
