"""What a run will write, checked against the free disk space before it starts rather than in the middle of
the last fold."""

from __future__ import annotations

import sys

from comp import models, train
from comp.engine.bank import bank
from comp.engine.config import run_members
from comp.engine.config.experiments import Fold
from comp.engine.run import knn, pseudo_rows, schedule
from comp.engine.run.context import Context
from comp.engine.store import artifacts


def announce(context: Context, run: str, todo: list[tuple[int, Fold]], total: int) -> None:
    """Prints the bytes of `todo`, out of `total` folds, and warm-ups that the schedule had to shorten. The
    first fold stands for all, which differ by a few steps."""
    if not todo:
        return
    weights = models.weight_bytes(context.cfg, context.samples.heads)
    weights += knn.gallery_bytes(context.cfg, context.samples)
    sets = len(todo) * (1 + len(run_members.extra_weights(context.cfg)))
    rows = len(context.samples.positions("train")) + len(context.samples.positions("test"))
    # A checkpoint has weights, two moments of the optimizer and averaged weights; two exist at once.
    size = sets * (weights + bank.nbytes(context.samples, rows)) + 8 * weights
    print(f"{run}: {len(todo)} of {total} folds to train, up to {artifacts.format_size(size)} to write")
    seed, fold = todo[0]
    first = train.planned_schedule(pseudo_rows.fold_context(context, fold), seed, fold)
    for line in schedule.shortened_warmups(first):
        print(line, file=sys.stderr)
    artifacts.require_space(size, f"runs/{run}")
