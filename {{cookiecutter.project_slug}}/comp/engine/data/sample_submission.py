"""The host's sample submission. It defines the columns, ids, order and separator of a submission; its values
are ignored.

A column without a name is an index that the host's tool wrote; a submission copies it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from comp.engine import pages
from comp.engine.config import declaration
from comp.engine.config.competition_schema import Competition
from comp.engine.config.resolve import nearest
from comp.engine.data import raw_tables
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.readers import delimited
from comp.engine.readers.unicode_names import nfc
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

if TYPE_CHECKING:
    import pandas as pd

UNNAMED = re.compile(r"(Unnamed: \d+)?")  # the name of an index: pandas writes "" and reads it as Unnamed: 0


@dataclass(frozen=True)
class SampleSubmission:
    file: Path
    columns: tuple[str, ...]
    id_position: int  # of the id column
    rows: list[list[str]]
    delimiter: str = ","
    index: tuple[int, ...] = ()  # positions of the columns without a name

    @property
    def ids(self) -> list[str]:
        """The id of each line as the host wrote it; several lines may have the same id."""
        return [row[self.id_position] for row in self.rows]

    @cached_property
    def row_keys(self) -> list[str]:
        """`row` of the samples table for each line (in the long form, the id of the line)."""
        return [nfc(each) for each in self.ids]

    @property
    def prediction_positions(self) -> list[int]:
        """Positions of the columns to fill in."""
        return [i for i in range(len(self.columns)) if i != self.id_position and i not in self.index]

    @property
    def prediction_columns(self) -> tuple[str, ...]:
        """Names of the columns to fill in."""
        return tuple(self.columns[i] for i in self.prediction_positions)

    @cached_property
    def repeated_ids(self) -> dict[str, list[int]]:
        """id -> its lines in the file, of ids that are in several lines."""
        lines: dict[str, list[int]] = {}
        for line, each in enumerate(self.ids, 2):
            lines.setdefault(each, []).append(line)
        return {each: numbers for each, numbers in lines.items() if len(numbers) > 1}

    def deduplicated(self) -> SampleSubmission:
        """The sample with one line per id."""
        first: dict[str, list[str]] = {}
        for key, row in zip(self.row_keys, self.rows, strict=True):
            first.setdefault(key, row)
        return self if len(first) == len(self.rows) else replace(self, rows=list(first.values()))

    def fill(self, index: int, cells: Sequence[str]) -> list[str]:
        """Row `index` with these cells in the columns to fill in."""
        row = list(self.rows[index])
        for position, cell in zip(self.prediction_positions, cells, strict=True):
            row[position] = cell
        return row


def load_sample(competition: Competition) -> SampleSubmission:
    file = paths.path(competition.raw, competition.submission.sample)
    return read_sample(file, *id_column_candidates(competition))


def id_column_candidates(competition: Competition) -> list[str]:
    """Names that the id column may have, the most likely one first."""
    row = competition.row
    names = [row if row and "{" not in row else None, competition.id, competition.test.id]
    return [name for name in names if name]


def read_sample(file: Path, *id_columns: str) -> SampleSubmission:
    """The id column is the first of `id_columns` that the file has, else its first column with a name. A BOM,
    quotes, \\r\\n, another separator than the comma and an archive around the file are accepted."""
    file = raw_tables.unpacked(file)
    shown = paths.relative(file)
    again = "download it again"
    try:
        lines = list(delimited.lines(file))
    except FileNotFoundError:
        remedy = f"submission.sample in {declaration.FILE} names the host's sample submission"
        raise UserError("sample-missing", where=shown, what="no such file", remedy=remedy) from None
    if not lines:
        raise UserError("sample-empty", where=shown, what="empty, without a header", remedy=again)
    columns = tuple(lines[0][1])
    if len(columns) < 2:
        what = f"the header has {len(columns)} column; an id and at least one column to fill in are required"
        raise UserError("sample-header", where=f"{shown}:1", what=what)
    if len(lines) < 2:
        raise UserError("sample-empty", where=shown, what="has no rows", remedy=again)
    for line, row in lines:
        if len(row) != len(columns):
            what = f"has {len(row)} fields, but the header {len(columns)} columns"
            raise UserError("sample-fields", where=f"{shown}:{line}", what=what, remedy=again)
    if len(set(columns)) < len(columns):
        repeated = next(name for i, name in enumerate(columns) if name in columns[:i])
        what = f"the column {repeated!r} occurs twice"
        raise UserError("column-repeated", where=f"{shown}:1", what=what)
    index = tuple(columns.index(name) for name in index_columns(columns) if name not in id_columns)
    named = [columns.index(name) for name in id_columns if name in columns]
    first = next(i for i in range(len(columns)) if i not in index)
    id_position = named[0] if named else first
    rows = [row for _, row in lines[1:]]
    return SampleSubmission(file, columns, id_position, rows, delimited.delimiter(file), index)


def index_columns(columns: Sequence[str]) -> list[str]:
    """Columns without a name, if two others remain for id and prediction."""
    unnamed = [name for name in columns if UNNAMED.fullmatch(name)]
    return unnamed if len(columns) - len(unnamed) > 1 else []


def scored_ids(competition: Competition, sample: SampleSubmission, heads: Sequence[Head]) -> list[str]:
    """The rows to predict, each once, in the sample's order. In long format a row has several lines."""
    return list(dict.fromkeys(line_rows(competition, sample, heads)))


