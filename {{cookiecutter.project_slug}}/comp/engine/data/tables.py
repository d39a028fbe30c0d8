"""Raw tables in memory. RawTable: one table as text, with the file and line of every row. RawRows: the rows of all tables.

Two reshapings that make one row a sample: `group_images` (several rows of one id) and `pivot_long` (a row for each class).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.config.competition_schema import Competition, Table
from comp.engine.config.resolve import nearest
from comp.engine.errors import Refused
from comp.engine.readers import delimited, layouts
from comp.engine.store import paths

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RawTable:
    """One raw table. `frame` is text, missing values are NA."""

    file: Path
    frame: pd.DataFrame
    rows: Sequence[int] | None = None  # of the table, where a line of the frame was made of several

    @cached_property
    def _lines(self) -> list[int]:
        """The line each row begins on: rows with quoted line breaks and blank lines shift all that follow."""
        return [line for line, _ in delimited.lines(self.file)][1:]

    def where(self, position: int) -> str:
        if self.rows is not None:
            position = self.rows[position]
        if layouts.FILE_COLUMN in self.frame:
            return str(self.frame[layouts.FILE_COLUMN].iloc[position])
        if self.file.suffix in (".csv", ".tsv"):
            return f"{paths.relative(self.file)}:{self._lines[position]}"
        return f"{paths.relative(self.file)}: row {position}"


@dataclass(frozen=True)
class RawRows:
    """Train and test rows under each other, whatever they were read from."""

    samples: pd.DataFrame  # id, images (list of paths under raw), source, row, weight
    columns: pd.DataFrame  # the raw columns, as text
    has: dict[str, list[str]]  # source -> the columns that it really has
    where: Callable[[int], str]
    faults: list[str] = field(default_factory=list)  # one line a row that cannot be used as it is


def group_images(rows: RawRows, competition: Competition) -> RawRows:
    """Rows of one id are one sample with the images of all. Of several labels in a cell it has those of all, too; what else
    a target says must be the same in each, and of other columns the first row counts."""
    keys = rows.samples["source"] + "\0" + rows.samples["id"].fillna("")
    codes, first = keys.factorize()
    images: list[dict[str, None]] = [{} for _ in first]
    for code, more in zip(codes, rows.samples["images"], strict=True):
        images[code] |= dict.fromkeys(more)
    kept = np.flatnonzero(~keys.duplicated().to_numpy())
    samples = rows.samples.iloc[kept].reset_index(drop=True)
    samples["images"] = [list(each) for each in images]
    columns = rows.columns.iloc[kept].reset_index(drop=True)
    taught = (rows.samples["source"] != "test").to_numpy()
    faults = []
    for name, task in competition.tasks.items():
        if name not in rows.columns:
            continue
        cells = rows.columns[name].fillna("").to_numpy(object)
        others = np.flatnonzero((cells != cells[kept][codes]) & taught)
        if task == "multilabel" and (len(competition.targets) == 1 or isinstance(competition.target, dict)):
            said = {code: [cells[kept[code]]] for code in codes[others].tolist()}
            for row in others.tolist():
                said[codes[row]].append(cells[row])
            whole = columns[name].tolist()
            for code, labels in said.items():
                whole[code] = competition.separator.join(filter(None, dict.fromkeys(labels)))
            columns[name] = whole
            continue
        faults += [
            f"{rows.where(row)}: {name} is {cells[row]!r}, where the same id has {cells[kept[codes[row]]]!r} in "
            f"{rows.where(int(kept[codes[row]]))}; gather makes one sample of both"
            for row in others.tolist()
        ]
    return replace(
        rows,
        samples=samples,
        columns=columns,
        where=lambda position: rows.where(int(kept[position])),
        faults=faults,
    )


def pivot_long(source: RawTable, table: Table, competition: Competition) -> RawTable:
    """A line for each class of a row becomes a column for each class: `train.long`."""
    import pandas as pd

    long, file = table.long, paths.relative(source.file)
    assert long is not None
    there = [str(name) for name in source.frame.columns]
    for name in [long.column, *([long.value] if long.value else [])]:
        if name not in there:
            raise Refused(
                f"configs/competition.yaml: long: {file} has no column {name!r}; the nearest is {nearest(name, there)[0]!r}"
            )
    cells = source.frame[long.column].fillna("")
    names = sorted(competition.targets, key=len, reverse=True)
    kinds = "|".join(map(re.escape, names))
    parts = cells.str.extract(
        f"^(?:{layouts.pattern_regex(long.like.replace('{class}', '{class:' + kinds + '}'))})$"
    )
    wrong = np.flatnonzero(parts["class"].isna().to_numpy())
    if len(wrong):
        raise Refused(
            f"{source.where(int(wrong[0]))}: {long.column} is {cells.iloc[wrong[0]]!r}, which is not built like {long.like} "
            f"from the targets {', '.join(competition.targets[:6])} (and {len(wrong) - 1} more)"
        )
    frame = source.frame.drop(columns=[long.column, *([long.value] if long.value else [])])
    frame = frame.assign(**{str(name): parts[name] for name in parts if name != "class"})
    key = table.id or competition.id
    ids = [name for name in map(str, frame.columns) if f"{{{name}" in key or name == key]
    if not ids:
        raise Refused(
            f"configs/competition.yaml: long: neither {file} nor {long.like} has the id {key!r}; they have {', '.join(map(str, frame.columns))}"
        )
    codes, _ = pd.factorize(
        frame[ids].fillna("").agg("\0".join, axis=1) if len(ids) > 1 else frame[ids[0]].fillna("")
    )
    first = np.flatnonzero(~pd.Series(codes).duplicated().to_numpy())
    values = source.frame[long.value].to_numpy(object) if long.value else np.full(len(frame), "1", object)
    wide: dict[str, NDArray[Any]] = {}
    for name in competition.targets:
        mine = np.flatnonzero((parts["class"] == name).to_numpy())
        column = np.full(len(first), None if long.value else "0", object)
        column[codes[mine]] = values[mine]
        other = mine[(column[codes[mine]] != values[mine]) & ~pd.isna(values[mine])]
        if len(other):
            raise Refused(
                f"{source.where(int(other[0]))}: {name} is {values[other[0]]!r}, and another line of the same id says {column[codes[other[0]]]!r}"
            )
        wide[name] = column
    made = frame.iloc[first].reset_index(drop=True).assign(**wide)
    return replace(source, frame=made, rows=first.tolist())
