"""A submission of made-up predictions, written and validated as comp submit does it: what that would refuse after a training,
comp check says before. Every class is the likeliest of some row, so that each is written at least once where rows suffice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from comp import submission
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config.schema import Config
from comp.engine.data.prepare import Prepared
from comp.engine.data.sample_submission import load_sample, scored_ids
from comp.engine.data.samples import Samples
from comp.engine.deliver import validate
from comp.engine.deliver.submission_format import refuse_misfit
from comp.engine.errors import UserError
from comp.engine.tasks.kinds import Array, Head

NUMBERS = 2_000_000  # predictions at most: of more, the first lines of the sample alone
NAME = "a submission of made-up predictions"


def written(cfg: Config, reading: Prepared) -> tuple[list[str], list[str]]:
    """Faults, and notes; nothing reaches the disk."""
    heads = reading.heads
    try:
        refuse_misfit(cfg.competition.submission, heads)
        sample = load_sample(cfg.competition)
        lines = max(1, NUMBERS // sum(len(head.outputs) for head in heads))
        sample = replace(sample, rows=sample.rows[:lines])
        ids = set(scored_ids(cfg.competition, sample, heads))
        test = (reading.frame["source"] == "test") & reading.frame["row"].isin(ids)
        rows = np.flatnonzero(test.to_numpy())
        if ids - set(reading.frame["row"].iloc[rows]):
            return [], []  # other rows than the sample's: check has a line for each
        table = Samples(reading.frame, heads, "", multi_image=False)
        made_up = PredictionSet(
            rows.astype(np.int32),
            None,
            {head.name: made(head, table, len(rows)).astype(np.float32) for head in heads},
            {},
        )
        lines_, form = submission.filled(cfg, table, NAME, made_up, sample, lambda name: {})
        validate.check(submission.text_of(lines_, sample).encode(), NAME, sample, form)
    except UserError as refused:
        return refused.lines, []
    return [], []


def made(head: Head, table: Samples, rows: int) -> Array:
    """(rows, outputs) as a run stores them."""
    favoured = np.arange(rows) % max(len(head.outputs), len(head.classes), 1)
    if head.task == "ordinal":
        return head.spec.from_probability(favoured[:, None].astype(np.float64))
    if head.task == "regression":
        taught = table.targets(head)[table.labeled]
        return np.tile(np.nanmean(taught, axis=0), (rows, 1))
    likely = favoured[:, None] == np.arange(len(head.outputs))
    if head.exclusive:
        share = 0.5 / max(len(head.outputs) - 1, 1)
        return head.spec.from_probability(np.where(likely, 0.5, share))
    return head.spec.from_probability(np.where(likely, 0.75, 0.25))
