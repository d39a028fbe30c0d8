"""The host's sample submission: the authority on columns, ids, order and separator. What stands in its cells means nothing,
except in a column without a name: an index that the host's own tool wrote, which stands in a submission as it stands there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from comp.engine.config.competition_schema import Competition
from comp.engine.data import raw_tables
from comp.engine.data.samples import Samples
from comp.engine.errors import Refused
from comp.engine.readers import delimited
from comp.engine.readers.unicode_names import nfc
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

UNNAMED = re.compile(
    r"(Unnamed: \d+)?"
)  # of an index column: pandas writes nothing, and reads it back as Unnamed: 0


@dataclass(frozen=True)
class SampleSubmission:
    file: Path
    columns: tuple[str, ...]
    key: int  # position of the id column
    rows: list[list[str]]
    delimiter: str = ","
    index: tuple[int, ...] = ()  # positions of the columns without a name

    @property
    def ids(self) -> list[str]:
        """As the host wrote them, one a line; an id may stand in several lines."""
        return [row[self.key] for row in self.rows]

    @cached_property
    def row_keys(self) -> list[str]:
        """The row of the samples table that each line asks for."""
        return [nfc(each) for each in self.ids]

    @property
    def prediction_positions(self) -> list[int]:
        """Of the columns to fill in."""
        return [i for i in range(len(self.columns)) if i != self.key and i not in self.index]

    @property
    def prediction_columns(self) -> tuple[str, ...]:
        """The columns to fill in."""
        return tuple(self.columns[i] for i in self.prediction_positions)

    @cached_property
    def repeated_ids(self) -> dict[str, list[int]]:
        """Ids that stand in several lines, and in which."""
        lines: dict[str, list[int]] = {}
        for number, each in enumerate(self.ids, 2):
            lines.setdefault(each, []).append(number)
        return {each: numbers for each, numbers in lines.items() if len(numbers) > 1}

    def deduplicated(self) -> SampleSubmission:
        """A line for each id."""
        first: dict[str, list[str]] = {}
        for key, row in zip(self.row_keys, self.rows, strict=True):
            first.setdefault(key, row)
        return self if len(first) == len(self.rows) else replace(self, rows=list(first.values()))

    def fill(self, number: int, cells: Sequence[str]) -> list[str]:
        """Line `number` with these cells in the columns to fill in."""
        line = list(self.rows[number])
        for place, cell in zip(self.prediction_positions, cells, strict=True):
            line[place] = cell
        return line


def load_sample(competition: Competition) -> SampleSubmission:
    return read_sample(
        paths.path(competition.raw, competition.submission.sample), *id_column_candidates(competition)
    )


def id_column_candidates(competition: Competition) -> list[str]:
    """What the id column of the sample may be called, the likeliest first."""
    row = competition.row
    named = [row if row and "{" not in row else None, competition.id, competition.test.id]
    return [name for name in named if name]


def read_sample(file: Path, *keys: str) -> SampleSubmission:
    """Hosts' files may carry a BOM, quotes, \\r\\n and another separator. The id column is the first of `keys` that the sample
    has, else its first column with a name."""
    file = raw_tables.unpacked(file)  # hosts pack samples, too
    shown = paths.relative(file)
    try:
        numbered = list(delimited.lines(file))
    except FileNotFoundError:
        raise Refused(
            f"{shown}: no such table; competition.submission.sample names the host's sample submission"
        ) from None
    if not numbered:
        raise Refused(f"{shown}: empty, not even a line of column names; download it again")
    columns = tuple(numbered[0][1])
    if len(columns) < 2:
        raise Refused(f"{shown}:1: a header with an id and at least one column to fill in is wanted")
    if len(numbered) < 2:
        raise Refused(f"{shown}: holds no rows; download it again")
    for at, line in numbered:
        if len(line) != len(columns):
            raise Refused(
                f"{shown}:{at}: {len(line)} fields, where the first line names {len(columns)} columns; download it again"
            )
    if len(set(columns)) < len(columns):
        twice = next(name for i, name in enumerate(columns) if name in columns[:i])
        raise Refused(f"{shown}:1: the column {twice!r} stands there twice")
    key, index = _columns(columns, keys)
    return SampleSubmission(
        file, columns, key, [line for _, line in numbered[1:]], delimited.delimiter(file), index
    )


def _columns(columns: Sequence[str], keys: Sequence[str]) -> tuple[int, tuple[int, ...]]:
    """Positions of the id, and of index columns."""
    index = tuple(columns.index(name) for name in index_columns(columns) if name not in keys)
    declared = next((columns.index(name) for name in keys if name in columns), None)
    first = next(i for i in range(len(columns)) if i not in index)
    return first if declared is None else declared, index


def index_columns(columns: Sequence[str]) -> list[str]:
    """Columns without a name, where two others are left for id and answer."""
    unnamed = [name for name in columns if UNNAMED.fullmatch(name)]
    return unnamed if len(columns) - len(unnamed) > 1 else []


def scored_ids(competition: Competition, sample: SampleSubmission, heads: Sequence[Head]) -> list[str]:
    """The scored rows in the sample's order, each once: its lines, or what several lines of a long form speak of."""
    template = competition.submission.rows
    if template is None:
        return list(dict.fromkeys(sample.row_keys))
    return list(dict.fromkeys(cell.row for cell in parse_ids(template, sample.row_keys, heads)))


