"""Tables as the host wrote them: every value is text, and every row knows the file and line it came from.

An id of 00042 must stay 00042, so no reader guesses a type. What a column means is decided in tables.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comp.engine import pages
from comp.engine.config.competition_schema import Competition, Table
from comp.engine.config.resolve import nearest
from comp.engine.data import image_key
from comp.engine.data.tables import RawRows, RawTable, group_images, pivot_long
from comp.engine.errors import Refused
from comp.engine.readers import containers, delimited, layouts, unicode_names
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pandas as pd


def load(competition: Competition) -> RawRows:
    """What competition.yaml declares, or what read_samples of competition.py gives instead."""
    import pandas as pd

    raw = paths.path(competition.raw)
    if not raw.is_dir() or not any(raw.iterdir()):
        raise Refused(
            f"{paths.relative(raw)}: is empty; put the unpacked competition there, or take the digits: comp practice"
        )
    if competition.image_columns and pages.get("load_image") is None:
        raise Refused(
            "configs/competition.yaml: image_columns: nothing reads them; define "
            "load_image(row, decode) in comp/competition.py, or leave them out"
        )
    hook = pages.get("read_samples")
    if hook is not None:
        return _own_rows(hook(raw), competition, raw)
    tables = [("train", competition.train), ("test", competition.test)]
    tables += [("extra", table) for table in competition.extra]
    opened = [(name, table, _source(name, raw, table, competition)) for name, table in tables]
    problems = [line for name, table, source in opened for line in _absent(name, source, table, competition)]
    if problems:
        raise Refused(*problems)
    globs = layouts.Globs(raw)
    parts = [_samples(*each, competition, globs) for each in opened]
    starts = np.cumsum([0, *map(len, parts)])

    def where(position: int) -> str:
        number = int(np.searchsorted(starts, position, side="right")) - 1
        return opened[number][2].where(position - int(starts[number]))

    has = {name: column_names(source.frame) for name, _, source in opened[:2]}
    samples = pd.concat(parts, ignore_index=True)
    raw_columns = pd.concat([source.frame for _, _, source in opened], ignore_index=True)
    rows = RawRows(samples, raw_columns, has, where)
    return group_images(rows, competition) if competition.gather else rows


def load_test(competition: Competition) -> RawRows:
    """The test rows alone: a hidden set comes without anything else."""
    raw = paths.path(competition.raw)
    hook = pages.get("read_samples")
    if hook is not None:
        return _own_rows(hook(raw), competition, raw)
    source = _source("test", raw, competition.test, competition)
    samples = _samples("test", competition.test, source, competition, layouts.Globs(raw))
    rows = RawRows(samples, source.frame, {"train": [], "test": column_names(source.frame)}, source.where)
    return group_images(rows, competition) if competition.gather else rows


def _source(name: str, raw: Path, table: Table, competition: Competition) -> RawTable:
    if table.files is not None:
        found = RawTable(raw / layouts.pattern_folder(table.files), layouts.files_frame(raw, table.files))
    else:
        assert table.table is not None
        found = read(raw / table.table)
    for theirs in table.columns.values():
        if theirs not in found.frame:
            raise Refused(
                f"configs/competition.yaml: columns: {paths.relative(found.file)} has no column {theirs!r}; "
                f"the nearest is {nearest(theirs, column_names(found.frame))[0]!r}"
            )
    if name == "test" and table.table == competition.submission.sample:
        found = _once(found, table.id or competition.id)
    if table.columns:
        kept = found.frame.drop(columns=[name for name in table.columns if name in found.frame])
        called = {ours: found.frame[theirs] for ours, theirs in table.columns.items()}
        found = replace(found, frame=kept.assign(**called))
    return found if table.long is None else pivot_long(found, table, competition)


def _once(source: RawTable, key: str) -> RawTable:
    """A sample submission may ask for an id in several lines; as the list of the test rows it names each once."""
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
    if competition.row and not _lacking(source, [competition.row]):
        frame["row"] = _ids(source, competition.row)
    frame["row"] = frame["row"].map(unicode_names.nfc, na_action="ignore")
    if competition.weight and competition.weight in source.frame:
        weight = pd.to_numeric(source.frame[competition.weight], errors="coerce")
        wrong = np.flatnonzero(~(weight.fillna(-1) >= 0).to_numpy())
        if len(wrong):
            given = source.frame[competition.weight].iloc[wrong[0]]
            raise Refused(f"{source.where(int(wrong[0]))}: the weight {given!r} is no number from 0 up")
        frame["weight"] = weight.astype("float64")
    return frame


def _images(
    table: Table, source: RawTable, competition: Competition, globs: layouts.Globs
) -> list[list[str]]:
    """The keys of a row's images (image_key.py), one list a row."""
    images = [[path] for path in source.frame[layouts.FILE_COLUMN]] if table.image is None else []
    for template in table.image or []:
        parts = [
            [unicode_names.on_disk(globs.raw, path) for path in expand_template(source, part)]
            for part in channels(template)
        ]
        found = parts[0] if len(parts) == 1 else [image_key.joined(each) for each in zip(*parts, strict=True)]
        several = (
            [globs.matches(path) or [path] for path in found] if "*" in template else [[p] for p in found]
        )
        images = [a + b for a, b in zip(images, several, strict=True)] if images else several
    return _with_columns(images, source.frame, competition)


