"""Predictions of a distillation teacher for the training rows of a fold, written once before the fold is
trained.

They come from the teacher's models of the same fold, with the image size, TTA views and normalization of the
teacher's own config, and lie in runs/<run>/seed<s>/fold<k>/teacher_predictions.safetensors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from comp import predict
from comp.engine.bank import bank, predictions
from comp.engine.config.schema import Config
from comp.engine.errors import UserError
from comp.engine.hardware import Stop
from comp.engine.run import distillation, teachers
from comp.engine.run.context import Context
from comp.engine.run.forward import raise_damaged
from comp.engine.run.teachers import Teacher
from comp.engine.store import artifacts, paths


def prepare(
    context: Context, gather: Callable[[Config], Context], fold: int | str, folder: Path, stop: Stop
) -> None:
    """Write the file unless it is there. `context`: that of the fold. `gather` loads the context of a
    teacher's config."""
    name = context.cfg.distill.teacher
    if name is None:
        return
    ensemble = teachers.load(name, context.folds, "distill.teacher")
    file = folder / distillation.FILE
    folders = [_with_weights(teacher, fold, context) for teacher in ensemble.teachers]
    hashes = bank.weights_of(*(place for each in folders for place in each))
    if entry := artifacts.manifest_entry(file):
        if changed := distillation.changed_weights(hashes, entry["weights"]):
            raise UserError(
                "teacher-changed",
                where=paths.relative(file),
                what=f"runs/{changed[0]} was trained again since these predictions were made",
                remedy="start this run again with --fresh",
            )
        return
    rows, sets, weights = distillation.train_rows(context, fold), [], list[float]()
    for teacher, places in zip(ensemble.teachers, folders, strict=True):
        own_context = _context_of(teacher, context, gather)
        for place in places:
            doing = f"{paths.relative(place)} predicts for fold {fold}"
            heads, damaged = predict.predict(own_context, place / bank.WEIGHTS, rows, doing, stop=stop)
            raise_damaged(damaged, context.samples)
            sets.append(heads)
            weights.append(teacher.weight / len(places))
    means = {
        head.name: predictions.average([each[head.name] for each in sets], head, ensemble.space, weights)
        for head in context.samples.heads
    }
    _write(file, rows, means, hashes)


def _with_weights(teacher: Teacher, fold: int | str, context: Context) -> list[Path]:
    folders = [
        folder
        for folder in teacher.folders(fold, context.folds)
        if artifacts.manifest_entry(folder / bank.WEIGHTS)
    ]
    if not teacher.covers(folders, fold, context.folds):
        which, option = ("every fold", "") if fold == "full" else (f"fold {fold}", f" --fold {fold}")
        raise UserError(
            "weights-missing",
            key="distill.teacher",
            what=f"{teacher.address} has no weights of {which}, and those of another fold were trained on "
            "rows that are scored here",
            remedy=f"train it first: comp train {teacher.run}{option}",
        )
    return folders


def _context_of(teacher: Teacher, context: Context, gather: Callable[[Config], Context]) -> Context:
    """The teacher's own config, with the machine and tracking of this run."""
    return gather(teacher.cfg.model_copy(update={"machine": context.cfg.machine, "track": context.cfg.track}))


def _write(file: Path, rows: np.ndarray, means: dict[str, np.ndarray], weights: dict[str, str]) -> None:
    from safetensors.numpy import save

    heads = {name: np.ascontiguousarray(values, np.float32) for name, values in means.items()}
    with artifacts.atomic(file) as temporary:
        temporary.write_bytes(save({"rows": rows, **heads}))
    artifacts.add_to_manifest(file, weights=weights)
