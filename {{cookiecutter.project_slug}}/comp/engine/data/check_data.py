"""The checks of tables, sample submission and images in comp check."""

from __future__ import annotations

from typing import NamedTuple

from comp.engine.config.schema import Config
from comp.engine.data import exact_duplicates, image_check, prepare, sample_submission
from comp.engine.data.prepare import Prepared
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError


class DataReport(NamedTuple):
    prepared: Prepared
    faults: list[UserError]
    notes: list[str]
    sample_fits: bool  # the sample submission has the rows and columns that are predicted


def check(cfg: Config, as_trained: bool) -> DataReport:
    """`as_trained`: decode images at data.size and by data.resize, as training does; otherwise small, which is
    faster.

    Raises what prevents the tables from being read at all.
    """
    competition = cfg.competition
    prepared = prepare.read_samples(competition)
    frame, heads = prepared.frame, prepared.heads
    counts = frame["source"].value_counts(sort=False)
    notes = [", ".join(f"{count} {source} rows" for source, count in counts.items())]
    notes += prepared.notes
    notes += exact_duplicates.notes_on_shared_images(cfg, Samples(frame, heads, ""))
    notes += prepare.check_written(prepared)
    of_sample, sample_notes = sample_submission.check(competition, frame, heads, prepared.where)
    of_images, image_notes = image_check.check(cfg, prepared, as_trained)
    faults = [*prepared.faults, *of_sample, *of_images]
    return DataReport(prepared, faults, [*notes, *sample_notes, *image_notes], not of_sample)