def line_rows(competition: Competition, sample: SampleSubmission, heads: Sequence[Head]) -> list[str]:
    """The row that each line of the sample belongs to."""
    template = competition.submission.rows
    if template is None:
        return sample.row_keys
    return [each.row for each in parse_long_ids(template, sample.row_keys, heads)]


# --- the test rows must be those of the sample --------------------------------------------------------------


def unknown_rows(lines: Sequence[str], rows: set[str]) -> list[tuple[int, str]]:
    """(line of the sample, row) for rows that are not test rows."""
    return [(line, row) for line, row in enumerate(lines, 2) if row not in rows]


def validate_current(sample: SampleSubmission, samples: Samples, lines: list[str] | None = None) -> None:
    """Raises UserError unless the sample is the one that `comp prepare` read: hosts sometimes replace files.

    `lines`: rows to predict (default: the ids of the sample).
    """
    shown, remedy = paths.relative(sample.file), "run comp prepare again"
    rows = set(samples.frame["row"].to_numpy()[samples.positions("test")])
    lines = sample.row_keys if lines is None else lines
    if unknown := unknown_rows(lines, rows):
        line, row = unknown[0]
        more = f", nor are {len(unknown) - 1} more" if len(unknown) > 1 else ""
        what = f"row {row!r} is not a test row of data/samples.parquet{more}"
        raise UserError("sample-stale", where=f"{shown}:{line}", what=what, remedy=remedy)
    if missing := rows - set(lines):
        what = f"lacks {len(missing)} test rows of data/samples.parquet, such as {min(missing)!r}"
        raise UserError("sample-stale", where=shown, what=what, remedy=remedy)
    recorded = (artifacts.manifest_entry(paths.samples_file()) or {}).get("sample")
    if recorded != artifacts.sha256(sample.file):
        what = "changed after data/samples.parquet was made"
        raise UserError("sample-stale", where=shown, what=what, remedy=remedy)


