"""Rows from everything that is no csv: json in its many shapes, .bson, and the files themselves where there is no table.

Values become text here as in sources.py: what a column means is decided in tables.py.
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
from comp.engine.errors import Refused
from comp.engine.readers import containers, records, unicode_names
from comp.engine.store import paths

if TYPE_CHECKING:
    import pandas as pd

FILE_COLUMN = (
    "path of the file"  # the column of it, where the files are the rows; no table has one of that name
)


def json_frame(file: Path) -> pd.DataFrame:
    """A list of records, COCO's lists that refer to each other, columns, or id -> label or record."""
    import pandas as pd

    text, before, data = file.read_bytes(), 0, None
    try:
        if file.suffix in (".jsonl", ".ndjson"):
            data = []
            for line in text.splitlines():
                data += [json.loads(line)] if line.strip() else []
                before += 1
        else:
            data = json.loads(text)
    except ValueError as error:
        at = before + getattr(error, "lineno", 1)
        raise Refused(
            f"{paths.relative(file)}:{at}: is broken json ({str(error).partition(':')[0]})"
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
    raise Refused(
        f"{paths.relative(file)}: holds no table: a list of records, COCO's images and annotations, or id to record; "
        "other shapes: read_samples in comp/competition.py"
    )


def _coco(data: dict[str, Any]) -> list[dict[str, Any]]:
    """One row an annotation, with its image's and category's fields; without annotations one an image."""
    key = "id" if "id" in data["images"][0] else "image_id"
    annotations = data.get("annotations") or []
    if not annotations:
        return list(data["images"])
    images = {image[key]: image for image in data["images"]}
    categories = data.get("categories") or [{}]
    named = "id" if "id" in categories[0] else "category_id"
    category = {each.get(named): each for each in categories}
    rows = []
    for note in annotations:
        image = images.get(note.get("image_id"), {})
        row = {f"annotation_{k}" if k in image and k != "image_id" else k: v for k, v in note.items()}
        kind = category.get(note.get("category_id"), {})
        row |= {f"category_{k}": v for k, v in kind.items() if k not in (named, "id")}
        rows.append(row | image)
    return rows


def _flat(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif not (isinstance(value, list) and len(value) > 64 and isinstance(value[0], int | float)):
            yield f"{prefix}{key}", value  # long lists of numbers are pictures: see containers.py


def _cell(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return " ".join(str(_cell(each)) for each in value)  # several labels, as a csv would write them
    return str(value)


def bson_frame(file: Path) -> pd.DataFrame:
    import pandas as pd

    rows = [{key: _cell(value) for key, value in record.items()} for record, _ in records.records(file)]
    return pd.DataFrame(rows, dtype=object)


def array_frame(file: Path) -> pd.DataFrame:
    """Labels in .npy or .npz: a row an entry, `key` its number from 0 on, and a column an array; one of images is none."""
    import pandas as pd

    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as held:
                arrays = {n.removesuffix(".npy"): records.from_npy(held.read(n)) for n in held.namelist()}
        else:
            arrays = {"value": records.from_npy(file.read_bytes())}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise Refused(
            f"{paths.relative(file)}: no whole array of numbers or text ({str(error).splitlines()[0]})"
        ) from None
    plain = {name: array for name, array in arrays.items() if array.ndim == 1}
    lengths = {len(array) for array in plain.values()}
    if len(lengths) != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise Refused(
            f"{paths.relative(file)}: holds no table but {shapes}; arrays of one dimension and one length are columns"
        )
    rows = {name: [_cell(cell) for cell in array.tolist()] for name, array in plain.items()}
    return pd.DataFrame({"key": [str(i) for i in range(lengths.pop())], **rows}, dtype=object)


def files_frame(raw: Path, pattern: str) -> pd.DataFrame:
    """A row for every file that the pattern matches, with a column for each name in it, and FILE for its path."""
    import pandas as pd

    where = f"files: {pattern}"
    try:
        wanted = re.compile(pattern_regex(unicode_names.nfc(pattern)))
    except re.error as error:
        raise Refused(f"configs/competition.yaml: {where}: {error}") from None
    under = unicode_names.on_disk(raw, pattern_folder(pattern))
    rows = [
        {FILE_COLUMN: name, **found.groupdict()}
        for name in sorted(list_files(raw, under))
        if (found := wanted.fullmatch(unicode_names.nfc(name)))
    ]
    if not rows:
        there = sorted(list_files(raw, under))[:2000] or sorted(p.name for p in raw.iterdir())
        raise Refused(
            f"configs/competition.yaml: {where} matches no file; the nearest there is {nearest(pattern, there)[0]}"
        )
    frame = pd.DataFrame(rows, dtype=object)
    if "id" not in frame:
        frame["id"] = frame[FILE_COLUMN].map(lambda name: os.path.splitext(name)[0])
    return frame


def pattern_regex(pattern: str) -> str:
    """`train/{label}/{id}.jpg` as a regular expression; `{label:cat|dog}` brings its own."""
    out, last = "", 0
    for found in re.finditer(r"\{(\w+)(?::((?:[^{}]|\{[\d,]+\})+))?\}", pattern):
        out += re.escape(pattern[last : found.start()])
        name, own = found.groups()
        out += f"(?P={name})" if f"(?P<{name}>" in out else f"(?P<{name}>{own or '[^/]+?'})"
        last = found.end()
    return out + re.escape(pattern[last:])


def pattern_folder(pattern: str) -> str:
    """The folder (or archive) that a pattern begins with."""
    return pattern.partition("{")[0].rpartition("/")[0]


def list_files(raw: Path, under: str) -> Iterator[str]:
    """Every file below a folder or in an archive, as paths under raw."""
    start = raw / under
    if start.is_file():
        yield from (f"{under}/{name}" for name in containers.members(start))
    elif start.is_dir():
        for folder, folders, names in os.walk(start, followlinks=True):
            _refuse_loops(folder, folders)
            inside = os.path.relpath(folder, raw)
            yield from (os.path.normpath(f"{inside}/{name}") for name in names)
    elif (found := containers.split(start)) is not None:
        prefix = found[0].relative_to(raw).as_posix()
        yield from (
            f"{prefix}/{name}" for name in containers.members(found[0]) if name.startswith(f"{found[1]}/")
        )


def _refuse_loops(folder: str, folders: list[str]) -> None:
    """A link to a folder that it stands in would be walked until the system has enough, some 40 levels of the same files."""
    for name in folders:
        link = os.path.join(folder, name)
        if os.path.islink(link):
            above, leads = os.path.realpath(folder), os.path.realpath(link)
            if os.path.commonpath([above, leads]) == leads:
                raise Refused(
                    f"{paths.relative(Path(link))}: is a link that leads back to {paths.relative(Path(leads))}, which it stands in; "
                    f"remove it: rm {shlex.quote(paths.relative(Path(link)))}"
                )


class Globs:
    """`{id}/*.png` in an image template: every file there is, in their order."""

    def __init__(self, raw: Path):
        self.raw = raw
        self.by_folder: dict[str, dict[str, list[str]]] = {}  # container or folder -> folder -> its files

    def matches(self, path: str) -> list[str]:
        folder = re.split(r"[*?]", path)[0].rpartition("/")[0]
        container = containers.split(self.raw / folder / "x")
        top = container[0].relative_to(self.raw).as_posix() if container else folder
        if top not in self.by_folder:
            self.by_folder[top] = _grouped(sorted(list_files(self.raw, top), key=_natural))
        wanted = re.compile(re.escape(unicode_names.nfc(path)).replace(r"\*", "[^/]*").replace(r"\?", "[^/]"))
        inside = self.by_folder[top]
        deeper = "/" in path[len(folder) + 1 :]
        names = (
            [n for each in inside.values() for n in each]
            if deeper
            else inside.get(unicode_names.nfc(folder), [])
        )
        return [name for name in names if wanted.fullmatch(unicode_names.nfc(name))]


def _grouped(names: list[str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name in names:
        out.setdefault(unicode_names.nfc(name.rpartition("/")[0]), []).append(name)
    return out


def _natural(name: str) -> list[tuple[int, int, str]]:
    """2.png before 10.png."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]
