"""Which file of a download is what, and which column names the images: the first half of comp inspect's guesses."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comp.engine.data import raw_tables
from comp.engine.data.sample_submission import index_columns, read_sample
from comp.engine.errors import Refused, UserError
from comp.engine.readers import containers, layouts
from comp.engine.store import paths

if TYPE_CHECKING:
    import pandas as pd

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".bson")
PICTURES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
    ".bmp",
    ".gif",
    ".dcm",
    ".dicom",
    ".npy",
    ".npz",
)
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".bson")
MOST = 500_000  # files that are looked at


@dataclass
class Found:
    """Everything that stands in competition.yaml, with a reason each."""

    says: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    unsure: list[str] = field(default_factory=list)
    images: dict[str, list[str]] = field(default_factory=dict)  # train and test: some of each, for a look
    captions: list[str] = field(default_factory=list)  # what the table says of those of train
    labels: Counter[str] = field(default_factory=Counter)
    spread: str = ""  # of a number that is to be predicted

    def say(self, key: str, value: Any, why: str) -> None:
        self.says[key] = value
        self.why[key] = why


def files(raw: Path) -> tuple[list[str], list[str]]:
    tables, pictures, archives = [], [], []
    for number, name in enumerate(layouts.list_files(raw, "")):
        if number > MOST:
            break
        suffix = os.path.splitext(name)[1].lower()
        if suffix in TABLES:
            tables.append(name)
        if suffix in PICTURES:
            pictures.append(name)
        elif suffix in ARCHIVES:
            archives.append(name)
    for name in archives:
        if containers.is_container(raw / name):
            inside = [f"{name}/{member}" for member in containers.members(raw / name)]
            plain = {os.path.basename(path) for path in pictures}
            # Beside its own unpacked folder an archive says nothing new.
            pictures += [
                path
                for path in inside
                if os.path.basename(path) not in plain and path.lower().endswith(PICTURES)
            ]
            tables += [path for path in inside if path.lower().endswith((".csv", ".json"))]
    return sorted(tables), pictures


def sample(raw: Path, tables: list[str]) -> tuple[str, pd.DataFrame]:
    named = [name for name in tables if "sample" in name.lower() or "submission" in name.lower()]
    if not named:
        raise Refused(
            f"{paths.relative(raw)}: no table with `sample` or `submission` in its name; write configs/competition.yaml by hand"
        )
    best = min(named, key=lambda name: ("sample" not in name.lower(), name.count("/"), len(name)))
    host, frame = read_sample(raw / best), raw_tables.read(raw / best).frame
    key = host.columns[host.key]
    return best, frame[[key, *host.prediction_columns]].drop_duplicates(key, ignore_index=True)


def opened(raw: Path, tables: list[str], found: Found) -> Iterator[tuple[str, pd.DataFrame]]:
    for name in tables[:40]:
        try:
            frame = raw_tables.read(raw / name).frame
            yield name, frame.drop(columns=index_columns(list(map(str, frame.columns))))
        except UserError as refused:
            found.unsure.append(f"{name} was left out: {refused.lines[0]}")


def table(kind: str, frames: dict[str, pd.DataFrame], sample: pd.DataFrame) -> str | None:
    """By its name first, then by how many of the sample's columns it has; most rows win."""
    other = "test" if kind == "train" else "train"
    known = {str(column) for column in sample.columns}

    def worth(name: str) -> tuple[int, int, int, int]:
        frame, last = frames[name], name.lower()
        named = int(kind in last) + int(kind == "train" and ("label" in last or "annotations.json" in last))
        shared = len(known & set(map(str, frame.columns)))
        return int(named > 0), min(shared, 2), -last.count("example"), len(frame)

    fitting = [
        name
        for name, frame in frames.items()
        if other not in os.path.basename(name).lower() and other not in name.lower().split("/")
    ]
    if kind == "test":
        fitting = [name for name in fitting if "test" in name.lower()]
    else:  # more than a list of what classes are called
        fitting = [
            name
            for name in fitting
            if len(frames[name]) > 20
            and ("train" in name.lower() or len(known & set(map(str, frames[name].columns))))
        ]
    return max(fitting, key=worth) if fitting else None


