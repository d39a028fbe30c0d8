"""Reads the tables under data/raw that competition.yaml declares. Every value is text, so
that an id of 00042 stays 00042, and the file and line of each row are known. targets.py and times.py convert
columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comp.engine import pages
from comp.engine.config import declaration
from comp.engine.config.competition_schema import Competition, Table
from comp.engine.config.resolve import nearest
from comp.engine.data import image_key
from comp.engine.data.tables import RawRows, RawTable, column_names, group_images, missing_column, pivot_long
from comp.engine.errors import UserError, joined
from comp.engine.readers import containers, delimited, layouts, unicode_names
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pandas as pd

LARGE = 20_000_000  # bytes from which a line says that the table is being read
PAGE = "comp/competition.py"
READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": delimited.csv_frame,
    ".tsv": delimited.csv_frame,
    ".parquet": delimited.parquet_frame,
    ".pq": delimited.parquet_frame,
    ".bson": layouts.bson_frame,
    ".json": layouts.json_frame,
    ".jsonl": layouts.json_frame,
    ".ndjson": layouts.json_frame,
    ".npy": layouts.array_frame,
    ".npz": layouts.array_frame,
}


def load(competition: Competition) -> RawRows:
    """All rows: from the declared tables, or from read_samples of competition.py if that is defined."""
    import pandas as pd

    raw = paths.path(competition.raw)
    if not raw.is_dir() or not any(raw.iterdir()):
        raise UserError(
            "raw-empty",
            where=paths.relative(raw),
            what="is empty",
            remedy="unpack the competition there, or use the practice digits: comp practice",
        )
    if competition.image_columns and pages.get("load_image") is None:
        raise declaration.error(
            "knob-without-effect",
            "image_columns",
            "nothing reads the columns",
            f"define load_image(row, decode) in {PAGE}, or remove image_columns",
        )
    hook = pages.get("read_samples")
    if hook is not None:
        return _from_page(hook(raw), competition, raw)
    declared = [("train", competition.train), ("test", competition.test)]
    declared += [("extra", table) for table in competition.extra]
    opened = [(name, table, _open(name, raw, table, competition)) for name, table in declared]
    missing = [fault for each in opened for fault in _missing(*each, competition)]
    if missing:
        raise joined(missing)
    globs = layouts.Globs(raw)
    parts = [_samples(*each, competition, globs) for each in opened]
    starts = np.cumsum([0, *map(len, parts)])

    def where(position: int) -> str:
        table = int(np.searchsorted(starts, position, side="right")) - 1
        return opened[table][2].where(position - int(starts[table]))

    has = {name: column_names(source.frame) for name, _, source in opened[:2]}
    samples = pd.concat(parts, ignore_index=True)
    raw_columns = pd.concat([source.frame for _, _, source in opened], ignore_index=True)
    rows = RawRows(samples, raw_columns, has, where)
    return group_images(rows, competition) if competition.gather else rows


def load_test(competition: Competition) -> RawRows:
    """The test rows only, since a hidden test set comes without training data."""
    raw = paths.path(competition.raw)
    hook = pages.get("read_samples")
    if hook is not None:
        return _from_page(hook(raw), competition, raw)
    source = _open("test", raw, competition.test, competition)
    samples = _samples("test", competition.test, source, competition, layouts.Globs(raw))
    rows = RawRows(samples, source.frame, {"train": [], "test": column_names(source.frame)}, source.where)
    return group_images(rows, competition) if competition.gather else rows


# --- one table ---------------------------------------------------------------------------------------------


def _open(name: str, raw: Path, table: Table, competition: Competition) -> RawTable:
    """Reads a table, renames its columns (`columns:`) and reshapes it to one row per sample."""
    if table.files is not None:
        found = RawTable(raw / layouts.pattern_folder(table.files), layouts.files_frame(raw, table.files))
    else:
        assert table.table is not None
        found = read(raw / table.table)
    for theirs in table.columns.values():
        if theirs not in found.frame:
            raise missing_column(f"{name}.columns", found, theirs)
    if name == "test" and table.table == competition.submission.sample:
        found = _unique_ids(found, table.id or competition.id)
    if table.columns:
        others = found.frame.drop(columns=[name for name in table.columns if name in found.frame])
        renamed = {ours: found.frame[theirs] for ours, theirs in table.columns.items()}
        found = replace(found, frame=others.assign(**renamed))
    return found if table.long is None else pivot_long(found, table, competition)


def _unique_ids(source: RawTable, key: str) -> RawTable:
    """Drops repeated ids of a sample submission that serves as the table of test rows."""
    if key not in source.frame or source.frame[key].is_unique:
        return source
    first = np.flatnonzero(~source.frame[key].duplicated().to_numpy())
    return replace(source, frame=source.frame.iloc[first].reset_index(drop=True), rows=first.tolist())


def _samples(
    name: str, table: Table, source: RawTable, competition: Competition, globs: layouts.Globs
) -> pd.DataFrame:
    """id, images, source, row, weight of one table."""
    import pandas as pd

    ids = _ids(source, table.id or competition.id)
    images = _images(table, source, competition, globs)
    frame = pd.DataFrame({"id": ids, "images": images, "source": name, "row": ids, "weight": 1.0})
    if competition.row and set(_columns_in(competition.row)) <= set(column_names(source.frame)):
        frame["row"] = _ids(source, competition.row)
    frame["row"] = frame["row"].map(unicode_names.nfc, na_action="ignore")
    if competition.weight and competition.weight in source.frame:
        weight = pd.to_numeric(source.frame[competition.weight], errors="coerce")
        wrong = np.flatnonzero(~(weight.fillna(-1) >= 0).to_numpy())
        if len(wrong):
            cell = source.frame[competition.weight].iloc[wrong[0]]
            raise UserError(
                "weight-invalid",
                where=source.where(int(wrong[0])),
                key=competition.weight,
                what=f"the weight {cell!r} is not a number >= 0",
            )
        frame["weight"] = weight.astype("float64")
    return frame


def _ids(source: RawTable, name: str) -> pd.Series:
    """The ids: values of a column, or of a template like `{patient}_{side}`."""
    import pandas as pd

    if "{" not in name:
        return source.frame[name]
    return pd.Series(expand_template(source, name), index=source.frame.index, dtype=object)


def _images(
    table: Table, source: RawTable, competition: Competition, globs: layouts.Globs
) -> list[list[str]]:
    """The image keys (image_key.py) of each row."""
    images = [[path] for path in source.frame[layouts.FILE_COLUMN]] if table.image is None else []
    for template in table.image or []:
        parts = [
            [unicode_names.on_disk(globs.raw, path) for path in expand_template(source, part)]
            for part in channels(template)
        ]
        keys = parts[0] if len(parts) == 1 else [image_key.joined(each) for each in zip(*parts, strict=True)]
        matches = [globs.matches(key) or [key] if "*" in template else [key] for key in keys]
        images = [a + b for a, b in zip(images, matches, strict=True)] if images else matches
    return _with_columns(images, source.frame, competition)


def _with_columns(images: list[list[str]], frame: pd.DataFrame, competition: Competition) -> list[list[str]]:
    """Adds the values of competition.image_columns to the keys."""
    names = competition.image_columns
    if names == "all":  # except columns that test rows lack, and names that load_image gets anyway
        never = {*competition.targets, competition.weight, "image", "file", "images", "source", "row"}
        names = [name for name in column_names(frame) if name not in never]
    if not names:
        return images
    cells = frame[names].astype(object)
    rows: Any = cells.where(cells.notna(), None).to_dict("records")
    return [[image_key.with_row(each, row) for each in keys] for keys, row in zip(images, rows, strict=True)]


def _missing(name: str, table: Table, source: RawTable, competition: Competition) -> list[UserError]:
    """Declared columns that the table does not have."""
    declared = {
        f"{name}.id" if table.id else "id": _columns_in(table.id or competition.id),
        f"{name}.image": [c for template in table.image or [] for c in _columns_in(template, bare=False)],
    }
    declared["image_columns"] = [] if competition.image_columns == "all" else competition.image_columns
    if name == "test" and competition.row:
        declared["row"] = _columns_in(competition.row)
    if name != "test":
        declared["target"] = competition.targets
    if name == "train":
        single = {"group": competition.group, "time": competition.time, "weight": competition.weight}
        declared["metadata"] = competition.metadata
        declared |= {key: [column] for key, column in single.items() if column}
    present = column_names(source.frame)
    return [
        missing_column(key, source, column)
        for key, names in declared.items()
        for column in names
        if column not in present
    ]


# --- files -------------------------------------------------------------------------------------------------


def read(file: Path) -> RawTable:
    file = unpacked(file)
    shown = paths.relative(file)
    if not file.is_file():
        folder = file.parent.glob("*") if file.parent.is_dir() else []
        tables = [each.name for each in folder if each.suffix in READERS]
        remedy = f"did you mean {nearest(file.name, tables)[0]}?" if tables else ""
        raise UserError("table-missing", where=shown, what="no such table", remedy=remedy)
    if file.suffix not in READERS:
        raise UserError(
            "table-format-unknown",
            where=shown,
            what=f"not a table format that is read: {', '.join(READERS)}",
            remedy=f"define read_samples in {PAGE}",
        )
    if file.stat().st_size > LARGE:
        print(f"reading {shown}, {artifacts.format_size(file.stat().st_size)} …", flush=True)
    frame = READERS[file.suffix](file)
    if not len(frame):
        raise UserError("table-empty", where=shown, what="has no rows", remedy="download it again")
    return RawTable(file, frame)


def unpacked(file: Path) -> Path:
    """`train.zip/train.csv`, or `train.csv.zip` with one table in it, unpacked once under data/unpacked; any
    other file as it is."""
    file = file.parent / unicode_names.on_disk(file.parent, file.name)
    if file.is_file() and file.suffix not in READERS and containers.is_container(file):
        inside = [name for name in containers.members(file) if Path(name).suffix in READERS]
        if len(inside) != 1:
            raise UserError(
                "table-ambiguous",
                where=paths.relative(file),
                what=f"has {len(inside)} tables in it",
                remedy=f"name one of them, like {file.name}/train.csv",
            )
        file = file / inside[0]
    stat = None if file.exists() else containers.stat(file)
    if stat is None:
        return file
    copy = paths.path("data", "unpacked", artifacts.digest([str(file), *stat]), file.name)
    if not copy.exists():
        with artifacts.atomic(copy) as temporary:
            temporary.write_bytes(containers.read(file))
    return copy


# --- templates: train/{id[0]}/{id}.png ---------------------------------------------------------------------


def expand_template(source: RawTable, template: str) -> list[str]:
    """The path of every row. `{column[-1]}` and `{column[0:2]}` are parts of the text of a column."""
    import pandas as pd

    pieces: list[Sequence[str]] = []
    for literal, column, part in template_fields(template):
        if column is None:
            pieces.append([literal] * len(source.frame))
            continue
        values = source.frame[column]
        if part is not None:
            values = values.str[part]
            values = values.mask(values == "")
        missing = pd.isna(values).to_numpy().nonzero()[0]
        if len(missing):
            cell = source.frame[column].iloc[missing[0]]
            what = "has no value" if part is None else f"{cell!r} is too short"
            raise UserError(
                "template-value-missing",
                where=source.where(missing[0]),
                key=column,
                what=f"{what} for the template {template}",
            )
        pieces.append(list(values))
    done = [re.sub("/{2,}", "/", "".join(row)) for row in zip(*pieces, strict=True)]
    for position, path in enumerate(done):
        if path.startswith("/") or ".." in path.split("/"):
            raise UserError(
                "path-outside",
                where=source.where(position),
                what=f"the path {path!r} is outside the raw folder",
            )
    return done


def template_fields(template: str) -> Iterator[tuple[str, str | None, int | slice | None]]:
    """Parts of a template: (literal, None, None) or ("", column, None, an index or a slice of its text)."""
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


def channels(template: str) -> list[str]:
    """The parts of `{id}_red.png+{id}_green.png`: files that are channels of one image. A + separates only
    parts that each name a column; in `v1+v2/{id}.png`, and in the value of a column, it is part of the name.
    """
    parts = re.split(r"\+(?![^{}]*\})", template)
    return parts if all("{" in part for part in parts) else [template]


def _columns_in(template: str, bare: bool = True) -> list[str]:
    """The columns of a template. With `bare`, a text without braces is itself the name of a column."""
    columns = [column for _, column, _ in template_fields(template) if column is not None]
    return columns or ([template] if bare and "{" not in template else [])


# --- read_samples of competition.py ------------------------------------------------------------------------


def _from_page(frame: Any, competition: Competition, raw: Path) -> RawRows:
    """Calls read_samples of competition.py and validates the result."""
    import pandas as pd

    if not isinstance(frame, pd.DataFrame):
        raise _page_error(f"must return a DataFrame, not {type(frame).__name__}")
    frame = frame.reset_index(drop=True)
    singles = [name for name in (competition.group, competition.time) if name]
    declared = [*competition.targets, *singles, *competition.metadata]
    declared += [] if competition.image_columns == "all" else competition.image_columns
    for column in [competition.id, "images", "source", *declared]:
        if column not in frame:
            close = nearest(column, column_names(frame))[0]
            raise _page_error(f"the DataFrame has no column {column!r}", f"did you mean {close!r}?")
    wrong = sorted(set(frame["source"].astype(str)) - {"train", "test", "extra"})
    if wrong:
        raise _page_error(f"the source {wrong[0]!r} is not one of train, test, extra")
    images = [
        [_on_disk(raw, key) for key in ([value] if isinstance(value, str) else value)]
        for value in frame["images"]
    ]
    reserved = ("images", "source", "weight", "row")
    text = pd.DataFrame(
        {name: delimited.as_text(frame[name]) for name in column_names(frame) if name not in reserved}
    )
    images = _with_columns(images, text, competition)
    samples = pd.DataFrame(
        {"id": text[competition.id], "images": images, "source": frame["source"].astype(str)}
    )
    samples["row"] = delimited.as_text(frame["row"]) if "row" in frame else samples["id"]
    samples["row"] = samples["row"].map(unicode_names.nfc, na_action="ignore")
    samples["weight"] = frame["weight"].astype("float64") if "weight" in frame else 1.0
    has = {
        source: [c for c in column_names(text) if text[c][samples["source"] == source].notna().any()]
        for source in ("train", "test")
    }
    return RawRows(samples, text, has, lambda position: f"{PAGE}: read_samples: row {position}")


def _page_error(what: str, remedy: str = "") -> UserError:
    return UserError("read-samples-invalid", where=PAGE, key="read_samples", what=what, remedy=remedy)


def _on_disk(raw: Path, key: str) -> str:
    return image_key.joined([unicode_names.on_disk(raw, path) for path in image_key.files(key)])
