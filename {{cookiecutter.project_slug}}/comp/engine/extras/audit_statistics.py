"""For comp audit: statistics that are stored in the weights (of pixels, and of targets that are values) are
computed again from the training part of each fold, and must be equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.extras.audit_predictions import fold_of
from comp.engine.extras.findings import STATISTICS, Leak
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    from comp.engine.run.context import Context

TOLERANCE = 1e-5  # relative to the largest: they are sums in float64
Statistics = dict[str, NDArray[np.float64]]


def has_statistics(context: Context) -> bool:
    """Whether this run's network has any."""
    return bool(_read(_build(context)))


def leaks(context: Context, weights: Sequence[Path]) -> list[Leak]:
    from comp import models
    from comp.engine.run import model_selection, pseudo_rows

    found: list[Leak] = []
    by_fold: dict[str, Statistics] = {}  # seeds share the folds, and so what is fitted on them
    for file in weights:
        fold = fold_of(file).name.removeprefix("fold")
        joined = pseudo_rows.fold_context(context, fold)  # pseudo-labelled rows count like others
        valid_rows = joined.folds.split(fold)[1]
        train_rows = model_selection.fold_rows(joined, fold)[0]
        train_rows = train_rows[~np.isin(train_rows, valid_rows)]  # whatever the functions above returned
        by_fold[fold] = by_fold.get(fold) or _fit(joined, train_rows)
        stored = _read(models.load_weights(_build(context), artifacts.verified(file)))
        if _equal(stored, by_fold[fold]):
            continue
        with_valid = np.union1d(train_rows, valid_rows[: context.cfg.train.max_samples])
        wider = (with_valid, joined.folds.split("full")[0])
        leaked = any(_equal(stored, _fit(joined, rows)) for rows in wider)
        name = STATISTICS if leaked else "statistics that differ from those of the training rows"
        found.append(Leak(name, paths.relative(file), "recomputation"))
    return found


def _build(context: Context) -> Any:
    from comp import models

    return models.build(context.cfg, context.samples.heads, pretrained=False, loader=context.loader)


def _fit(context: Context, rows: NDArray[np.int64]) -> Statistics:
    from comp.engine.run import pixel_stats, target_scaler

    module = _build(context)
    pixel_stats.fit_pixel_stats(context.cfg, module, context.loader, rows)
    target_scaler.fit(context.cfg, module, context.samples, rows)
    return _read(module)


def _read(module: Any) -> Statistics:
    """The axes of a whitening may point either way, so its effect on the covariance is compared."""
    from comp.engine.run import pretrained

    found = {
        name: value.cpu().double().numpy()
        for name, value in module.named_buffers()
        if name in pretrained.FOLD_STATISTICS
    }
    return {name: v @ v.T if name == "white" else v for name, v in found.items()}


def _equal(a: Statistics, b: Statistics) -> bool:
    """A whitening divides by variances near zero, which machines round differently; a mean does not."""
    tolerance = {name: 1e-2 if name == "white" else TOLERANCE for name in b}
    return all(
        np.abs(a[name] - b[name]).max() <= tolerance[name] * max(1.0, np.abs(b[name]).max()) for name in b
    )
