"""Raw tables in memory. RawTable: one table as text, with file and line of each row. RawRows: the rows of all
tables.

`group_images` (several rows per id) and `pivot_long` (a row per class) reshape tables to one row per sample.
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

from comp.engine.config import declaration
from comp.engine.config.competition_schema import Competition, Long, Table
from comp.engine.config.resolve import nearest
from comp.engine.errors import UserError
from comp.engine.readers import delimited, layouts
from comp.engine.store import paths

if TYPE_CHECKING:
    import pandas as pd

Where = Callable[[int], str]  # position of a row -> "data/raw/train.csv:17"


@dataclass(frozen=True)
class RawTable:
    """One raw table. Cells are text; missing values are NA."""

    file: Path
    frame: pd.DataFrame
    rows: Sequence[int] | None = None  # position in the file of each row, if rows were dropped or joined

    @cached_property
    def _lines(self) -> list[int]:
        """The line on which each row begins, which quoted line breaks and blank lines shift."""
        return [line for line, _ in delimited.lines(self.file)][1:]

    def where(self, position: int) -> str:
        if self.rows is not None:
            position = self.rows[position]
        if layouts.FILE_COLUMN in self.frame:
            return str(self.frame[layouts.FILE_COLUMN].iloc[position])
        if self.file.suffix in (".csv", ".tsv"):
            return f"{paths.relative(self.file)}:{self._lines[position]}"
        return f"{paths.relative(self.file)}: row {position}"

    @property
    def header(self) -> str:
        """The place of the column names, for messages."""
        return paths.relative(self.file) + ":1" * (self.file.suffix in (".csv", ".tsv"))


@dataclass(frozen=True)
class RawRows:
    """The rows of train, test and extra tables, concatenated."""

    samples: pd.DataFrame  # id, images (list of paths under raw), source, row, weight
    columns: pd.DataFrame  # the raw columns, as text
    has: dict[str, list[str]]  # source -> the columns of its table
    where: Where
    faults: list[UserError] = field(default_factory=list)  # rows that cannot be used as they are


def column_names(frame: pd.DataFrame) -> list[str]:
    return [str(name) for name in frame.columns]


def missing_column(key: str, table: RawTable, column: str) -> UserError:
    """The error if `key` of competition.yaml names a column that the table does not have."""
    close = nearest(column, column_names(table.frame))
    remedy = f"did you mean {close[0]!r}?" if close else ""
    return declaration.error("column-missing", key, f"{table.header} has no column {column!r}", remedy)


def group_images(rows: RawRows, competition: Competition) -> RawRows:
    """`gather: true`: joins the rows of an id to one sample with all their images. Multilabel targets are
    united; any other target must be equal in all rows; other columns are taken from the first row."""
    keys = rows.samples["source"] + "\0" + rows.samples["id"].fillna("")
    codes, first_keys = keys.factorize()
    images: list[dict[str, None]] = [{} for _ in first_keys]
    for code, more in zip(codes, rows.samples["images"], strict=True):
        images[code] |= dict.fromkeys(more)
    first = np.flatnonzero(~keys.duplicated().to_numpy())
    samples = rows.samples.iloc[first].reset_index(drop=True)
    samples["images"] = [list(each) for each in images]
    columns = rows.columns.iloc[first].reset_index(drop=True)
    labeled = (rows.samples["source"] != "test").to_numpy()
    faults = []
    for name, task in competition.tasks.items():
        if name not in rows.columns:
            continue
        cells = rows.columns[name].fillna("").to_numpy(object)
        different = np.flatnonzero((cells != cells[first][codes]) & labeled)
        if task == "multilabel" and (len(competition.targets) == 1 or isinstance(competition.target, dict)):
            labels = _all_labels(cells, codes, first, different)
            merged = {code: competition.separator.join(filter(None, each)) for code, each in labels.items()}
            columns[name] = [merged.get(code, cell) for code, cell in enumerate(columns[name])]
            continue
        faults += [
            UserError(
                "label-conflict",
                where=rows.where(row),
                key=name,
                what=f"{cells[row]!r}, but {cells[first[codes[row]]]!r} in "
                f"{rows.where(int(first[codes[row]]))}, which has the same id",
                remedy="gather: true joins rows of one id, whose labels must be equal",
            )
            for row in different.tolist()
        ]
    return replace(
        rows,
        samples=samples,
        columns=columns,
        where=lambda position: rows.where(int(first[position])),
        faults=faults,
    )


def _all_labels(
    cells: NDArray[Any], codes: NDArray, first: NDArray, different: NDArray
) -> dict[int, list[str]]:
    """code of an id -> the distinct cells of its rows, for ids whose rows differ."""
    labels = {code: [cells[first[code]]] for code in codes[different].tolist()}
    for row in different.tolist():
        labels[codes[row]].append(cells[row])
    return {code: list(dict.fromkeys(each)) for code, each in labels.items()}


def pivot_long(source: RawTable, table: Table, competition: Competition) -> RawTable:
    """`train.long`: pivots one row per class to one column per class."""
    import pandas as pd

    long = table.long
    assert long is not None
    for name in [long.column, *([long.value] if long.value else [])]:
        if name not in column_names(source.frame):
            raise missing_column("train.long", source, name)
    parts = _parts_of_ids(source, long, competition.targets)
    frame = source.frame.drop(columns=[long.column, *([long.value] if long.value else [])])
    frame = frame.assign(**{str(name): parts[name] for name in parts if name != "class"})
    key = table.id or competition.id
    ids = [name for name in column_names(frame) if f"{{{name}" in key or name == key]
    if not ids:
        raise declaration.error(
            "column-missing",
            "train.long",
            f"neither {paths.relative(source.file)} nor {long.like} has the id {key!r}; "
            f"they have {', '.join(column_names(frame))}",
        )
    one_id = frame[ids].fillna("").agg("\0".join, axis=1) if len(ids) > 1 else frame[ids[0]].fillna("")
    codes, _ = pd.factorize(one_id)
    first = np.flatnonzero(~pd.Series(codes).duplicated().to_numpy())
    values = source.frame[long.value].to_numpy(object) if long.value else np.full(len(frame), "1", object)
    wide: dict[str, NDArray[Any]] = {}
    for name in competition.targets:
        rows = np.flatnonzero((parts["class"] == name).to_numpy())
        column = np.full(len(first), None if long.value else "0", object)
        column[codes[rows]] = values[rows]
        other = rows[(column[codes[rows]] != values[rows]) & ~pd.isna(values[rows])]
        if len(other):
            raise UserError(
                "label-conflict",
                where=source.where(int(other[0])),
                key=name,
                what=f"{values[other[0]]!r}, but {column[codes[other[0]]]!r} in another line of its id",
            )
        wide[name] = column
    made = frame.iloc[first].reset_index(drop=True).assign(**wide)
    return replace(source, frame=made, rows=first.tolist())


def _parts_of_ids(source: RawTable, long: Long, targets: Sequence[str]) -> pd.DataFrame:
    """The values of the parts of `long.like`, such as {id}_{class}, in each row."""
    cells = source.frame[long.column].fillna("")
    classes = "|".join(map(re.escape, sorted(targets, key=len, reverse=True)))
    pattern = layouts.pattern_regex(long.like.replace("{class}", "{class:" + classes + "}"))
    parts = cells.str.extract(f"^(?:{pattern})$")
    wrong = np.flatnonzero(parts["class"].isna().to_numpy())
    if len(wrong):
        more = f" (nor do {len(wrong) - 1} more rows)" if len(wrong) > 1 else ""
        raise UserError(
            "long-id-unmatched",
            where=source.where(int(wrong[0])),
            key=long.column,
            what=f"{cells.iloc[wrong[0]]!r} does not match {long.like} with one of the targets "
            f"{', '.join(targets[:6])}{more}",
            remedy=f"correct target or train.long.like in {declaration.FILE}",
        )
    return parts
