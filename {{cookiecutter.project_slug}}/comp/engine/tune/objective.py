"""The objectives of a study: the score of a trial over its folds, and its inference time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from comp.engine.bank import bank, predictions, score
from comp.engine.errors import UserError
from comp.engine.store import paths
from comp.engine.tune.study import OpenStudy

if TYPE_CHECKING:
    from comp.engine.run.context import Context

TIMED_PASSES = 5


def cv_score(opened: OpenStudy, context: Context, name: str, seed: int) -> dict[str, Any]:
    """The score that the run would have, over the folds that were trained: value, mean, std, n, folds, and
    text to print."""
    tables = (context.samples, context.folds)
    sets = [
        bank.read(paths.fold_folder(name, seed, fold) / "oof.arrow", *tables)
        for fold in range(opened.n_folds)
    ]
    merged = predictions.merge(sets, *tables, context.cfg.predict.averaging_space)
    record = score.evaluate(context.cfg, *tables, merged)
    value = record["oof"] if record["oof"] is not None else record["mean"]
    if value is None:
        raise UserError("metric-undefined", where=name, what=score.summary(record))
    return {
        "value": value,
        **{key: record[key] for key in ("mean", "std", "n", "folds")},
        "text": score.summary(record),
    }


def ms_per_image(context: Context) -> float:
    """Forward pass of one image under all TTA views, without reading it: the median of some passes after a
    first one."""
    import numpy as np
    import torch

    from comp import models
    from comp.engine.run import views

    cfg, device = context.cfg, context.device
    module = models.build(cfg, context.samples.heads, pretrained=False).to(device).eval()
    rows = min(cfg.predict.batch_size, 64)
    batch = torch.zeros(rows, cfg.data.channels, cfg.data.size, cfg.data.size, device=device)
    times = []
    with torch.inference_mode():
        for _ in range(TIMED_PASSES + 1):
            began = time.perf_counter()
            float(module(batch).sum())  # waits for the GPU
            times.append(time.perf_counter() - began)
    return float(np.median(times[1:])) / rows * 1000 * len(views.views(cfg.predict.tta))
