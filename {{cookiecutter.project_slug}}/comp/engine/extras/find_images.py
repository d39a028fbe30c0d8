"""For comp inspect: the path template of images, from a column of a table or from folders; and images that
represent the download."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from comp.engine.data import raw_tables, tables
from comp.engine.errors import UserError
from comp.engine.extras.find_tables import BY_HAND, Guesses
from comp.engine.readers import layouts

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = {"train": 48, "test": 24}
SAMPLED_ROWS = 60  # of a table, to find the column that names images


# --- the path template --------------------------------------------------------------------------------------


class PathIndex:
    """Image paths by file name and by stem."""

    def __init__(self, images: list[str]):
        self.by_name: dict[str, list[str]] = {}
        for path in images:
            name = path.rpartition("/")[2]
            for key in {name, name.rpartition(".")[0]}:
                self.by_name.setdefault(key, []).append(path)
        self.paths = images

    def find(self, value: str, kind: str) -> list[str]:
        """Paths that the cell of a table may mean: those not in a folder of the other kind (train, test),
        images before DICOM."""
        matches = [
            path
            for path in self.by_name.get(value.rpartition("/")[2], [])
            if path.endswith(value) or f"{value}." in path
        ]
        other = "test" if kind == "train" else "train"
        own = [
            path for path in matches if not any(other in part for part in path.lower().split("/")[:-1])
        ] or matches
        return sorted(own, key=lambda path: (path.endswith((".dcm", ".npy")), len(path), path))


def image_template(guesses: Guesses, kind: str, frame: pd.DataFrame, index: PathIndex, table: str) -> None:
    """Sets train.image or test.image to the pattern that fits most rows."""
    if table.endswith(".bson"):
        guesses.set(f"{kind}.image", f"{table}/{{_id}}/*", "images are inside the records")
        return
    rows = frame.head(SAMPLED_ROWS)
    best: tuple[tuple[int, int], str, Counter[str]] = ((0, 0), "", Counter())
    for column in map(str, frame.columns):
        if rows[column].nunique() <= len(rows) * 0.5:
            continue
        found = [(row, index.find(str(row[column]), kind)) for row in rows.to_dict("records")]
        templates = Counter(_template(matches[0], row, column) for row, matches in found if matches)
        count = templates.most_common(1)[0][1] if templates else 0
        # Of columns with equal counts the one with longer cells, which determine more of the path.
        rank = count, int(rows[column].astype(str).str.len().sum())
        best = max(best, (rank, column, templates), key=lambda candidate: candidate[0])
    (count, _), _, templates = best
    if not count:
        guesses.set(f"{kind}.image", f"{kind}/{{id}}.jpg", "GUESSED: no column names a file")
        guesses.ambiguous.append(f"{kind}.image: no column of {table} names a file")
        return
    template = templates.most_common(1)[0][0]
    guesses.set(f"{kind}.image", template, f"such a file exists for {count} of the first {len(rows)} rows")
    if count < len(rows):
        guesses.ambiguous.append(f"{kind}.image: {template} exists for {count} of the first {len(rows)} rows")


def _template(path: str, row: dict[Any, Any], column: str) -> str:
    """The path with the cell's text, and with folders that are other cells (or a prefix of this one), as
    placeholders."""
    value = str(row[column])
    before, _, after = path.rpartition(value)
    parts = []
    for part in before.split("/"):
        named = [str(name) for name, cell in row.items() if str(cell) == part and name != column and part]
        prefix = next(
            (f"{{{column}[:{n}]}}" for n in (1, 2, 3) if part == value[:n] and len(value) > 4), None
        )
        parts.append(f"{{{named[0]}}}" if named else prefix or part)
    return "/".join(parts) + f"{{{column}}}" + after


def labels_from_paths(guesses: Guesses, index: PathIndex) -> None:
    """Sets train.files where there is no training table: the label is the folder or the start of the file
    name."""
    train = [path for path in index.paths if "train" in path.lower().split("/")[0]]
    if not train:
        raise UserError(
            "train-table-missing",
            where="data/raw",
            what="no table of training rows and no folder or archive called train",
            remedy=BY_HAND,
        )
    path = train[0]
    folder, _, name = path.rpartition("/")
    stem, _, suffix = name.rpartition(".")
    folders = {p.rpartition("/")[0] for p in train}
    if len(folders) > 1:
        top = folder.rpartition("/")[0]
        reason = f"no table; {len(folders)} folders look like labels"
        guesses.set("train.files", f"{top}/{{label}}/{{id}}.{suffix}", reason)
    elif parts := re.fullmatch(r"([A-Za-z]+)([._-]?)\d+", stem):
        pattern = f"{folder}/{{label:[A-Za-z]+}}{parts[2]}{{number}}.{suffix}"
        guesses.set("train.files", pattern, "no table; file names start with the label")
    else:
        raise UserError(
            "train-table-missing",
            where=f"data/raw/{path}",
            what="no table, and no label in its path",
            remedy=BY_HAND,
        )


# --- images that represent the download ---------------------------------------------------------------------


class Examples(NamedTuple):
    paths: list[str]
    captions: list[str]  # labels of training images


def examples(guesses: Guesses, raw: Path, kind: str, frame: pd.DataFrame) -> Examples:
    """A few images of every class of train with their labels, or some of test."""
    target = guesses.values["target"]
    labels = _labels(frame, target if isinstance(target, list) else [target]) if kind == "train" else None
    count = min(EXAMPLES[kind], len(frame))
    if labels is None or labels.nunique() > EXAMPLES[kind]:  # numbers, or more classes than places: evenly
        order = np.arange(len(frame)) if labels is None else np.argsort(labels.to_numpy(), kind="stable")
        rows = order[np.linspace(0, len(frame) - 1, count).round().astype(int)]
    else:  # the first of each class, then the second of each …; printed class by class
        turn = labels.groupby(labels).cumcount().to_numpy()
        rows = np.lexsort((labels.to_numpy(), turn))[:count]
        rows = rows[np.argsort(labels.to_numpy()[rows], kind="stable")]
    some = frame.iloc[rows].reset_index(drop=True)
    pairs = zip(_paths(guesses, raw, kind, some), rows.tolist(), strict=True)
    found = [(path, row) for path, row in pairs if path]
    if labels is None:
        return Examples([path for path, _ in found], [kind] * len(found))
    captions = [
        labels.iloc[row] if isinstance(labels.iloc[row], str) else f"{labels.iloc[row]:g}" for _, row in found
    ]
    return Examples([path for path, _ in found], captions)


def _labels(frame: pd.DataFrame, names: list[str]) -> pd.Series:
    """One text per row, or numbers where there are too many of them to be classes."""
    import pandas as pd

    if len(names) > 1:
        values = frame[names].astype(float)
        return values.apply(
            lambda row: " ".join(name for name, cell in row.items() if cell > 0.5) or "-", axis=1
        )
    text = frame[names[0]].fillna("-").astype(str)
    numbers = pd.to_numeric(text, errors="coerce")
    return numbers if numbers.notna().all() and numbers.nunique() > EXAMPLES["train"] else text


def _paths(guesses: Guesses, raw: Path, kind: str, some: pd.DataFrame) -> list[str]:
    """One path per row; empty where it is unknown."""
    if layouts.FILE_COLUMN in some:
        return some[layouts.FILE_COLUMN].tolist()
    template = guesses.values[f"{kind}.image"]
    try:
        found = raw_tables.expand_template(tables.RawTable(raw, some), template)
    except (UserError, KeyError):  # a guessed template that names no column; listed as ambiguous already
        return [""] * len(some)
    globs = layouts.Globs(raw)
    return [next(iter(globs.matches(path)), "") if "*" in path else path for path in found]
