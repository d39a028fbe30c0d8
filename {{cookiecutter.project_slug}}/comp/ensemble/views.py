"""Views for test-time augmentation, chosen by evidence: most OOF score per millisecond, scored on folds that did not choose.

The choice is a greedy one: from the plain picture on, the view that gains most per pass, as long as one gains. Every view costs
one pass through the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp import score
from comp.metrics import Metric, MetricUndefined
from comp.predictions import average
from comp.tasks import Array, Head

PLAIN = "identity"
Views = Mapping[str, NDArray[Any]]  # view -> (rows, outputs), as stored


def choose(
    views: Views, truth: NDArray[Any], head: Head, metric: Metric, space: str, most: int, rows: Any = None
) -> list[str]:
    """The views whose mean scores best, at most so many, the plain one always among them."""

    def scored(names: Sequence[str]) -> float:
        said = average([views[name] for name in names], head, space)
        try:
            return metric.sign * metric(truth, score.plain(metric, head, head.row.probability(said)), rows)
        except MetricUndefined:
            return -np.inf

    chosen = [PLAIN]
    reached = scored(chosen)
    while len(chosen) < min(most, len(views)):
        left = [name for name in views if name not in chosen]
        gains = [scored([*chosen, name]) for name in left]
        best = int(np.argmax(gains))
        if not gains[best] > reached + 1e-12:
            break
        chosen.append(left[best])
        reached = gains[best]
    return chosen


def said(views: Views, names: Sequence[str], head: Head, space: str, at: Any = slice(None)) -> Array:
    return average([views[name][at] for name in names], head, space)


Nest = Callable[..., Any]


def honest(
    views: Views,
    truth: NDArray[Any],
    head: Head,
    metric: Metric,
    space: str,
    most: int,
    nest: Nest,
    rows: Any = None,
) -> tuple[list[str], Array]:
    """(views chosen on all folds, predictions of each fold with the views chosen on the others). nest(fit, apply, first)."""

    def fit(at: NDArray[np.int64]) -> list[str]:
        here = {name: each[at] for name, each in views.items()}
        return choose(here, truth[at], head, metric, space, most, None if rows is None else rows.iloc[at])

    found = nest(fit, lambda names, at: said(views, names, head, space, at), [PLAIN])
    return list(found.final), found.prediction
