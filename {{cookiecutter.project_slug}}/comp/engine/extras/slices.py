"""comp slices: scores of a run or an ensemble by class, by group and by every column of metadata, each slice
with n, a confidence interval and a corrected p-value (slice_statistics.py)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from comp import metrics
from comp.engine import text_table
from comp.engine.bank import bank, score
from comp.engine.config import resolve
from comp.engine.data import folds, samples
from comp.engine.data.samples import Positions, Samples, aggregate_rows
from comp.engine.errors import UserError
from comp.engine.extras import slice_statistics
from comp.engine.extras.slice_statistics import ALPHA, LEVEL, SliceScorer
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Array, Head

if TYPE_CHECKING:
    import pandas as pd

MIN_ROWS = 20  # of a slice
MAX_VALUES = 20  # of a column, the most frequent; the rest is one slice
BINS = 4  # of a column of numbers: quartiles
COLUMNS = ("slice", "metric", "n", "score", "low", "high", "all", "p (Holm)", "against all")


def slices(name: str) -> pd.DataFrame:
    """Write slices.csv of a run or an ensemble, the worst slices first, and print it."""
    import pandas as pd

    cfg = resolve.load(paths.root(), "base").config
    rows = samples.load()
    split = folds.load(rows)
    oof = bank.load(name, "oof", rows, split)
    assert oof.fold is not None
    known = oof.predicted
    scored_rows = score.scored_rows(rows, oof.row[known].astype(np.int64), oof.fold[known].astype(np.int64))
    group = cfg.competition.group or "group"
    groups = slice_statistics.group_codes(score.groups_of(rows, scored_rows.rows))
    lines = []
    for head in rows.heads:
        probability = oof.probability(head)[known]
        own = score.metric_input(cfg, head, probability, rows, split, scored_rows)
        scorer = SliceScorer(own.metric, own.truth, own.prediction, own.frame, groups)
        merged = aggregate_rows(scored_rows.keys, probability, scored_rows.order, cfg.competition.merge)
        by_metadata = ((label, at, scorer) for label, at in _metadata_slices(rows, scored_rows.rows, group))
        lines += _lines(head, [*_class_slices(scorer, head, merged), *by_metadata])
    if not lines:
        raise UserError(
            "slices-missing",
            where="configs/competition.yaml",
            what=f"no classes, group or metadata with {MIN_ROWS} rows of a value, so there are no slices",
        )
    frame = pd.DataFrame(lines)
    file = bank.folder(name) / "slices.csv"
    artifacts.write_text(file, frame.to_csv(index=False))
    for head_name, own_lines in frame.groupby("head", sort=False):
        print(f"{head_name}: the worst slices first; low to high is the {LEVEL:.0%} interval of each slice")
        cells = [[_cell(line[column]) for column in COLUMNS] for _, line in own_lines.head(30).iterrows()]
        print(text_table.render(COLUMNS, cells, COLUMNS[2:8]))
        count = len(own_lines)
        print(
            f"{(own_lines['against all'] != '').sum()} of {count} slices differ significantly "
            f"from all rows (p after Holm's correction for {count} comparisons at most {ALPHA:g})"
        )
    print(f"written: {paths.relative(file)}\nnext: comp label-errors {name}")
    return frame


Slice = tuple[str, Positions, SliceScorer]


def _lines(head: Head, parts: list[Slice]) -> list[dict[str, Any]]:
    """One line per slice with enough rows, the worst first."""
    lines: list[dict[str, Any]] = []
    for label, at, scorer in parts:
        if len(at) >= MIN_ROWS:
            facts = {"head": head.name, "metric": scorer.metric.name, "slice": label, "n": len(at)}
            lines.append(facts | slice_statistics.describe(scorer, at, len(parts)))
    lines.sort(key=lambda line: (np.isnan(line["gain"]), line["gain"]))
    slice_statistics.correct_p_values(lines)
    return lines


def _class_slices(scorer: SliceScorer, head: Head, probability: Array) -> Iterator[Slice]:
    """Rows of each class; with several labels, rows that have the label. Scored by the metric if it is a mean
    over rows, else by accuracy: most metrics are undefined, or mean something else, on rows of a single
    class."""
    import pandas as pd

    if head.spec.space == "value" and not head.classes:
        return
    own, single = scorer, scorer.truth.ndim == 1
    if scorer.metric.kind != "row":
        accuracy = metrics.METRICS["accuracy"]
        label = scorer.prediction
        if scorer.metric.needs != "label":
            label = score.default_predictions(accuracy, head, probability)
        truth = scorer.truth.argmax(axis=1) if head.exclusive and not single else scorer.truth
        truth = np.where(np.isnan(truth), label, truth)  # a missing label counts as correct
        own = SliceScorer(accuracy, truth, label, scorer.frame, scorer.groups)
    if single or head.exclusive:
        codes = scorer.truth if single else scorer.truth.argmax(axis=1)
        names = np.array(head.classes or head.outputs, object)[codes.astype(np.int64)]
        parts = _by_value(head.name, pd.Series(names))
    else:
        outputs = [head.outputs[i] for i in head.scored_indices]
        parts = (
            (f"{head.name} {output}", np.flatnonzero(scorer.truth[:, i] > 0))
            for i, output in enumerate(outputs)
        )
    yield from ((label, at, own) for label, at in parts)


def _metadata_slices(rows: Samples, at: Positions, group: str) -> Iterator[tuple[str, Positions]]:
    """(name, positions in `at`) by group and metadata. `group`: the name of its column in the raw table."""
    for column in rows.frame:
        if column == "group" or str(column).startswith("meta."):
            name = group if column == "group" else str(column).removeprefix("meta.")
            yield from _by_value(name, rows.frame[column].iloc[at])


def _by_value(name: str, values: pd.Series) -> Iterator[tuple[str, Positions]]:
    """Each value of a column of text, quartiles of a column of numbers, and missing values."""
    import pandas as pd

    missing = values.isna().to_numpy()
    if missing.any():
        yield f"{name} missing", np.flatnonzero(missing)
    if pd.api.types.is_numeric_dtype(values) and values.nunique() > BINS:
        edges = np.unique(np.nanquantile(values.to_numpy(np.float64), np.linspace(0, 1, BINS + 1)))
        for low, high in pairwise(edges):
            inside = (values >= low) & ((values <= high) if high == edges[-1] else (values < high))
            yield f"{name} {low:g} to {high:g}", np.flatnonzero(inside.to_numpy())
        return
    counts = values.value_counts()
    for value in counts.index[:MAX_VALUES]:
        yield f"{name} {_cell(value)}", np.flatnonzero((values == value).to_numpy())
    if len(counts) > MAX_VALUES:
        rest = ~values.isin(counts.index[:MAX_VALUES]).to_numpy() & ~missing
        yield f"{name}, {len(counts) - MAX_VALUES} more", np.flatnonzero(rest)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.4f}" if value % 1 else f"{value:g}"
    return str(value)
