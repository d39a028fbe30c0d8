"""Reads tables that are not csv: json of several layouts, .bson, arrays, and lists of files by a pattern.

Values become text, as in delimited.py. data/targets.py decides what a column means.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comp.engine.config.resolve import nearest
from comp.engine.errors import UserError
from comp.engine.readers import containers, records, unicode_names
from comp.engine.store import paths

if TYPE_CHECKING:
    import pandas as pd

# Column with the path if the rows are files. Its spaces make a clash with a column of a table unlikely.
FILE_COLUMN = "path of the file"


def json_frame(file: Path) -> pd.DataFrame:
    """Reads a list of records, COCO (lists that refer to each other), columns, or id -> label or record."""
    import pandas as pd

    text, lines, data = file.read_bytes(), 0, None
    try:
        if file.suffix in (".jsonl", ".ndjson"):
            data = []
            for record in text.splitlines():
                data += [json.loads(record)] if record.strip() else []
                lines += 1
        else:
            data = json.loads(text)
    except ValueError as error:
        line = lines + getattr(error, "lineno", 1)
        raise UserError(
            "table-damaged",
            where=f"{paths.relative(file)}:{line}",
            what=f"invalid json ({str(error).partition(':')[0]})",
        ) from None
    rows = _rows(data, file)
    return pd.DataFrame([{key: _cell(value) for key, value in _flat(row)} for row in rows], dtype=object)


def _rows(data: Any, file: Path) -> list[dict[str, Any]]:
    if isinstance(data, list) and data and all(isinstance(row, dict) for row in data):
        return data
    if isinstance(data, dict):
        if isinstance(data.get("images"), list) and data["images"]:
            return _coco(data)
        values = list(data.values())
        if values and all(isinstance(value, dict) for value in values):
            return [{"key": key, **value} for key, value in data.items()]
        if values and all(isinstance(value, list) for value in values) and len({len(v) for v in values}) == 1:
            return [dict(zip(data, row, strict=True)) for row in zip(*values, strict=True)]
        if values and not any(isinstance(value, list | dict) for value in values):
            return [{"key": key, "value": value} for key, value in data.items()]
        lists = [
            key
            for key, value in data.items()
            if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if len(lists) == 1:
            return list(data[lists[0]])
    raise UserError(
        "table-unsupported",
        where=paths.relative(file),
        what="holds no list of records, COCO images and annotations, columns, or id to label or record",
        remedy="read it in read_samples of comp/competition.py",
    )


def _coco(data: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per annotation, with the fields of its image and category; without annotations, per image."""
    key = "id" if "id" in data["images"][0] else "image_id"
    annotations = data.get("annotations") or []
    if not annotations:
        return list(data["images"])
    images = {image[key]: image for image in data["images"]}
    categories = data.get("categories") or [{}]
    category_key = "id" if "id" in categories[0] else "category_id"
    category_of = {each.get(category_key): each for each in categories}
    rows = []
    for annotation in annotations:
        image = images.get(annotation.get("image_id"), {})
        row = {f"annotation_{k}" if k in image and k != "image_id" else k: v for k, v in annotation.items()}
        category = category_of.get(annotation.get("category_id"), {})
        row |= {f"category_{k}": v for k, v in category.items() if k not in (category_key, "id")}
        rows.append(row | image)
    return rows


