"""For comp audit: stored predictions of a run. Some rows are predicted again, and folds and seeds are merged
again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import bank, predictions
from comp.engine.bank.predictions import PredictionSet
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.extras.findings import (
    BASE,
    MISALIGNED,
    OF_RUNS,
    PREDICTIONS,
    STATISTICS,
    Finding,
    Leak,
    NotChecked,
)
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    from comp.engine.run.context import Context

Array = NDArray[np.float64]

ROWS = 12  # of a fold that are predicted again
# Tolerance for logits, and for values in units of their deviation: another batch size rounds differently.
TOLERANCE, TOLERANCE_AMP = 5e-3, 0.1


def fold_of(file: Path) -> Path:
    """The fold's folder, runs/<run>/seed0/fold3, of any file in it."""
    return next(p for p in file.parents if p.parent.name.startswith("seed"))


def weights_of(stored: PredictionSet) -> Path:
    """The checkpoint of a set that belongs to one fold."""
    return paths.path("runs", next(iter(stored.meta["weights"]), "none"), bank.WEIGHTS)


def fold_sets(run: str, rows: Samples, split: Folds) -> tuple[dict[Path, PredictionSet], list[NotChecked]]:
    """Every readable prediction set of a fold, and those that are not readable."""
    sets: dict[Path, PredictionSet] = {}
    unread = []
    for file in sorted(paths.run_folder(run).glob("seed*/fold[0-9]*/**/oof.arrow")):
        if not artifacts.manifest_entry(file):
            continue
        try:
            sets[file] = bank.read(file, rows, split)
        except UserError as error:
            unread.append(NotChecked(paths.relative(file), error.lines[0], OF_RUNS))
    return sets, unread


def split_by_weights(
    run: str, sets: Mapping[Path, PredictionSet]
) -> tuple[dict[Path, PredictionSet], list[NotChecked]]:
    """Sets whose weights exist, and a line about the others, which cannot be predicted again."""
    found = {file: stored for file, stored in sets.items() if artifacts.manifest_entry(weights_of(stored))}
    gone = [paths.relative(file) for file in sets if file not in found]
    if not gone:
        return found, []
    reason = f"the weights are gone, so {len(gone)} sets cannot be predicted again: {', '.join(gone[:3])}"
    return found, [NotChecked(run, reason + (", …" if len(gone) > 3 else ""), (*PREDICTIONS, STATISTICS))]


# --- provenance ---------------------------------------------------------------------------------------------


def other_folds(file: Path, stored: PredictionSet) -> list[Leak]:
    """Weights outside the fold's folder were trained on its validation rows."""
    folder = fold_of(file)
    others = [name for name in stored.meta["weights"] if not paths.path("runs", name).is_relative_to(folder)]
    if not others:
        return []
    where = f"{paths.relative(file)} was predicted by {', '.join(others)}"
    return [Leak(BASE, where, "provenance")]


# --- predicted again ----------------------------------------------------------------------------------------


def repredict(context: Context, sets: Mapping[Path, PredictionSet]) -> list[Finding]:
    """Some rows of every set again, by the weights and views in its metadata, for every head."""
    from tqdm import tqdm

    bar = tqdm(sets.items(), desc="predicting again", delay=2, disable=None, leave=False)
    return [finding for file, stored in bar for finding in _repredict_set(context, file, stored)]


