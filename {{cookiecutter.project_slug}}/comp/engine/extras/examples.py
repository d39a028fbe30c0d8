"""Pictures that stand for a whole download: a few of every class, with what the table says of them. For comp inspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from comp.engine.data import raw_tables, tables
from comp.engine.errors import UserError
from comp.engine.extras.find_tables import Found
from comp.engine.readers import layouts

if TYPE_CHECKING:
    import pandas as pd

COUNT = {"train": 48, "test": 24}


def choose(found: Found, raw: Path, kind: str, frame: pd.DataFrame) -> None:
    """Paths of pictures into found.images, and for training rows their labels."""
    target = found.says["target"]
    labels = _labels(frame, target if isinstance(target, list) else [target]) if kind == "train" else None
    count = min(COUNT[kind], len(frame))
    if labels is None or labels.nunique() > COUNT[kind]:  # numbers, or more classes than places
        order = np.arange(len(frame)) if labels is None else np.argsort(labels.to_numpy(), kind="stable")
        rows = order[np.linspace(0, len(frame) - 1, count).round().astype(int)]
    else:  # the first of each class, then the second of each, and then side by side
        turn = labels.groupby(labels).cumcount().to_numpy()
        rows = np.lexsort((labels.to_numpy(), turn))[:count]
        rows = rows[np.argsort(labels.to_numpy()[rows], kind="stable")]
    some = frame.iloc[rows].reset_index(drop=True)
    pairs = zip(_paths(found, raw, kind, some), rows.tolist(), strict=True)
    shown = [(path, row) for path, row in pairs if path]
    found.images[kind] = [path for path, _ in shown]
    if labels is not None:
        found.captions = [
            labels.iloc[row] if isinstance(labels.iloc[row], str) else f"{labels.iloc[row]:g}"
            for _, row in shown
        ]


def _labels(frame: pd.DataFrame, names: list[str]) -> pd.Series:
    """One text a row, or numbers where there are too many of them to be classes."""
    import pandas as pd

    if len(names) > 1:
        values = frame[names].astype(float)
        return values.apply(
            lambda row: " ".join(name for name, cell in row.items() if cell > 0.5) or "-", axis=1
        )
    text = frame[names[0]].fillna("-").astype(str)
    numbers = pd.to_numeric(text, errors="coerce")
    return numbers if numbers.notna().all() and numbers.nunique() > COUNT["train"] else text


def _paths(found: Found, raw: Path, kind: str, some: pd.DataFrame) -> list[str]:
    if layouts.FILE_COLUMN in some:
        return some[layouts.FILE_COLUMN].tolist()
    template = found.says[f"{kind}.image"]
    try:
        paths = raw_tables.expand_template(tables.RawTable(raw, some), template)
    except (UserError, KeyError):  # a guess that names no column; said already
        return [""] * len(some)
    globs = layouts.Globs(raw)
    return [next(iter(globs.matches(path)), "") if "*" in path else path for path in paths]