def _flat(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif not (isinstance(value, list) and len(value) > 64 and isinstance(value[0], int | float)):
            yield f"{prefix}{key}", value  # long lists of numbers are images: see containers.py


def _cell(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return " ".join(str(_cell(each)) for each in value)  # several labels, as a csv has them
    return str(value)


def bson_frame(file: Path) -> pd.DataFrame:
    import pandas as pd

    rows = [{key: _cell(value) for key, value in record.items()} for record, _ in records.records(file)]
    return pd.DataFrame(rows, dtype=object)


def array_frame(file: Path) -> pd.DataFrame:
    """Labels in .npy or .npz: one column per array, and the index of the row as `key`. Arrays of images are
    left out."""
    import pandas as pd

    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as npz:
                arrays = {n.removesuffix(".npy"): records.from_npy(npz.read(n)) for n in npz.namelist()}
        else:
            arrays = {"value": records.from_npy(file.read_bytes())}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            "file-damaged",
            where=paths.relative(file),
            what=f"is no complete array of numbers or text ({str(error).splitlines()[0]})",
        ) from None
    columns = {name: array for name, array in arrays.items() if array.ndim == 1}
    lengths = {len(array) for array in columns.values()}
    if len(lengths) != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise UserError(
            "table-unsupported",
            where=paths.relative(file),
            what=f"holds {shapes}",
            remedy="columns are arrays of one dimension and of the same length",
        )
    rows = {name: [_cell(cell) for cell in array.tolist()] for name, array in columns.items()}
    return pd.DataFrame({"key": [str(i) for i in range(lengths.pop())], **rows}, dtype=object)


def files_frame(raw: Path, pattern: str) -> pd.DataFrame:
    """One row per file that matches the pattern, with a column for each name in the pattern, and FILE_COLUMN
    for the path."""
    import pandas as pd

    try:
        regex = re.compile(pattern_regex(unicode_names.nfc(pattern)))
    except re.error as error:
        raise _pattern_error("pattern-invalid", f"{pattern}: {error}") from None
    under = unicode_names.on_disk(raw, pattern_folder(pattern))
    rows = [
        {FILE_COLUMN: name, **match.groupdict()}
        for name in sorted(list_files(raw, under))
        if (match := regex.fullmatch(unicode_names.nfc(name)))
    ]
    if not rows:
        files = sorted(list_files(raw, under))[:2000] or sorted(p.name for p in raw.iterdir())
        what, remedy = f"{pattern} matches no file", f"the nearest is {nearest(pattern, files)[0]}"
        raise _pattern_error("pattern-unmatched", what, remedy)
    frame = pd.DataFrame(rows, dtype=object)
    if "id" not in frame:
        frame["id"] = frame[FILE_COLUMN].map(lambda name: os.path.splitext(name)[0])
    return frame


def _pattern_error(code: str, what: str, remedy: str = "") -> UserError:
    return UserError(code, where="configs/competition.yaml", key="files", what=what, remedy=remedy)


def pattern_regex(pattern: str) -> str:
    """Converts `train/{label}/{id}.jpg` to a regular expression; in `{label:cat|dog}` it is given."""
    out, last = "", 0
    for match in re.finditer(r"\{(\w+)(?::((?:[^{}]|\{[\d,]+\})+))?\}", pattern):
        out += re.escape(pattern[last : match.start()])
        name, own = match.groups()
        out += f"(?P={name})" if f"(?P<{name}>" in out else f"(?P<{name}>{own or '[^/]+?'})"
        last = match.end()
    return out + re.escape(pattern[last:])


def pattern_folder(pattern: str) -> str:
    """The folder (or archive) at the beginning of a pattern."""
    return pattern.partition("{")[0].rpartition("/")[0]


def list_files(raw: Path, under: str) -> Iterator[str]:
    """Every file below a folder or in an archive, as paths under raw."""
    start = raw / under
    if start.is_file():
        yield from (f"{under}/{name}" for name in containers.members(start))
    elif start.is_dir():
        for folder, folders, names in os.walk(start, followlinks=True):
            _validate_links(folder, folders)
            inside = os.path.relpath(folder, raw)
            yield from (os.path.normpath(f"{inside}/{name}") for name in names)
    elif (parts := containers.split(start)) is not None:
        container, inside = parts
        prefix = container.relative_to(raw).as_posix()
        yield from (
            f"{prefix}/{name}" for name in containers.members(container) if name.startswith(f"{inside}/")
        )


def _validate_links(folder: str, folders: list[str]) -> None:
    """Raises for a link to a parent folder, which would list the same files some 40 levels deep."""
    for name in folders:
        link = os.path.join(folder, name)
        if os.path.islink(link):
            parent, target = os.path.realpath(folder), os.path.realpath(link)
            if os.path.commonpath([parent, target]) == target:
                shown = paths.relative(Path(link))
                raise UserError(
                    "link-loop",
                    where=shown,
                    what=f"is a link to {paths.relative(Path(target))}, a folder above it",
                    remedy=f"remove it: rm {shlex.quote(shown)}",
                )


class Globs:
    """Expands `{id}/*.png` in an image template to all files that match, in natural order."""

    def __init__(self, raw: Path):
        self.raw = raw
        self.by_folder: dict[str, dict[str, list[str]]] = {}  # container or folder -> folder -> its files

    def matches(self, path: str) -> list[str]:
        folder = re.split(r"[*?]", path)[0].rpartition("/")[0]
        container = containers.split(self.raw / folder / "x")
        top = container[0].relative_to(self.raw).as_posix() if container else folder
        if top not in self.by_folder:
            self.by_folder[top] = _grouped(sorted(list_files(self.raw, top), key=_natural))
        regex = re.compile(re.escape(unicode_names.nfc(path)).replace(r"\*", "[^/]*").replace(r"\?", "[^/]"))
        files = self.by_folder[top]
        deeper = "/" in path[len(folder) + 1 :]
        names = (
            [n for each in files.values() for n in each]
            if deeper
            else files.get(unicode_names.nfc(folder), [])
        )
        return [name for name in names if regex.fullmatch(unicode_names.nfc(name))]


def _grouped(names: list[str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name in names:
        out.setdefault(unicode_names.nfc(name.rpartition("/")[0]), []).append(name)
    return out


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key of the natural order: 2.png before 10.png."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]