def validate_current(sample: SampleSubmission, samples: Samples, ids: list[str] | None = None) -> None:
    """The sample must be the one that `comp prepare` saw: hosts replace files in the middle of a competition."""
    shown, remedy = paths.relative(sample.file), "run comp prepare again"
    rows = set(samples.frame["row"].to_numpy()[samples.positions("test")])
    ids = sample.row_keys if ids is None else ids  # a long form asks several lines of a row
    strange = [(line, each) for line, each in enumerate(ids, 2) if each not in rows]
    if strange:
        line, each = strange[0]
        raise Refused(
            f"{shown}:{line}: row {each!r} is no test row of data/samples.parquet, nor are {len(strange) - 1} others; {remedy}"
        )
    left = rows - set(ids)
    if left:
        raise Refused(
            f"{shown}: stale, {len(left)} test rows of data/samples.parquet are not in it, the first {min(left)!r}; {remedy}"
        )
    noted = (artifacts.manifest_entry(paths.samples_file()) or {}).get("sample")
    if noted != artifacts.sha256(sample.file):
        raise Refused(f"{shown}: not the file that it was when data/samples.parquet was made; {remedy}")


# --- long form: a line for each class or target of a row, its id built by a template like {id}_{class} ----------------------


class LongId(NamedTuple):
    row: str  # the key that is scored
    name: str  # the class or target that this line asks for


def parse_ids(template: str, ids: Sequence[str], heads: Sequence[Head]) -> list[LongId]:
    """What each line asks for."""
    where = f"competition.submission.rows: {template}"
    if "{id}" not in template or not re.search(r"\{(class|target)\}", template):
        raise Refused(
            f"{where}: a template of {{id}} and {{class}} or {{target}} is wanted, like {{id}}_{{class}}"
        )
    known = class_names(template, heads)
    asked = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    parts = re.split(r"(\{id\}|\{class\}|\{target\})", template)
    kinds = {"{id}": "(?P<id>.+?)", "{class}": f"(?P<name>{asked})", "{target}": f"(?P<name>{asked})"}
    pattern = re.compile("".join(kinds.get(part, re.escape(part)) for part in parts))
    out = []
    for line, each in enumerate(ids, 2):
        found = pattern.fullmatch(each)
        if found is None:
            raise Refused(
                f"{where}: line {line} of the sample, {each!r}, is not built like that from {', '.join(known[:6])}"
            )
        out.append(LongId(found["id"], found["name"]))
    return out


def class_names(template: str, heads: Sequence[Head]) -> list[str]:
    if "{target}" in template and len(heads) > 1:
        return [head.name for head in heads]
    return [
        name
        for head in heads
        for name in (head.outputs if "{class}" in template or len(head.outputs) > 1 else [head.name])
    ]
