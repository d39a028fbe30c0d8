"""For comp inspect: which file of a download is the sample submission, the training table and the test
table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comp.engine.data import raw_tables
from comp.engine.data.sample_submission import index_columns, read_sample
from comp.engine.errors import UserError
from comp.engine.readers import containers, layouts
from comp.engine.store import paths

if TYPE_CHECKING:
    import pandas as pd

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".bson")
IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".dcm", ".dicom", ".npy", ".npz")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".bson")
MAX_FILES, MAX_TABLES = 500_000, 40  # beyond, the rest is ignored
BY_HAND = "write configs/competition.yaml by hand"


@dataclass
class Guesses:
    """The proposed competition.yaml, with a reason for each value."""

    values: dict[str, Any] = field(default_factory=dict)  # dotted key -> value
    reasons: dict[str, str] = field(default_factory=dict)
    ambiguous: list[str] = field(default_factory=list)  # lines for the user to check
    label_counts: Counter[str] = field(default_factory=Counter)
    value_range: str = ""  # of a regression target

    def set(self, key: str, value: Any, reason: str) -> None:
        self.values[key] = value
        self.reasons[key] = reason


def files(raw: Path) -> tuple[list[str], list[str]]:
    """Tables and images below `raw`, members of archives included."""
    tables, images, archives = [], [], []
    for count, name in enumerate(layouts.list_files(raw, "")):
        if count > MAX_FILES:
            break
        suffix = os.path.splitext(name)[1].lower()
        if suffix in TABLES:
            tables.append(name)
        if suffix in IMAGES:
            images.append(name)
        elif suffix in ARCHIVES:
            archives.append(name)
    for name in archives:
        if containers.is_container(raw / name):
            members = [f"{name}/{member}" for member in containers.members(raw / name)]
            # An archive next to its unpacked folder would list every image twice.
            unpacked = {os.path.basename(path) for path in images}
            images += [
                path
                for path in members
                if os.path.basename(path) not in unpacked and path.lower().endswith(IMAGES)
            ]
            tables += [path for path in members if path.lower().endswith((".csv", ".json"))]
    return sorted(tables), images


def sample_submission(raw: Path, tables: list[str]) -> tuple[str, pd.DataFrame]:
    """Its name, and its id column and prediction columns."""
    named = [name for name in tables if "sample" in name.lower() or "submission" in name.lower()]
    if not named:
        raise UserError(
            "sample-missing",
            where=paths.relative(raw),
            what="no table with `sample` or `submission` in its name",
            remedy=BY_HAND,
        )
    best = min(named, key=lambda name: ("sample" not in name.lower(), name.count("/"), len(name)))
    host, frame = read_sample(raw / best), raw_tables.read(raw / best).frame
    key = host.columns[host.id_position]
    return best, frame[[key, *host.prediction_columns]].drop_duplicates(key, ignore_index=True)


def read_tables(raw: Path, tables: list[str], guesses: Guesses) -> Iterator[tuple[str, pd.DataFrame]]:
    """(name, table without index columns). Unreadable ones are noted as ambiguous."""
    for name in tables[:MAX_TABLES]:
        try:
            frame = raw_tables.read(raw / name).frame
            yield name, frame.drop(columns=index_columns(list(map(str, frame.columns))))
        except UserError as error:
            guesses.ambiguous.append(f"{name} was ignored: {error.lines[0]}")


def choose_table(kind: str, frames: dict[str, pd.DataFrame], sample: pd.DataFrame) -> str | None:
    """The table of train or test rows: by its name, then by columns of the sample submission in it, then by
    its length."""
    other = "test" if kind == "train" else "train"
    columns = {str(column) for column in sample.columns}

    def rank(name: str) -> tuple[int, int, int, int]:
        frame, lower = frames[name], name.lower()
        named = int(kind in lower) + int(
            kind == "train" and ("label" in lower or "annotations.json" in lower)
        )
        shared = len(columns & set(map(str, frame.columns)))
        return int(named > 0), min(shared, 2), -lower.count("example"), len(frame)

    candidates = [
        name
        for name, frame in frames.items()
        if other not in os.path.basename(name).lower() and other not in name.lower().split("/")
    ]
    if kind == "test":
        candidates = [name for name in candidates if "test" in name.lower()]
    else:  # a short table may be a list of class names
        candidates = [
            name
            for name in candidates
            if len(frames[name]) > 20
            and ("train" in name.lower() or len(columns & set(map(str, frames[name].columns))))
        ]
    return max(candidates, key=rank) if candidates else None
