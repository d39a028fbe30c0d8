"""The files of one fold's predictions, below runs/<run>/seed<s>/fold<k>/ or, for a member, in a folder there.

oof.arrow, test.arrow   predictions with their metadata
test_damaged.txt        rows with a damaged image, and why
speed.json              seconds an image; measured, so it is in no manifest and no hash
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import bank, predictions
from comp.engine.config import resolve, run_members
from comp.engine.config.schema import Config
from comp.engine.data.samples import Positions
from comp.engine.run.context import Context
from comp.engine.store import artifacts, paths


class FoldPredictions(NamedTuple):
    run: str
    seed: int
    fold: int | str
    kind: str  # oof | test
    file: Path
    weights: Path
    member: str  # whose weights: "" for those of the run

    @property
    def done(self) -> bool:
        return artifacts.manifest_entry(self.file) is not None


def locate(
    cfg: Config, run: str, seed: int, fold: int | str, kind: str, subfolder: str = ""
) -> FoldPredictions:
    """`subfolder`: of a member with weights of its own, or of other views by the weights of the run."""
    folder = paths.fold_folder(run, seed, fold)
    member = subfolder if subfolder in run_members.extra_weights(cfg) else ""
    weights = folder / member / bank.WEIGHTS
    return FoldPredictions(run, seed, fold, kind, folder / subfolder / f"{kind}.arrow", weights, member)


def rows_of(context: Context, target: FoldPredictions) -> Positions:
    validation = context.folds.split(target.fold)[1]
    rows = context.samples.positions("test") if target.kind == "test" else validation
    return rows[: context.cfg.train.max_samples]


def save(
    context: Context,
    target: FoldPredictions,
    rows: Positions,
    heads: dict[str, NDArray[np.float32]],
    damaged: dict[int, str],
    seconds: float,
) -> Path:
    cfg, file = context.cfg, target.file
    if len(rows):  # a ceiling on inference time is compared to it
        speed = file.with_name("speed.json")
        measured = artifacts.read_json(speed) if speed.exists() else {}
        artifacts.write_json(speed, measured | {target.kind: seconds / len(rows)})
    if damaged:
        _write_damaged(context, damaged, file.with_name(f"{target.kind}_damaged.txt"))
    facts: dict[str, Any] = {
        "run": target.run,
        "seed": target.seed,
        "config": artifacts.digest(resolve.result_knobs(cfg)),
        "weights": bank.weights_of(target.weights.parent),
        "marks": run_members.marks(cfg, target.member),
        "tta": cfg.predict.tta,
        "space": cfg.predict.averaging_space,
        "damaged": len(damaged),
    }
    fold = np.full(len(rows), int(target.fold), np.int16) if target.kind == "oof" else None
    meta = predictions.build_meta(target.kind, context.samples, context.folds, facts)
    return bank.write(file, predictions.PredictionSet(rows.astype(np.int32), fold, heads, meta))


def _write_damaged(context: Context, damaged: dict[int, str], file: Path) -> None:
    ids = context.samples.frame["id"]
    lines = [f"{ids.iloc[row]}\t{reason}" for row, reason in damaged.items()]
    artifacts.write_text(file, "\n".join(lines) + "\n")
    print(
        f"{len(lines)} rows with a damaged image get the mean of the labels; listed in {paths.relative(file)}"
    )
