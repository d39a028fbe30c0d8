"""Reads csv and parquet as text. A row with too few fields is an error with its line."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from comp.engine.errors import UserError
from comp.engine.store import paths

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def as_text(values: pd.Series) -> pd.Series:
    """Values as text. Integers that pandas stores as 3.0, because another row is missing, become "3"."""
    import pandas as pd

    if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")
    return values.astype(object).map(str, na_action="ignore")


def parquet_frame(file: Path) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            "table-damaged",
            where=paths.relative(file),
            what=f"cannot be read as parquet ({str(error).splitlines()[0]})",
        ) from None
    return pd.DataFrame({name: _arrow_text(table[name]) for name in table.column_names})


def _arrow_text(values: pa.ChunkedArray) -> pd.Series:
    import pyarrow as pa

    kind = values.type
    if pa.types.is_integer(kind):  # with missing values pandas would convert to float and lose digits
        return values.cast(pa.string()).to_pandas().astype(object)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):  # several labels, separated as in a csv
        return values.to_pandas().map(lambda cell: " ".join(map(str, cell)), na_action="ignore")
    return as_text(values.to_pandas())


def csv_frame(file: Path) -> pd.DataFrame:
    import pyarrow as pa
    from pyarrow import csv as arrow

    header = _header(file)
    try:
        # Arrow is strict about the number of fields; pandas fills short rows silently.
        table: pa.Table = arrow.read_csv(
            file,
            parse_options=arrow.ParseOptions(delimiter=delimiter(file), newlines_in_values=True),
            convert_options=arrow.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()), null_values=[""], strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid as error:
        raise _first_bad_row(file, len(header)) or _table_error(file, str(error).splitlines()[0]) from None
    return table.to_pandas()


def _header(file: Path) -> list[str]:
    for _, header in lines(file):
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise UserError(
                "column-twice",
                where=f"{paths.relative(file)}:1",
                what=f"the column {twice[0]!r} is there twice",
            )
        return header
    raise _table_error(file, "is empty, without even a line of column names")


def _first_bad_row(file: Path, width: int) -> UserError | None:
    for line, fields in lines(file):
        if len(fields) != width:
            return _table_error(file, f"{len(fields)} fields, where the first line has {width} columns", line)
    return None


def _table_error(file: Path, what: str, line: int | None = None, remedy: str = "") -> UserError:
    where = paths.relative(file) + (f":{line}" if line else "")
    return UserError("table-damaged", where=where, what=what, remedy=remedy)


def lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of each row. Slow; used for the header and to find the line of an error."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # outlines and masks make long fields
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.reader(opened, delimiter=delimiter(file), strict=True)
            begins = 1
            for fields in reader:
                if fields:
                    yield begins, fields
                begins = reader.line_num + 1
    except UnicodeDecodeError:
        with file.open("rb") as bytes_:
            line = next(i for i, text in enumerate(bytes_, 1) if not _decodes(text))
        raise _table_error(file, "is not UTF-8 text", line, "save the table as UTF-8") from None
    except csv.Error as error:
        raise _table_error(file, f"the row that begins here is damaged ({error})", begins) from None


def _decodes(text: bytes) -> bool:
    try:
        text.decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return True


def delimiter(file: Path) -> str:
    """The separator, from the first line."""
    if file.suffix == ".tsv":
        return "\t"
    with file.open("rb") as opened:
        head = opened.readline(2**16)
    others = [mark for mark in (";", "\t", "|") if mark.encode() in head]
    return others[0] if others and b"," not in head else ","