def _with_columns(images: list[list[str]], frame: pd.DataFrame, competition: Competition) -> list[list[str]]:
    names = competition.image_columns
    if names == "all":  # but for what test rows do not have, and for names that load_image gives itself
        never = {*competition.targets, competition.weight, "image", "file", "images", "source", "row"}
        names = [name for name in column_names(frame) if name not in never]
    if not names:
        return images
    cells = frame[names].astype(object)
    rows: Any = cells.where(cells.notna(), None).to_dict("records")
    return [[image_key.with_row(each, row) for each in keys] for keys, row in zip(images, rows, strict=True)]


def channels(template: str) -> list[str]:
    """`{id}_red.png+{id}_green.png`: files that are channels of one image. Only a + between two parts that each name a column
    parts them: in `v1+v2/{id}.png`, and in the value of a column, it belongs to the name."""
    parts = re.split(r"\+(?![^{}]*\})", template)
    return parts if all("{" in part for part in parts) else [template]


def _ids(source: RawTable, name: str) -> pd.Series:
    """A column, or a template like `{patient}_{side}`."""
    import pandas as pd

    if "{" not in name:
        return source.frame[name]
    return pd.Series(expand_template(source, name), index=source.frame.index, dtype=object)


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": delimited.csv_frame, ".tsv": delimited.csv_frame, ".parquet": delimited.parquet_frame, ".pq": delimited.parquet_frame, ".bson": layouts.bson_frame,
    ".json": layouts.json_frame, ".jsonl": layouts.json_frame, ".ndjson": layouts.json_frame, ".npy": layouts.array_frame,
    ".npz": layouts.array_frame,
}  # fmt: skip


def read(file: Path) -> RawTable:
    file = unpacked(file)
    if not file.is_file():
        beside = (
            [f.name for f in file.parent.glob("*") if f.suffix in READERS] if file.parent.is_dir() else []
        )
        close = f"; the nearest there is {nearest(file.name, beside)[0]}" if beside else ""
        raise Refused(f"{paths.relative(file)}: no such table{close}")
    if file.suffix not in READERS:
        raise Refused(
            f"{paths.relative(file)}: a table ends in {', '.join(READERS)}; other kinds: read_samples in comp/competition.py"
        )
    if file.stat().st_size > 20_000_000:
        print(f"reading {paths.relative(file)}, {artifacts.format_size(file.stat().st_size)} …", flush=True)
    frame = READERS[file.suffix](file)
    if not len(frame):
        raise Refused(f"{paths.relative(file)}: holds no rows")
    return RawTable(file, frame)


def unpacked(file: Path) -> Path:
    """`train.zip/train.csv`, or `train.csv.zip` with one table in it: unpacked once, read like any other."""
    file = file.parent / unicode_names.on_disk(file.parent, file.name)
    if file.is_file() and file.suffix not in READERS and containers.is_container(file):
        inside = [name for name in containers.members(file) if Path(name).suffix in READERS]
        if len(inside) != 1:
            raise Refused(
                f"{paths.relative(file)}: holds {len(inside)} tables; name one, like {file.name}/train.csv"
            )
        file = file / inside[0]
    found = None if file.exists() else containers.stat(file)
    if found is None:
        return file
    place = paths.path("data", "unpacked", artifacts.digest([str(file), *found]), file.name)
    if not place.exists():
        with artifacts.atomic(place) as temporary:
            temporary.write_bytes(containers.read(file))
    return place


