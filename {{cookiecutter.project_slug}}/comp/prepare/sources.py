"""Tables as the host wrote them: every value is text, and every row knows the file and line it came from.

An id of 00042 must stay 00042, so no reader guesses a type. What a column means is decided in tables.py.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comp import own, store
from comp.config import Refused, nearest
from comp.knobs import Competition, Table

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


@dataclass(frozen=True)
class Source:
    """One raw table. `frame` is text, missing values are NA."""

    file: Path
    frame: pd.DataFrame

    @cached_property
    def _lines(self) -> list[int]:
        """The line each row begins on: rows with quoted line breaks and blank lines shift all that follow."""
        return [line for line, _ in _records(self.file)][1:]

    def where(self, position: int) -> str:
        if self.file.suffix in (".csv", ".tsv"):
            return f"{store.shown(self.file)}:{self._lines[position]}"
        return f"{store.shown(self.file)}: row {position}"


@dataclass(frozen=True)
class Rows:
    """Train and test rows under each other, whatever they were read from."""

    samples: pd.DataFrame  # id, images (list of paths under raw), source, row, weight
    columns: pd.DataFrame  # the raw columns, as text
    has: dict[str, list[str]]  # source -> the columns that it really has
    where: Callable[[int], str]


def load(competition: Competition) -> Rows:
    """What competition.yaml declares, or what read_samples of competition.py gives instead."""
    import pandas as pd

    raw = store.path(competition.raw)
    if not raw.is_dir() or not any(raw.iterdir()):
        raise Refused(
            f"{store.shown(raw)}: is empty; put the unpacked competition there, or take the digits: comp practice"
        )
    hook = own.get("read_samples")
    if hook is not None:
        return _own_rows(hook(raw), competition)
    tables = {"train": competition.train, "test": competition.test}
    sources = {name: read(raw / table.table) for name, table in tables.items()}
    problems = [
        line for name, source in sources.items() for line in _absent(name, source, tables[name], competition)
    ]
    if problems:
        raise Refused(*problems)
    parts = []
    for name, source in sources.items():
        ids = source.frame[competition.id]
        images = [[path] for path in paths(source, tables[name].image)]
        parts.append(pd.DataFrame({"id": ids, "images": images, "source": name, "row": ids, "weight": 1.0}))
    split = len(parts[0])
    train, test = sources.values()
    return Rows(
        pd.concat(parts, ignore_index=True),
        pd.concat([train.frame, test.frame], ignore_index=True),
        {name: columns(source.frame) for name, source in sources.items()},
        lambda position: train.where(position) if position < split else test.where(position - split),
    )


def read(file: Path) -> Source:
    readers = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".pq": _parquet}
    if not file.is_file():
        beside = (
            [f.name for f in file.parent.glob("*") if f.suffix in readers] if file.parent.is_dir() else []
        )
        close = f"; the nearest there is {nearest(file.name, beside)[0]}" if beside else ""
        raise Refused(f"{store.shown(file)}: no such table{close}")
    if file.suffix not in readers:
        raise Refused(
            f"{store.shown(file)}: a table ends in {', '.join(readers)}; other kinds: read_samples in comp/competition.py"
        )
    if file.stat().st_size > 20_000_000:
        print(f"reading {store.shown(file)}, {store.readable(file.stat().st_size)} …")
    frame = readers[file.suffix](file)
    if not len(frame):
        raise Refused(f"{store.shown(file)}: holds no rows")
    return Source(file, frame)


def columns(frame: pd.DataFrame) -> list[str]:
    return [str(name) for name in frame.columns]


def paths(source: Source, template: str) -> list[str]:
    """`train/{id[0]}/{id}.png` for every row. `{column[-1]}` and `{column[0:2]}` are parts of its text."""
    import pandas as pd

    pieces: list[Sequence[str]] = []
    for literal, column, part in fields(template):
        if column is None:
            pieces.append([literal] * len(source.frame))
            continue
        values = source.frame[column]
        if part is not None:
            values = values.str[part]
            values = values.mask(values == "")
        missing = pd.isna(values).to_numpy().nonzero()[0]
        if len(missing):
            what = (
                "has no value" if part is None else f"{source.frame[column].iloc[missing[0]]!r} is too short"
            )
            raise Refused(f"{source.where(missing[0])}: {column} {what} for the image path {template}")
        pieces.append(list(values))
    done = ["".join(row) for row in zip(*pieces, strict=True)]
    for position, path in enumerate(done):
        if path.startswith("/") or ".." in path.split("/"):
            raise Refused(f"{source.where(position)}: the image path {path!r} leads out of the raw folder")
    return done


def fields(template: str) -> Iterator[tuple[str, str | None, int | slice | None]]:
    """(literal, None, None) and ("", column, index or slice) in turn."""
    last = 0
    for found in re.finditer(r"\{([^{}\[\]]+)(?:\[(-?\d+)?(:)?(-?\d+)?\])?\}", template):
        if found.start() > last:
            yield template[last : found.start()], None, None
        column, first, colon, end = found.groups()
        part: int | slice | None = None
        if colon:
            part = slice(int(first) if first else None, int(end) if end else None)
        elif first:
            part = int(first)
        yield "", column, part
        last = found.end()
    if last < len(template):
        yield template[last:], None, None


def _absent(name: str, source: Source, table: Table, competition: Competition) -> list[str]:
    """One line for each declared column that the table does not have."""
    wanted = {
        "id": [competition.id],
        f"{name}.image": [c for _, c, _ in fields(table.image) if c is not None],
    }
    if name == "train":
        single = {"group": competition.group, "time": competition.time}
        wanted |= {"target": competition.target, "metadata": competition.metadata}
        wanted |= {key: [column] for key, column in single.items() if column}
    there = columns(source.frame)
    file = store.shown(source.file)
    return [
        f"configs/competition.yaml: {key}: {file} has no column {column!r}; the nearest is {nearest(column, there)[0]!r}"
        for key, names in wanted.items()
        for column in names
        if column not in there
    ]


def _own_rows(frame: Any, competition: Competition) -> Rows:
    import pandas as pd

    said = "comp/competition.py: read_samples"
    if not isinstance(frame, pd.DataFrame):
        raise Refused(f"{said} must return a DataFrame, not {type(frame).__name__}")
    frame = frame.reset_index(drop=True)
    singles = [name for name in (competition.group, competition.time) if name]
    for column in [competition.id, "images", "source", *competition.target, *singles, *competition.metadata]:
        if column not in frame:
            raise Refused(
                f"{said} returns no column {column!r}; the nearest is {nearest(column, columns(frame))[0]!r}"
            )
    wrong = sorted(set(frame["source"].astype(str)) - {"train", "test", "extra"})
    if wrong:
        raise Refused(f"{said}: source is train, test or extra, not {wrong[0]!r}")
    images = [[value] if isinstance(value, str) else list(value) for value in frame["images"]]
    text = pd.DataFrame(
        {
            name: _text(frame[name])
            for name in columns(frame)
            if name not in ("images", "source", "weight", "row")
        }
    )
    samples = pd.DataFrame(
        {"id": text[competition.id], "images": images, "source": frame["source"].astype(str)}
    )
    samples["row"] = _text(frame["row"]) if "row" in frame else samples["id"]
    samples["weight"] = frame["weight"].astype("float64") if "weight" in frame else 1.0
    has = {
        source: [c for c in columns(text) if text[c][samples["source"] == source].notna().any()]
        for source in ("train", "test")
    }
    return Rows(samples, text, has, lambda position: f"{said}: row {position}")


def _text(values: pd.Series) -> pd.Series:
    """Numbers as people write them: a whole number that pandas holds as 3.0, because another row is missing, is 3."""
    import pandas as pd

    if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")
    return values.astype(object).map(str, na_action="ignore")


def _parquet(file: Path) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise Refused(
            f"{store.shown(file)}: cannot be read as parquet ({str(error).splitlines()[0]})"
        ) from None
    frame = table.to_pandas()
    return pd.DataFrame({str(name): _text(frame[name]) for name in frame})


def _csv(file: Path) -> pd.DataFrame:
    import pyarrow as pa
    from pyarrow import csv as arrow

    header = _header(file)
    try:
        # Arrow is strict about the number of fields and never guesses; pandas fills short rows silently.
        table: pa.Table = arrow.read_csv(
            file,
            parse_options=arrow.ParseOptions(delimiter=_delimiter(file), newlines_in_values=True),
            convert_options=arrow.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()), null_values=[""], strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid as error:
        raise Refused(
            _broken(file, len(header)) or f"{store.shown(file)}: {str(error).splitlines()[0]}"
        ) from None
    return table.to_pandas()


def _header(file: Path) -> list[str]:
    for _, header in _records(file):
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise Refused(f"{store.shown(file)}:1: the column {twice[0]!r} stands there twice")
        return header
    raise Refused(f"{store.shown(file)}: empty, not even a line of column names")


def _broken(file: Path, width: int) -> str | None:
    for line, fields in _records(file):
        if len(fields) != width:
            return f"{store.shown(file)}:{line}: {len(fields)} fields, where the first line names {width} columns"
    return None


def _records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line it begins on, fields), slow and exact: for the header and for telling where a fault is."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # outlines and masks make long fields
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.reader(opened, delimiter=_delimiter(file), strict=True)
            begins = 1
            for fields in reader:
                if fields:
                    yield begins, fields
                begins = reader.line_num + 1
    except UnicodeDecodeError:
        with file.open("rb") as bytes_:
            line = next(i for i, text in enumerate(bytes_, 1) if not _decodes(text))
        raise Refused(f"{store.shown(file)}:{line}: is not UTF-8 text; save the table as UTF-8") from None
    except csv.Error as error:
        raise Refused(f"{store.shown(file)}:{begins}: the row that begins here is broken ({error})") from None


def _decodes(text: bytes) -> bool:
    try:
        text.decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return True


def _delimiter(file: Path) -> str:
    return "\t" if file.suffix == ".tsv" else ","
