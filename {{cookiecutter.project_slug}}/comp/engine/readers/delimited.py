"""csv and parquet as text, strictly: a row with a field too few is a fault with its line, never filled up."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from comp.engine.errors import Refused
from comp.engine.store import paths

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def as_text(values: pd.Series) -> pd.Series:
    """Numbers as people write them: a whole number that pandas holds as 3.0, because another row is missing, is 3."""
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
        raise Refused(
            f"{paths.relative(file)}: cannot be read as parquet ({str(error).splitlines()[0]})"
        ) from None
    return pd.DataFrame({name: _arrow_text(table[name]) for name in table.column_names})


def _arrow_text(values: pa.ChunkedArray) -> pd.Series:
    import pyarrow as pa

    kind = values.type
    if pa.types.is_integer(
        kind
    ):  # pandas would make floats of it where some are missing, and lose the last digits
        return values.cast(pa.string()).to_pandas().astype(object)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):  # several labels, as a csv would write them
        return values.to_pandas().map(lambda cell: " ".join(map(str, cell)), na_action="ignore")
    return as_text(values.to_pandas())


def csv_frame(file: Path) -> pd.DataFrame:
    import pyarrow as pa
    from pyarrow import csv as arrow

    header = _header(file)
    try:
        # Arrow is strict about the number of fields and never guesses; pandas fills short rows silently.
        table: pa.Table = arrow.read_csv(
            file,
            parse_options=arrow.ParseOptions(delimiter=delimiter(file), newlines_in_values=True),
            convert_options=arrow.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()), null_values=[""], strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid as error:
        raise Refused(
            _broken(file, len(header)) or f"{paths.relative(file)}: {str(error).splitlines()[0]}"
        ) from None
    return table.to_pandas()


def _header(file: Path) -> list[str]:
    for _, header in lines(file):
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise Refused(f"{paths.relative(file)}:1: the column {twice[0]!r} stands there twice")
        return header
    raise Refused(f"{paths.relative(file)}: empty, not even a line of column names")


def _broken(file: Path, width: int) -> str | None:
    for line, fields in lines(file):
        if len(fields) != width:
            return f"{paths.relative(file)}:{line}: {len(fields)} fields, where the first line names {width} columns"
    return None


def lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line it begins on, fields), slow and exact: for the header and for telling where a fault is."""
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
        raise Refused(f"{paths.relative(file)}:{line}: is not UTF-8 text; save the table as UTF-8") from None
    except csv.Error as error:
        raise Refused(
            f"{paths.relative(file)}:{begins}: the row that begins here is broken ({error})"
        ) from None


def _decodes(text: bytes) -> bool:
    try:
        text.decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return True


def delimiter(file: Path) -> str:
    """By the first line: hosts' tables are comma separated, some by another mark."""
    if file.suffix == ".tsv":
        return "\t"
    with file.open("rb") as opened:
        head = opened.readline(2**16)
    others = [mark for mark in (";", "\t", "|") if mark.encode() in head]
    return others[0] if others and b"," not in head else ","
