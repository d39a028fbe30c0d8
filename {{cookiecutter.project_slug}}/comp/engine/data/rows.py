"""Tables in memory: one raw table with the line of each row, and train and test rows under each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from comp.engine.readers import delimited, layouts
from comp.engine.store import store

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
        if layouts.FILE in self.frame:
            return str(self.frame[layouts.FILE].iloc[position])
        if self.file.suffix in (".csv", ".tsv"):
            return f"{store.shown(self.file)}:{self._lines[position]}"
        return f"{store.shown(self.file)}: row {position}"


@dataclass(frozen=True)
class RawRows:
    """Train and test rows under each other, whatever they were read from."""

    samples: pd.DataFrame  # id, images (list of paths under raw), source, row, weight
    columns: pd.DataFrame  # the raw columns, as text
    has: dict[str, list[str]]  # source -> the columns that it really has
    where: Callable[[int], str]
    faults: list[str] = field(default_factory=list)  # one line a row that cannot be used as it is
