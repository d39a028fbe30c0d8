"""comp slices: where a run or an ensemble is wrong, by group and by every column of metadata, each slice with its n and interval.

Many slices are looked at, so some stand out by luck alone: the interval of each is widened for how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp import bank, by_row, config, folds, honest, samples, score, store, table
from comp.config import Config, Refused
from comp.folds import Folds
from comp.metrics import MetricUndefined
from comp.samples import Positions, Samples
from comp.tasks import Head

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 20  # rows of a slice; fewer say nothing
VALUES = 20  # of a column, the most frequent; the rest is one slice
PARTS = 4  # of a column of numbers: quarters
DRAWS = 400
LEVEL = 0.9  # of all intervals together
COLUMNS = ("slice", "n", "score", "low", "high", "against all")


def slices(name: str) -> pd.DataFrame:
    import pandas as pd

    cfg = config.load(store.root(), "base").config
    rows = samples.load()
    split = folds.load(rows)
    lines = [line for head in rows.heads for line in _of(cfg, rows, split, name, head)]
    frame = pd.DataFrame(lines)
    if not len(frame):
        raise Refused(
            "configs/competition.yaml: no group and no metadata, or none with 20 rows of a value: there is nothing to slice by"
        )
    file = bank.folder(name) / "slices.csv"
    store.write_text(file, frame.to_csv(index=False))
    for head, mine in frame.groupby("head", sort=False):
        whole = mine["all"].iloc[0]
        print(f"{head}: {mine['metric'].iloc[0]} {whole:.4f} over all rows; the worst slices first")
        cells = [[_cell(line[column]) for column in COLUMNS] for _, line in mine.head(30).iterrows()]
        print(table.text(COLUMNS, cells, COLUMNS[1:5]))
    told = frame[frame["against all"] != ""]
    print(f"{len(told)} of {len(frame)} slices differ from the whole by more than {len(frame)} looks explain")
    print(f"written: {store.shown(file)}\nnext: comp contradicted {name}")
    return frame


def _of(cfg: Config, rows: Samples, split: Folds, name: str, head: Head) -> list[dict[str, Any]]:
    """One line a slice, the worst first."""
    metric = score.metric_of(cfg, head)
    said = bank.load(name, "oof", rows, split)
    assert said.fold is not None
    kept = said.predicted
    at, fold = said.row[kept].astype(np.int64), said.fold[kept].astype(np.int64)
    keys = rows.frame["row"].to_numpy()[at]
    order = by_row.first(keys)
    place = {key: i for i, key in reversed(list(enumerate(keys.tolist())))}
    first = np.array(
        [place[key] for key in order], np.int64
    )  # of several samples of a row the first speaks for all
    probability = by_row.merged(keys, said.probability(head)[kept], order, cfg.competition.merge)
    at, fold = at[first], fold[first]
    answers, _ = score.answers(metric, head, probability, rows, split, at, fold)
    truth, frame = score.graded_only(head, rows.truth(head, at)), score.scored(rows, at)
    whole = metric(truth, answers, frame)
    group = rows.frame["group"].to_numpy(object)[at] if "group" in rows.frame else None
    known = [(label, mine) for label, mine in _slices(rows, at) if len(mine) >= FEWEST]
    level = 1 - (1 - LEVEL) / max(len(known), 1)
    lines = []
    for label, mine in known:
        # Rows of a group err together; inside a single group there is nothing but rows to draw.
        units = None if group is None or len(set(group[mine].tolist())) < 5 else group[mine]
        line: dict[str, Any] = {
            "head": head.name,
            "metric": metric.name,
            "all": whole,
            "slice": label,
            "n": len(mine),
        }
        try:
            found = honest.bootstrap(
                metric, truth[mine], answers[mine], units, DRAWS, rows=frame.iloc[mine], level=level
            )
            line |= {"score": found.score, "low": found.low, "high": found.high}
        except MetricUndefined:  # one class only: the slice is told with its n, and without a score
            line |= {"score": np.nan, "low": np.nan, "high": np.nan}
        worse = line["high"] < whole if metric.sign > 0 else line["low"] > whole
        better = line["low"] > whole if metric.sign > 0 else line["high"] < whole
        lines.append(line | {"against all": "worse" if worse else "better" if better else ""})
    return sorted(lines, key=lambda line: (np.isnan(line["score"]), metric.sign * line["score"]))


def _slices(rows: Samples, at: Positions) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """(name, places in `at`): values of a column of words, quarters of one of numbers, and where it is missing."""
    import pandas as pd

    for column in rows.frame:
        if column != "group" and not str(column).startswith("meta."):
            continue
        values, name = rows.frame[column].iloc[at], str(column).removeprefix("meta.")
        missing = values.isna().to_numpy()
        if missing.any():
            yield f"{name} missing", np.flatnonzero(missing)
        if pd.api.types.is_numeric_dtype(values) and values.nunique() > PARTS:
            edges = np.unique(np.nanquantile(values.to_numpy(np.float64), np.linspace(0, 1, PARTS + 1)))
            for low, high in pairwise(edges):
                inside = (values >= low) & ((values <= high) if high == edges[-1] else (values < high))
                yield f"{name} {low:g} to {high:g}", np.flatnonzero(inside.to_numpy())
            continue
        counts = values.value_counts()
        for value in counts.index[:VALUES]:
            yield f"{name} {_cell(value)}", np.flatnonzero((values == value).to_numpy())
        if len(counts) > VALUES:
            rest = ~values.isin(counts.index[:VALUES]).to_numpy() & ~missing
            yield f"{name}, {len(counts) - VALUES} more", np.flatnonzero(rest)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.4f}" if value % 1 else f"{value:g}"
    return str(value)
