"""A dummy submission (made-up predictions), formatted and validated exactly as comp submit does it: comp
check reports before a training what comp submit would refuse after it. Every class is the most likely one of
some row, so that each is written."""

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
from comp.engine.deliver.submission_format import validate_form
from comp.engine.errors import UserError
from comp.engine.tasks.kinds import Array, Head

MAX_NUMBERS = 2_000_000  # predictions; of a larger sample only its first lines are tried
NAME = "a submission of made-up predictions"


def check(cfg: Config, prepared: Prepared) -> list[UserError]:
    """The faults. Writes nothing to the disk."""
    heads = prepared.heads
    try:
        validate_form(cfg.competition.submission, heads)
        sample = load_sample(cfg.competition)
        lines = max(1, MAX_NUMBERS // sum(len(head.outputs) for head in heads))
        sample = replace(sample, rows=sample.rows[:lines])
        ids = set(scored_ids(cfg.competition, sample, heads))
        test = (prepared.frame["source"] == "test") & prepared.frame["row"].isin(ids)
        rows = np.flatnonzero(test.to_numpy())
        if ids - set(prepared.frame["row"].iloc[rows]):
            return []  # other rows than the sample's: comp check reports each of them itself
        table = Samples(prepared.frame, heads, "", multi_image=False)
        predictions = {
            head.name: dummy_predictions(head, table, len(rows)).astype(np.float32) for head in heads
        }
        dummy = PredictionSet(rows.astype(np.int32), None, predictions, {})
        made, rules = submission.make_lines(cfg, table, NAME, dummy, sample, lambda name: {})
        validate.validate_bytes(submission.csv_text(made, sample).encode(), NAME, sample, rules)
    except UserError as error:
        return error.errors
    return []


def dummy_predictions(head: Head, table: Samples, rows: int) -> Array:
    """(rows, outputs) as a run stores them: each row favors the next class, regression predicts the mean."""
    favoured = np.arange(rows) % max(len(head.outputs), len(head.classes), 1)
    if head.task == "ordinal":
        return head.spec.from_probability(favoured[:, None].astype(np.float64))
    if head.task == "regression":
        targets = table.targets(head)[table.labeled]
        return np.tile(np.nanmean(targets, axis=0), (rows, 1))
    is_favoured = favoured[:, None] == np.arange(len(head.outputs))
    if head.exclusive:
        rest = 0.5 / max(len(head.outputs) - 1, 1)
        return head.spec.from_probability(np.where(is_favoured, 0.5, rest))
    return head.spec.from_probability(np.where(is_favoured, 0.75, 0.25))