def check(
    competition: Competition, frame: pd.DataFrame, heads: Sequence[Head], where: Callable[[int], str]
) -> tuple[list[UserError], list[str]]:
    """Compares the sample with the test rows of `frame` and the columns of the heads. Returns faults and
    notes for comp check.

    `where`: file and line of a row of `frame`.
    """
    try:
        sample = load_sample(competition)
        lines = line_rows(competition, sample, heads)
    except UserError as error:
        return error.errors, []
    shown = paths.relative(sample.file)
    position: dict[str, int] = {}  # of the first line of each test row
    for at in np.flatnonzero(frame["source"] == "test").tolist():
        position.setdefault(frame["row"].iloc[at], at)
    faults = [
        UserError("row-unknown", where=f"{shown}:{line}", what=f"the id {row!r} is not among the test rows")
        for line, row in unknown_rows(lines, set(position))
    ]
    present = set(lines)
    faults += [
        UserError("row-not-in-sample", where=where(at), what=f"the test row {row!r} is not in {shown}")
        for row, at in position.items()
        if row not in present
    ]
    notes = []
    if sample.repeated_ids:
        id_, repeated = next(iter(sample.repeated_ids.items()))
        notes.append(
            f"note: {len(sample.repeated_ids)} ids are in several lines of {shown}, like {id_!r} in lines "
            f"{', '.join(map(str, repeated[:4]))}; all lines of an id get the same prediction"
        )
    return faults + _column_faults(competition, heads, sample), notes


def _column_faults(
    competition: Competition, heads: Sequence[Head], sample: SampleSubmission
) -> list[UserError]:
    """Columns of the sample without a prediction, and classes without a column."""
    rules, present = competition.submission, sample.prediction_columns
    if pages.get("write_submission") is not None or rules.rows is not None:
        return []
    where = f"{paths.relative(sample.file)}:1"
    per_class = rules.form == "probabilities"
    predicted = [
        name for head in heads for name in (_columns_of(head, present) if per_class else [head.name])
    ]
    faults = []
    if per_class or len(present) > 1:
        faults += [
            UserError(
                "column-not-predicted",
                where=where,
                key=column,
                what="nothing is predicted for this column",
                remedy=f"did you mean {nearest(column, predicted)[0]!r}?",
            )
            for column in present
            if column not in predicted
        ]
    if per_class:
        faults += [
            UserError("class-without-column", where=where, what=f"no column for the class {output!r}")
            for head in heads
            for output in head.graded or _columns_of(head, present)
            if output not in present
        ]
    return faults


def _columns_of(head: Head, present: Sequence[str]) -> tuple[str, ...]:
    """The columns of a head: one for each output, or of a binary head one for each of both classes."""
    both = head.task == "binary" and set(present) == set(head.classes)
    return head.classes if both else head.outputs


# --- long format: a line for each class or target of a row, with an id like {id}_{class} --------------------


class LongId(NamedTuple):
    row: str  # of the samples table
    name: str  # the class or target


def parse_long_ids(template: str, ids: Sequence[str], heads: Sequence[Head]) -> list[LongId]:
    """Row and class (or target) of each line, from `submission.rows`."""
    if "{id}" not in template or not re.search(r"\{(class|target)\}", template):
        raise declaration.error(
            "long-template-invalid",
            "submission.rows",
            f"the template {template!r} lacks {{id}}, or {{class}} and {{target}}",
            "write it like {id}_{class}",
        )
    known = long_names(template, heads)
    choices = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    parts = re.split(r"(\{id\}|\{class\}|\{target\})", template)
    groups = {"{id}": "(?P<id>.+?)", "{class}": f"(?P<name>{choices})", "{target}": f"(?P<name>{choices})"}
    pattern = re.compile("".join(groups.get(part, re.escape(part)) for part in parts))
    out = []
    for line, each in enumerate(ids, 2):
        match = pattern.fullmatch(each)
        if match is None:
            raise declaration.error(
                "long-id-unmatched",
                "submission.rows",
                f"{each!r} in line {line} of the sample does not match {template} with one of "
                f"{', '.join(known[:6])}",
            )
        out.append(LongId(match["id"], match["name"]))
    return out


def long_names(template: str, heads: Sequence[Head]) -> list[str]:
    """What {class} or {target} can be."""
    if "{target}" in template and len(heads) > 1:
        return [head.name for head in heads]
    return [
        name
        for head in heads
        for name in (head.outputs if "{class}" in template or len(head.outputs) > 1 else [head.name])
    ]