def _repredict_set(context: Context, file: Path, stored: PredictionSet) -> list[Finding]:
    from comp import predict

    cfg, heads = context.cfg, context.samples.heads
    tolerance = TOLERANCE if cfg.train.amp == "fp32" else TOLERANCE_AMP
    scale = {h.name: _deviation(stored.heads[h.name]) if h.spec.space == "value" else 1.0 for h in heads}
    knobs = {
        "tta": stored.meta.get("tta", cfg.predict.tta),
        "averaging_space": stored.meta.get("space", cfg.predict.averaging_space),
    }
    same = replace(context, cfg=cfg.model_copy(update={"predict": cfg.predict.model_copy(update=knobs)}))
    at = np.unique(np.linspace(0, len(stored.row) - 1, ROWS).astype(np.int64))
    rows = stored.row[at].astype(np.int64)
    values = _flat(stored.heads, scale)

    def predicted(weights: Path) -> Array:
        return _flat(predict.predict(same, artifacts.verified(weights), rows)[0], scale)

    try:
        now = predicted(weights_of(stored))
    except UserError as error:
        return [NotChecked(paths.relative(file), error.lines[0], PREDICTIONS)]
    if np.abs(now - values[at]).max() < tolerance:
        return []
    where = paths.relative(file)
    if others := _folds_that_predict_this(file, stored, values[at], predicted, tolerance):
        where = f"{where} is what {others[0]} predicts for its training rows"
        return [Leak(BASE, where, "re-prediction")]
    if all(np.abs(values - row).max(axis=1).min() < tolerance for row in now):
        return [Leak(MISALIGNED, f"{where}: the right values in the wrong rows", "re-prediction")]
    return [Leak("predictions that differ from those of their weights", where, "re-prediction")]


def _folds_that_predict_this(
    file: Path, stored: PredictionSet, values: Array, predicted: Callable[[Path], Array], tolerance: float
) -> list[str]:
    """Other folds of the same seed whose weights give the stored values."""
    folder, weights = fold_of(file), weights_of(stored)
    inside = weights.parent.relative_to(folder) if weights.is_relative_to(folder) else ""
    return [
        other.name
        for other in sorted(folder.parent.glob("fold[0-9]*"))
        if other != folder
        and artifacts.manifest_entry(other / inside / bank.WEIGHTS)
        and np.abs(predicted(other / inside / bank.WEIGHTS) - values).max() < tolerance
    ]


def _deviation(values: NDArray[Any]) -> Array:
    """(outputs,): the unit in which values are compared."""
    deviation = np.asarray(values, np.float64).std(axis=0)
    return np.where(deviation > 0, deviation, 1.0)


def _flat(heads: Mapping[str, NDArray[Any]], scale: Mapping[str, Any]) -> Array:
    """(rows, outputs of all heads)"""
    return np.concatenate([np.asarray(heads[name], np.float64) / scale[name] for name in scale], axis=1)


# --- merged again -------------------------------------------------------------------------------------------


def merged_again(run: str, rows: Samples, split: Folds) -> Iterator[Finding]:
    """The sets of a run and of its members against a merge of the sets of their folds and seeds."""
    folder = paths.run_folder(run)
    for file in sorted([*folder.glob("oof.arrow"), *folder.glob("members/*/oof.arrow")]):
        if not artifacts.manifest_entry(file):
            continue
        where = paths.relative(file)
        try:
            stored = bank.read(file, rows, split)
            parts = [
                bank.read(_part(name, file.parent.name) / "oof.arrow", rows, split)
                for name in stored.meta["weights"]
            ]
            if not parts:
                reason = "its metadata names no weights, so it cannot be predicted again"
                yield NotChecked(where, reason, PREDICTIONS)
                continue
            again = predictions.merge(parts, rows, split, stored.meta["space"])
        except UserError as error:
            yield NotChecked(where, error.lines[0], PREDICTIONS)
            continue
        scale = {h.name: 1.0 for h in rows.heads}
        old, new = _flat(stored.heads, scale), _flat(again.heads, scale)
        if np.allclose(old, new, rtol=1e-5, atol=1e-5, equal_nan=True):
            continue
        if np.allclose(np.sort(old, axis=0), np.sort(new, axis=0), rtol=1e-5, atol=1e-5, equal_nan=True):
            yield Leak(MISALIGNED, f"{where}: the right values in the wrong rows", "recomputation")
        else:
            yield Leak("predictions that differ from those of their folds", where, "recomputation")


def _part(weights: str, member: str) -> Path:
    """Folder of a checkpoint's predictions for this member: other views of a run's own weights have a folder
    of their name."""
    folder = paths.path("runs", weights)
    return folder / member if (folder / member / "oof.arrow").exists() else folder
