"""Choosing weights by a score: on training rows that are held out (select.on: inner), or on the very rows of the CV, with what
that flatters them by.

Picking the best of many on some rows makes its score on those rows too good. By how much is estimated as for any choice: pick
on all rows but a fifth, look at that fifth, and compare with the pick that saw everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from comp import models
from comp.engine.bank import score
from comp.engine.config import run_members
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import Refused
from comp.engine.run.evaluate import forward_rows, raise_damaged
from comp.transforms import Preprocess

if TYPE_CHECKING:
    from comp.engine.run.context import Context

FIFTHS = 5
Scores = NDArray[
    np.float64
]  # (1 + 2 x FIFTHS,): on all rows, on each fifth, on all but each fifth; more is better


def fold_rows(context: Context, number: int | str) -> tuple[Positions, Positions, Positions]:
    """(rows that teach, rows that are scored, rows that a choice is made on)"""
    cfg, folds = context.cfg, context.folds
    taught, scored = folds.split(number)
    judged = taught[:0]
    if run_members.selects_by_score(cfg):
        if cfg.select.on == "inner":
            taught, judged = folds.inner_split(number, cfg.select.validation_fraction)
        elif number == "full":
            raise Refused(
                "--fold full: there are no scored rows to choose on; select.on=inner, or select.name=last and no greedy soup"
            )
        else:
            judged = scored
    return (
        limit_rows(taught, context.samples, cfg.train.max_samples),
        scored[: cfg.train.max_samples],
        judged[: cfg.train.max_samples],
    )


def limit_rows(taught: Positions, samples: Samples, limit: int | None) -> Positions:
    """The first few; a quarter of them extra or pseudo-labelled, where there are such rows, so that a short run tries them too."""
    if limit is None or len(taught) <= limit:
        return taught
    own = samples.frame["source"].to_numpy()[taught] == "train"
    others = taught[~own][: limit // 4]
    return np.sort(np.concatenate([taught[own][: limit - len(others)], others]))


def build_scorer(context: Context, rows: Positions, seen: Preprocess) -> Callable[[nn.Module], Scores] | None:
    """Scores a network on the rows that choose; None where there is nothing to choose."""
    if not len(rows):
        return None
    cfg = context.cfg
    bench = Scorer(cfg, context.samples, context.folds, rows)

    def scored(module: nn.Module) -> Scores:
        raw, damaged = forward_rows(module, context.loader, rows, cfg.predict.batch_size, seen, cfg.train.amp)
        raise_damaged(damaged, context.samples)
        return bench(raw[0])

    return scored


class Scorer:
    """The metric of the competition on the rows that choose, and on parts of them where these are the scored ones."""

    def __init__(self, cfg: Config, samples: Samples, folds: Folds, rows: Positions):
        self.cfg, self.samples, self.rows = cfg, samples, rows
        place = folds.shuffled_groups(rows, "fifths")[1]
        part = place * FIFTHS // (place.max() + 1)
        every = [np.ones(len(rows), bool)]
        if cfg.select.on == "fold":
            every += [part == i for i in range(FIFTHS)] + [part != i for i in range(FIFTHS)]
        self.parts = every

    def __call__(self, raw: NDArray[np.float32]) -> Scores:
        """Of the network's outputs for the rows, in their order."""
        heads = self.samples.heads
        stored = models.decode(self.cfg, heads, raw)

        def of(part: NDArray[np.bool_]) -> float:
            each = [
                score.metric_of(self.cfg, head).sign
                * score.validation_score(self.cfg, head, values[part], self.samples, self.rows[part])
                for head, values in zip(heads, stored, strict=True)
                if part.any()
            ]
            return float(np.mean(each)) if each else float("nan")

        found = np.array([of(part) for part in self.parts])
        if np.isnan(found[0]):
            raise Refused(
                f"{score.metric_of(self.cfg).name} is undefined on the {len(self.rows)} rows that choose; raise select.validation_fraction"
            )
        return found


def best(scores: Sequence[Scores], column: int = 0) -> int:
    """The first of the best."""
    return int(np.nanargmax([each[column] for each in scores]))


def optimism(pick: Callable[[int], Any], score_of: Callable[[Any], Scores]) -> float | None:
    """`pick` takes a column of scores. How much too good the pick looks on the rows that picked it: its fifths against what each fifth's outsiders picked."""
    chosen = score_of(pick(0))
    gaps = [chosen[1 + i] - score_of(pick(1 + FIFTHS + i))[1 + i] for i in range(FIFTHS)]
    known = [gap for gap in gaps if not np.isnan(gap)]
    return float(np.mean(known)) if known else None
