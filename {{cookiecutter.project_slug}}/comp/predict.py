"""From the weights of a fold to its predictions: OOF (the fold's validation rows) and test, averaged over the
views of predict.tta."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from comp import models, transforms
from comp.engine.bank import predictions
from comp.engine.hardware import Stop, Stopped
from comp.engine.run import fold_predictions, frozen_heads, knn, normalize, views
from comp.engine.run.context import Context
from comp.engine.run.forward import forward_rows, validate_finite
from comp.engine.tasks.kinds import Head

Rows = NDArray[np.int64]  # positions in the samples table
Predictions = dict[str, NDArray[np.float32]]  # head -> (rows, outputs), in the space that is stored
Damaged = dict[int, str]  # row -> why its image is damaged


def predict_fold(
    context: Context,
    run: str,
    seed: int,
    fold: int | str,
    kind: str,
    subfolder: str = "",
    *,
    stop: Stop | None = None,
) -> Path:
    """runs/<run>/seed<s>/fold<k>/<subfolder>/{oof,test}.arrow, unless it exists. `subfolder`: for other views
    than those of the run, or for a member with weights of its own."""
    target = fold_predictions.locate(context.cfg, run, seed, fold, kind, subfolder)
    if target.done:
        return target.file
    rows = fold_predictions.rows_of(context, target)
    began = time.perf_counter()
    if knn.predicts(context):
        train_rows = context.folds.split(fold)[0]
        knn.build_gallery(context, target.weights, train_rows, partial(forward, stop=stop))
    description = f"{kind} of seed {seed} fold {fold} {subfolder}".rstrip()
    heads, damaged = predict(context, target.weights, rows, description, stop=stop)
    return fold_predictions.save(context, target, rows, heads, damaged, time.perf_counter() - began)


def predict(
    context: Context,
    weights: Path,
    rows: Rows,
    description: str = "",
    fallback: Callable[[Head], NDArray[Any]] | None = None,
    *,
    stop: Stop | None = None,
) -> tuple[Predictions, Damaged]:
    """`fallback`: the prediction for a damaged image (default: the mean of the training labels)."""
    cfg, heads = context.cfg, context.samples.heads
    if frozen_heads.is_head(weights):
        by_head, damaged = frozen_heads.predict_rows(context, weights, rows)
    else:
        outputs, damaged = forward(context, weights, rows, description, stop=stop)
        if knn.predicts(context):
            by_head = knn.predict(context, weights, outputs)
        else:
            by_view = [models.decode(cfg, heads, view) for view in outputs]
            by_head = [
                predictions.average([view[i] for view in by_view], head, cfg.predict.averaging_space)
                for i, head in enumerate(heads)
            ]
    stored = {}
    for head, values in zip(heads, by_head, strict=True):  # (rows, outputs)
        values[np.isin(rows, list(damaged))] = (
            fallback(head) if fallback else predictions.prior(head, context.samples, context.folds)
        )
        stored[head.name] = values.astype(np.float32)
    return stored, damaged


def forward(
    context: Context, weights: Path, rows: Rows, description: str, stop: Stop | None = None
) -> tuple[NDArray[np.float32], Damaged]:
    """(views, rows, model outputs)"""
    cfg, heads = context.cfg, context.samples.heads
    module = models.build(cfg, heads, pretrained=False, loader=context.loader)
    module = models.load_weights(module, weights).to(context.device)
    preprocess = transforms.Preprocess(normalize.build(cfg, module, context.device))
    tta = views.views(cfg.predict.tta)
    disable = None if cfg.machine.progress else True
    with tqdm(total=len(rows), desc=description, unit="image", leave=False, disable=disable) as bar:

        def on_batch(count: int) -> None:
            bar.update(count)
            # Nothing is lost: the weights are complete, and the next start begins with these predictions.
            if stop is not None and stop.requested:
                raise Stopped(f"{description or 'predictions'}: {bar.n} of {len(rows)} images")

        outputs, damaged = forward_rows(
            module,
            context.loader,
            rows,
            cfg.predict.batch_size,
            preprocess,
            cfg.train.amp,
            tta,
            on_batch=on_batch,
        )
    validate_finite(outputs, weights)
    return outputs, damaged