def column_names(frame: pd.DataFrame) -> list[str]:
    return [str(name) for name in frame.columns]


def expand_template(source: RawTable, template: str) -> list[str]:
    """`train/{id[0]}/{id}.png` for every row. `{column[-1]}` and `{column[0:2]}` are parts of its text."""
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
            what = (
                "has no value" if part is None else f"{source.frame[column].iloc[missing[0]]!r} is too short"
            )
            raise Refused(f"{source.where(missing[0])}: {column} {what} for the image path {template}")
        pieces.append(list(values))
    done = [re.sub("/{2,}", "/", "".join(row)) for row in zip(*pieces, strict=True)]
    for position, path in enumerate(done):
        if path.startswith("/") or ".." in path.split("/"):
            raise Refused(f"{source.where(position)}: the image path {path!r} leads out of the raw folder")
    return done


def template_fields(template: str) -> Iterator[tuple[str, str | None, int | slice | None]]:
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


def _absent(name: str, source: RawTable, table: Table, competition: Competition) -> list[str]:
    """One line for each declared column that the table does not have."""
    wanted = {
        f"{name}.id" if table.id else "id": _names_in(table.id or competition.id),
        f"{name}.image": [c for template in table.image or [] for c in _names_in(template, bare=False)],
    }
    wanted["image_columns"] = [] if competition.image_columns == "all" else competition.image_columns
    if name == "test" and competition.row:
        wanted["row"] = _names_in(competition.row)
    if name != "test":
        wanted["target"] = competition.targets
    if name == "train":
        single = {"group": competition.group, "time": competition.time, "weight": competition.weight}
        wanted["metadata"] = competition.metadata
        wanted |= {key: [column] for key, column in single.items() if column}
    there = column_names(source.frame)
    file = paths.relative(source.file) + ":1" * (source.file.suffix in (".csv", ".tsv"))
    return [
        f"configs/competition.yaml: {key}: {file} has no column {column!r}; the nearest is {nearest(column, there)[0]!r}"
        for key, names in wanted.items()
        for column in names
        if column not in there
    ]


def _names_in(template: str, bare: bool = True) -> list[str]:
    """The columns of a template; without braces it is a column itself, where that may be."""
    named = [c for _, c, _ in template_fields(template) if c is not None]
    return named or ([template] if bare and "{" not in template else [])


def _lacking(source: RawTable, templates: list[str]) -> list[str]:
    there = column_names(source.frame)
    return [c for template in templates for c in _names_in(template) if c not in there]


def _own_rows(frame: Any, competition: Competition, raw: Path) -> RawRows:
    import pandas as pd

    said = "comp/competition.py: read_samples"
    if not isinstance(frame, pd.DataFrame):
        raise Refused(f"{said} must return a DataFrame, not {type(frame).__name__}")
    frame = frame.reset_index(drop=True)
    singles = [name for name in (competition.group, competition.time) if name]
    named = [*competition.targets, *singles, *competition.metadata]
    named += [] if competition.image_columns == "all" else competition.image_columns
    for column in [competition.id, "images", "source", *named]:
        if column not in frame:
            raise Refused(
                f"{said} returns no column {column!r}; the nearest is {nearest(column, column_names(frame))[0]!r}"
            )
    wrong = sorted(set(frame["source"].astype(str)) - {"train", "test", "extra"})
    if wrong:
        raise Refused(f"{said}: source is train, test or extra, not {wrong[0]!r}")
    images = [
        [_own_key(raw, key) for key in ([value] if isinstance(value, str) else value)]
        for value in frame["images"]
    ]
    text = pd.DataFrame(
        {
            name: delimited.as_text(frame[name])
            for name in column_names(frame)
            if name not in ("images", "source", "weight", "row")
        }
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
    return RawRows(samples, text, has, lambda position: f"{said}: row {position}")


def _own_key(raw: Path, key: str) -> str:
    return image_key.joined([unicode_names.on_disk(raw, path) for path in image_key.files(key)])