class Index:
    """Paths by file name and by stem."""

    def __init__(self, pictures: list[str]):
        self.by_name: dict[str, list[str]] = {}
        for path in pictures:
            name = path.rpartition("/")[2]
            for key in {name, name.rpartition(".")[0]}:
                self.by_name.setdefault(key, []).append(path)
        self.some = pictures

    def of(self, value: str, kind: str) -> list[str]:
        """The paths of a cell; of both train and test those of the right kind, pictures before DICOM."""
        paths = [
            path
            for path in self.by_name.get(value.rpartition("/")[2], [])
            if path.endswith(value) or f"{value}." in path
        ]
        other = "test" if kind == "train" else "train"
        right = [
            path for path in paths if not any(other in part for part in path.lower().split("/")[:-1])
        ] or paths
        return sorted(right, key=lambda path: (path.endswith((".dcm", ".npy")), len(path), path))


def images(found: Found, kind: str, frame: pd.DataFrame, index: Index, table: str) -> None:
    if table.endswith(".bson"):
        found.say(f"{kind}.image", f"{table}/{{_id}}/*", "the pictures stand in the records")
        return
    rows = frame.head(60)
    best: tuple[tuple[int, int], str, Counter[str]] = ((0, 0), "", Counter())
    for column in map(str, frame.columns):
        if rows[column].nunique() <= len(rows) * 0.5:
            continue
        known = [(row, index.of(str(row[column]), kind)) for row in rows.to_dict("records")]
        templates = Counter(_template(paths[0], row, column) for row, paths in known if paths)
        # The pattern that fits most rows; of equal ones that of a column that says more of the path.
        most = templates.most_common(1)[0][1] if templates else 0
        best = max(
            best,
            ((most, int(rows[column].astype(str).str.len().sum())), column, templates),
            key=lambda x: x[0],
        )
    (most, _), column, templates = best
    if not most:
        found.say(f"{kind}.image", f"{kind}/{{id}}.jpg", "GUESSED: no column names a file")
        found.unsure.append(f"{kind}.image: no column of {table} names a file")
        return
    template = templates.most_common(1)[0][0]
    found.say(f"{kind}.image", template, f"{most} of {len(rows)} rows looked at name such a file")
    if most < len(rows):
        found.unsure.append(f"{kind}.image: {template} fits {most} of {len(rows)} rows looked at")


def _template(path: str, row: dict[Any, Any], column: str) -> str:
    """The path with the cell's text, and with folders that are other cells (or a part of this one), as placeholders."""
    value = str(row[column])
    before, _, after = path.rpartition(value)
    parts = []
    for part in before.split("/"):
        named = [str(name) for name, cell in row.items() if str(cell) == part and name != column and part]
        piece = next((f"{{{column}[:{n}]}}" for n in (1, 2, 3) if part == value[:n] and len(value) > 4), None)
        parts.append(f"{{{named[0]}}}" if named else piece or part)
    return "/".join(parts) + f"{{{column}}}" + after


def from_paths(found: Found, index: Index, sample: pd.DataFrame) -> None:
    """No table of training rows: the label stands in the folder or in the file's name."""
    train = [path for path in index.some if "train" in path.lower().split("/")[0]]
    if not train:
        raise Refused(
            "data/raw: no table of training rows and no folder or archive called train; write configs/competition.yaml by hand"
        )
    path = train[0]
    folder, _, name = path.rpartition("/")
    stem, _, suffix = name.rpartition(".")
    folders = {p.rpartition("/")[0] for p in train}
    if len(folders) > 1:
        top = folder.rpartition("/")[0]
        found.say(
            "train.files",
            f"{top}/{{label}}/{{id}}.{suffix}",
            f"no table; {len(folders)} folders look like labels",
        )
    elif parted := re.fullmatch(r"([A-Za-z]+)([._-]?)\d+", stem):
        found.say(
            "train.files",
            f"{folder}/{{label:[A-Za-z]+}}{parted[2]}{{number}}.{suffix}",
            "no table; the label begins the file's name",
        )
    else:
        raise Refused(
            f"data/raw: {path}: no table, and no label in its path; write configs/competition.yaml by hand"
        )
