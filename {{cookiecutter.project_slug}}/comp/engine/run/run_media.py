"""What is logged of a run besides numbers: augmented images, the audit of the folds, errors, and its
files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from comp.data import Index
from comp.engine.bank import bank, predictions
from comp.engine.data import fold_audit
from comp.engine.data.samples import Positions
from comp.engine.readers import arrays
from comp.engine.report import plots
from comp.engine.run import augment_grid, tracking
from comp.engine.run.context import Context
from comp.engine.store import paths
from comp.engine.tasks.kinds import Head


def log_inputs(context: Context, log: tracking.RunLogger, run: str) -> None:
    """Augmented images, drawn once per run and logged with every fold, and the audit of the folds."""
    grid = paths.run_folder(run) / "augment.png"
    if not grid.exists():
        augment_grid.write(context.cfg, context.samples, grid)
    log.image("augmentation", grid)
    log.table("folds", pd.json_normalize(fold_audit.audit(context.samples, context.folds)["folds"]))


def log_results(context: Context, log: tracking.RunLogger, folder: Path) -> None:
    """Errors of a fold on its out-of-fold rows, and its files, as W&B artifacts that are not copied."""
    oof = bank.read(folder / "oof.arrow", context.samples, context.folds)
    for head in context.samples.heads:
        log_diagnostics(context, log, head, oof, folder)
    label = "-".join(folder.relative_to(paths.path("runs")).parts)
    log.artifact(folder / "oof.arrow", f"{label}-oof", "predictions")
    if context.cfg.track.log_model:
        log.artifact(folder / "weights.safetensors", f"{label}-weights", "model")


def log_diagnostics(
    context: Context, log: tracking.RunLogger, head: Head, oof: predictions.PredictionSet, folder: Path
) -> None:
    rows = oof.row.astype(np.int64)[oof.predicted]
    prediction = oof.probability(head)[oof.predicted]
    truth = context.samples.truth(head, rows)
    name = "" if len(context.samples.heads) == 1 else f"_{head.name}"
    if head.classes and truth.ndim == 1:
        file = folder / f"confusion{name}.png"
        codes = np.clip(head.spec.to_label(prediction), 0, len(head.classes) - 1)
        plots.confusion(truth, codes, head.classes, file, f"{head.name}, out of fold")
    else:
        file = folder / f"residuals{name}.png"
        plots.residuals(truth, prediction.reshape(truth.shape), file, f"{head.name}, out of fold")
    log.image(file.stem, file)
    classes = head.classes if head.spec.space == "logit" and head.task != "multilabel" else ()
    table = plots.worst_rows(
        truth, prediction, context.samples.frame["id"].to_numpy()[rows].tolist(), classes
    )
    log.table(
        f"worst{name}",
        table.drop(columns="position"),
        images=preprocessed_images(context, rows[table["position"].to_numpy()]),
    )


def preprocessed_images(context: Context, rows: Positions) -> list[Any]:
    """The first image of each row after resizing, as RGB; black if its file has become unreadable."""
    drawn = context.loader.dataset.batch([Index(int(row), None) for row in rows])
    first = (
        np.searchsorted(drawn.owner, np.arange(len(rows)))
        if drawn.owner is not None
        else np.arange(len(rows))
    )
    return [plots.to_rgb(arrays.to_uint8(image)) for image in drawn.images.numpy()[first]]


def last_epoch(folder: Path) -> str:
    """The scores of the last epoch, as text."""
    epochs = [line for line in tracking.read(folder / "log.jsonl") if "epoch" in line]
    if not epochs:
        return "done"
    report = {key: value for key, value in epochs[-1].items() if key.startswith("valid")}
    report = report or {"train_loss": epochs[-1]["train_loss"]}  # a refit on all rows has no validation rows
    return ", ".join(f"{key} {value:.4f}" for key, value in report.items())


def log_summary(context: Context, run: str, score: dict[str, Any]) -> None:
    """One more W&B run for all folds."""
    with tracking.open_summary_log(run, context.cfg) as log:
        log.summary({f"cv_{key}": score[key] for key in ("mean", "std", "oof", "n", "metric", "marks")})
        oof = bank.read(paths.run_folder(run) / "oof.arrow", context.samples, context.folds)
        for head in context.samples.heads:
            log_diagnostics(context, log, head, oof, paths.run_folder(run))
        log.artifact(paths.run_folder(run) / "oof.arrow", f"{run}-oof", "predictions")
