"""For comp audit: the pseudo-labels that a run was trained on. Which models made them is in their manifest
entry; the labels themselves are made again from stored predictions, which needs no network.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from comp.engine.config.schema import Config
from comp.engine.data import exact_duplicates
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.extras import pseudo_labels
from comp.engine.extras.findings import DUPLICATES, PSEUDO, Finding, Leak, NotChecked
from comp.engine.run import pseudo_rows, teachers
from comp.engine.store import artifacts, paths


def validate_labels(run: str, cfg: Config, split: Folds) -> None:
    """The table of pseudo-labels must be the one that the run was trained on, or nothing about it can be
    recomputed."""
    if cfg.data.pseudo_labels is None:
        return
    file = paths.pseudo_file(cfg.data.pseudo_labels)
    entry = artifacts.manifest_entry(file)
    trained_on = artifacts.read_json(artifacts.verified(paths.run_folder(run) / "inputs.json"))["pseudo"]
    if entry is None or entry["sha256"] != trained_on or entry["folds"] != split.hash:
        raise UserError(
            "pseudo-labels-changed", where=paths.relative(file), what="is gone or changed since the training"
        )
    artifacts.verified(file)


def leaks(run: str, cfg: Config, rows: Samples, split: Folds) -> list[Finding]:
    name = cfg.data.pseudo_labels
    if name is None:
        return []
    file = paths.pseudo_file(name)
    try:
        validate_labels(run, cfg, split)
    except UserError as error:
        return [NotChecked(f"{run}, its pseudo-labels", error.lines[0], (PSEUDO,))]
    entry, table = artifacts.manifest_entry(file) or {}, pseudo_rows.read(name)
    found: list[Finding] = [*_copies(run, cfg, table, name, rows, split)]
    for fold, weights in entry["weights"].items():
        if wrong := [checkpoint for checkpoint in weights if Path(checkpoint).name != f"fold{fold}"]:
            where = f"{run}: fold {fold} was trained on labels by {', '.join(wrong)}"
            found.append(Leak(PSEUDO, where, "provenance"))
    try:
        again = _again(entry, rows, split)
    except UserError as error:
        reason = f"{paths.relative(file)} cannot be made again: {error.lines[0]}"
        return [*found, NotChecked(f"{run}, its pseudo-labels", reason, (PSEUDO,))]
    return found + _recomputed(f"{run}: {paths.relative(file)}", table, again, split.count)


def _recomputed(file: str, table: pd.DataFrame, again: pd.DataFrame, folds: int) -> list[Finding]:
    """Compares the labels of every fold with those made again."""
    found: list[Finding] = []
    by_fold = {f"of fold {fold}": again[again["fold"] == fold] for fold in range(folds)}
    for fold in range(folds):
        stored, own = table[table["fold"] == fold], f"of fold {fold}"
        if _equal(stored, by_fold[own]):
            continue
        others = {"of all folds": again[again["fold"] == pseudo_rows.FULL], **by_fold}
        source = next(
            (which for which, lines in others.items() if which != own and _equal(stored, lines)), None
        )
        where = f"{file}, fold {fold}"
        if source is None:
            found.append(Leak("pseudo-labels that differ from those of their models", where, "recomputation"))
        else:
            found.append(Leak(PSEUDO, f"{where}: they are those {source}", "recomputation"))
    return found


def _copies(
    run: str, cfg: Config, table: pd.DataFrame, name: str, rows: Samples, split: Folds
) -> list[Finding]:
    """Pseudo-labelled test rows whose files have the same bytes as validation rows of their fold."""
    images = exact_duplicates.find_by_bytes(cfg, rows)
    found: list[Finding] = []
    for fold in range(split.count):
        joined = pseudo_rows.add_rows(rows, table, name, fold)
        train_rows, valid_rows = replace(split, samples=joined).split(fold)
        test = train_rows[(rows.frame["source"].to_numpy()[train_rows] == "test")]
        codes = [images.by_bytes[np.isin(images.sample, part)] for part in (test, valid_rows)]
        if len(both := np.intersect1d(codes[0], codes[1])):
            where = f"{run}: {len(both)} images that fold {fold} is scored on are among its pseudo-labels"
            found.append(Leak(DUPLICATES, where, "hash"))
    return found


def _again(entry: dict[str, Any], rows: Samples, split: Folds) -> pd.DataFrame:
    selection = pseudo_labels.Selection(**entry["selection"])
    models = teachers.load(str(entry["source"]), split, "comp audit")
    tables = []
    for fold in pseudo_labels.all_folds(split):
        predicted = pseudo_labels.predicted(models, fold, rows, split, selection)
        tables.append(pseudo_labels.select(predicted, fold, rows, selection))
    return pd.concat(tables, ignore_index=True)


def _equal(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    columns = [name for name in map(str, one) if name.startswith(("target.", "soft.", "confidence"))]
    return (
        len(one) == len(other)
        and one["id"].tolist() == other["id"].tolist()
        and bool(np.allclose(one[columns], other[columns], atol=1e-6))
    )
