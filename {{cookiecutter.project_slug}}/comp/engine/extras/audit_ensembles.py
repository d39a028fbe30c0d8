"""For comp audit: ensembles fitted again, and members that were selected on the rows they are scored on."""

from __future__ import annotations

import numpy as np

from comp.engine.bank import bank
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.ensemble import blend_config, fit, members
from comp.engine.ensemble.context import HeadValues, Setup
from comp.engine.errors import UserError
from comp.engine.extras.findings import META_MODEL, Finding, Leak, NotChecked
from comp.engine.store import artifacts, paths


def of_ensemble(name: str, cfg: Config, rows: Samples, split: Folds) -> list[Finding]:
    """Fits the ensemble again and compares: the stored predictions of a fold must come from a fit on the
    other folds."""
    try:
        declared = blend_config.read(name)
        setup = Setup(cfg, rows, split)
        oof, test = (members.predictions(declared, kind, setup) for kind in bank.KINDS)
        stored = bank.load(name, "oof", rows, split)
        recipes, refits = members.recipes(declared), members.refits(declared, setup)
    except UserError as error:
        return [NotChecked(name, error.lines[0], (META_MODEL,))]
    made = fit.fit_ensemble(setup, declared.blend, oof, test, recipes, refits)
    where = f"{paths.relative(bank.folder(name))}/oof.arrow"

    def equal(values: HeadValues | None) -> bool:
        return values is not None and all(
            np.allclose(stored.heads[h.name], values[h.name], atol=1e-5, equal_nan=True) for h in rows.heads
        )

    if equal(made.nested):
        return []
    if equal(made.in_sample):
        return [Leak(META_MODEL, f"{where} is scored on the rows it was fitted on", "recomputation")]
    return [Leak("predictions that differ from those of its members", where, "recomputation")]


def selected_on_fold() -> list[str]:
    """A line for every set of the bank that was selected on the rows it is scored on, or is made from one
    that was: snapshots and other members, stackers and other ensembles."""
    return [line for line in map(_optimistic, bank.members()) if line]


def _optimistic(address: str) -> str:
    folder = bank.folder(address)
    files = (folder / f"{kind}.arrow" for kind in bank.KINDS)
    meta = bank.read_meta(next(file for file in files if artifacts.manifest_entry(file)))
    if "selected_on_fold" not in meta["marks"]:
        return ""
    record = (
        artifacts.read_json(folder / "score.json") if artifacts.manifest_entry(folder / "score.json") else {}
    )
    if "members" in meta:
        marked = [m["address"] for m in record.get("members", []) if "selected_on_fold" in m["marks"]]
        members = ", ".join(marked) or "a member"
        return f"optimistic: {address} is made from {members}, which is marked selected_on_fold"
    amount = record.get("optimism")
    about = "" if amount is None else f", by about {amount:.4f}"
    return f"optimistic: {address} selected its epoch on the rows it is scored on (selected_on_fold){about}"
