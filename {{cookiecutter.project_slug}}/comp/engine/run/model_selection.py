"""Selecting weights by a score: on training rows held out for it (select.on: inner), or on the validation
rows of the fold themselves, with an estimate of the optimism of that.

The best of many on some rows has too good a score on those rows. By how much is estimated as for any
selection: select on all rows but a fifth, score on that fifth, and compare with the selection that used all
rows.
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
from comp.engine.errors import UserError
from comp.engine.run.forward import forward_rows, raise_damaged
from comp.engine.run.metric_learning import drop_unknown_class
from comp.transforms import Preprocess

if TYPE_CHECKING:
    from comp.engine.run.context import Context

FIFTHS = 5
# (1 + 2 x FIFTHS,): on all rows, on each fifth, on all but each fifth; higher is better
Scores = NDArray[np.float64]


def fold_rows(context: Context, fold: int | str) -> tuple[Positions, Positions, Positions]:
    """(training rows, validation rows, rows that weights are selected on: empty without selection)"""
    cfg, folds = context.cfg, context.folds
    train_rows, valid_rows = folds.split(fold)
    select_rows = train_rows[:0]
    if run_members.selects_by_score(cfg):
        if cfg.select.on == "inner":
            train_rows, select_rows = folds.inner_split(fold, cfg.select.validation_fraction)
        elif fold == "full":
            raise UserError(
                "select-without-rows",
                where="--fold full",
                key="select.on",
                what="the refit has no validation rows to select on",
                remedy="select.on=inner, or select.name=last and no greedy soup",
            )
        else:
            select_rows = valid_rows
    train_rows = limit_rows(train_rows, context.samples, cfg.train.max_samples)
    train_rows = drop_unknown_class(cfg, context.samples, train_rows)
    if len(train_rows) == 0:
        raise UserError("rows-missing", where=f"fold {fold}", what="no rows to train on")
    return (
        train_rows,
        drop_unknown_class(cfg, context.samples, valid_rows[: cfg.train.max_samples]),
        drop_unknown_class(cfg, context.samples, select_rows[: cfg.train.max_samples]),
    )


def limit_rows(rows: Positions, samples: Samples, limit: int | None) -> Positions:
    """The first rows up to the limit, at most a quarter of them extra or pseudo-labeled: a short run then
    uses those too."""
    if limit is None or len(rows) <= limit:
        return rows
    is_train = samples.frame["source"].to_numpy()[rows] == "train"
    others = rows[~is_train][: limit // 4]
    return np.sort(np.concatenate([rows[is_train][: limit - len(others)], others]))


def build_scorer(
    context: Context, rows: Positions, preprocess: Preprocess
) -> Callable[[nn.Module], Scores] | None:
    """A function that scores a network on the selection rows; None without such rows."""
    if not len(rows):
        return None
    cfg = context.cfg
    scorer = Scorer(cfg, context.samples, context.folds, rows)

    def score_network(module: nn.Module) -> Scores:
        raw, damaged = forward_rows(
            module, context.loader, rows, cfg.predict.batch_size, preprocess, cfg.train.amp
        )
        raise_damaged(damaged, context.samples)
        return scorer(raw[0])

    return score_network


class Scorer:
    """The competition's metric on the selection rows, and on parts of them where these are the validation
    rows."""

    def __init__(self, cfg: Config, samples: Samples, folds: Folds, rows: Positions):
        self.cfg, self.samples, self.rows = cfg, samples, rows
        place = folds.shuffled_groups(rows, "fifths")[1]
        fifth = place * FIFTHS // (place.max() + 1)
        self.masks = [np.ones(len(rows), bool)]
        if cfg.select.on == "fold":
            self.masks += [fifth == i for i in range(FIFTHS)] + [fifth != i for i in range(FIFTHS)]

    def __call__(self, raw: NDArray[np.float32]) -> Scores:
        """`raw`: (rows, network outputs), in the order of the selection rows."""
        heads = self.samples.heads
        decoded = models.decode(self.cfg, heads, raw)

        def score_part(mask: NDArray[np.bool_]) -> float:
            """Mean over heads, higher is better; NaN for an empty part."""
            scores = [
                score.metric_of(self.cfg, head).sign
                * score.validation_score(self.cfg, head, values[mask], self.samples, self.rows[mask])
                for head, values in zip(heads, decoded, strict=True)
                if mask.any()
            ]
            return float(np.mean(scores)) if scores else float("nan")

        scores = np.array([score_part(mask) for mask in self.masks])
        if np.isnan(scores[0]):
            raise UserError(
                "metric-undefined",
                key="select.validation_fraction",
                what=f"{score.metric_of(self.cfg).name} is undefined on the {len(self.rows)} selection rows",
                remedy="raise it",
            )
        return scores


def best(scores: Sequence[Scores], column: int = 0) -> int:
    """Index of the highest score in a column; the first of equal ones."""
    return int(np.nanargmax([each[column] for each in scores]))


def optimism(pick: Callable[[int], Any], score_of: Callable[[Any], Scores]) -> float | None:
    """By how much the score of a selection is too good on the rows it was made on; None where it cannot be
    estimated.

    `pick` selects by a column of the scores. Each fifth compares the selection made on all rows with one made
    without that fifth.
    """
    selected = score_of(pick(0))
    gaps = [selected[1 + i] - score_of(pick(1 + FIFTHS + i))[1 + i] for i in range(FIFTHS)]
    known = [gap for gap in gaps if not np.isnan(gap)]
    return float(np.mean(known)) if known else None
