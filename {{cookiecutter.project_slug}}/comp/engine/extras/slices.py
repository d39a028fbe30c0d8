"""comp slices: where a run or an ensemble is wrong, by class, by group and by every column of metadata, each slice with n and interval.

Intervals are of each slice alone: Wilson's for a share of right rows, else a bootstrap. Whether a slice differs from the other rows
is a test: Fisher's for a share, else against random rows, as many. Its p-values are corrected by Holm for how many slices there
are, so that on data without any difference no slice is reported in 9 of 10 cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp import metrics
from comp.engine import text_table
from comp.engine.bank import bank, nested_cv, score
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Positions, Samples, aggregate_rows
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Array, Head
from comp.metrics import Metric

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 20  # rows of a slice; fewer say nothing
VALUES = 20  # of a column, the most frequent; the rest is one slice
PARTS = 4  # of a column of numbers: quarters
GROUPS = 5  # in a slice, from which on groups are what is drawn; of fewer the rows
DRAWS = 400
LEVEL = 0.9  # of an interval
ALPHA = 0.1  # that any slice is reported where none differs
BEYOND = 20  # random draws that differ as much, after which a test ends: the slice is ordinary
COLUMNS = ("slice", "metric", "n", "score", "low", "high", "all", "p", "against all")


def slices(name: str) -> pd.DataFrame:
    import pandas as pd

    cfg = resolve.load(paths.root(), "base").config
    rows = samples.load()
    split = folds.load(rows)
    lines = [line for head in rows.heads for line in _of(cfg, rows, split, name, head)]
    frame = pd.DataFrame(lines)
    if not len(frame):
        raise Refused(
            "configs/competition.yaml: no classes, no group and no metadata, or none with 20 rows of a value: there is nothing to slice by"
        )
    file = bank.folder(name) / "slices.csv"
    artifacts.write_text(file, frame.to_csv(index=False))
    for head, mine in frame.groupby("head", sort=False):
        print(f"{head}: the worst slices first; low to high is the {LEVEL:.0%} interval of each alone")
        cells = [[_cell(line[column]) for column in COLUMNS] for _, line in mine.head(30).iterrows()]
        print(text_table.render(COLUMNS, cells, COLUMNS[2:8]))
        found = mine[mine["against all"] != ""]
        print(
            f"{len(found)} of {len(mine)} slices differ from the other rows; p is corrected for {len(mine)} comparisons (Holm), at most {ALPHA:g} is reported"
        )
    print(f"written: {paths.relative(file)}\nnext: comp label-errors {name}")
    return frame


@dataclass(frozen=True)
class Scored:
    """What slices are scored by: a metric, with what it takes of all rows."""

    metric: Metric
    truth: NDArray[Any]
    answer: NDArray[Any]
    frame: pd.DataFrame
    groups: NDArray[np.int64] | None  # rows of a group err together

    def of(self, at: Positions) -> float:
        return self.metric(self.truth[at], self.answer[at], self.frame.iloc[at])

    @cached_property
    def whole(self) -> float:
        return self.metric(self.truth, self.answer, self.frame)

    @cached_property
    def right(self) -> Array | None:
        """0 or 1 of every row, where the score is a share of right rows."""
        if self.metric.kind != "row" or self.metric.name.partition("@")[0] != "accuracy":
            return None
        values: Array = self.metric.function(*self.metric.validate(self.truth, self.answer))
        return values

    def units(self, at: Positions) -> NDArray[np.int64] | None:
        """Groups, unless the slice has next to none, as one that is itself a group."""
        return None if self.groups is None or len(np.unique(self.groups[at])) < GROUPS else self.groups


def _of(cfg: Config, rows: Samples, split: Folds, name: str, head: Head) -> list[dict[str, Any]]:
    """One line a slice, the worst first."""
    said = bank.load(name, "oof", rows, split)
    assert said.fold is not None
    kept = said.predicted
    here = score.scored_rows(rows, said.row[kept].astype(np.int64), said.fold[kept].astype(np.int64))
    ask = score.metric_input(cfg, head, said.probability(head)[kept], rows, split, here)
    groups = score.groups_of(rows, here.rows)
    groups = None if groups is None else nested_cv.group_codes(groups)
    own = Scored(ask.metric, ask.truth, ask.prediction, ask.frame, groups)
    probability = aggregate_rows(here.keys, said.probability(head)[kept], here.order, cfg.competition.merge)
    parts = [
        *_by_class(own, head, probability),
        *((label, mine, own) for label, mine in _slices(rows, here.rows)),
    ]
    lines = []
    for label, mine, scored in (each for each in parts if len(each[1]) >= FEWEST):
        line: dict[str, Any] = {
            "head": head.name,
            "metric": scored.metric.name,
            "slice": label,
            "n": len(mine),
        }
        try:
            value, (low, high) = scored.of(mine), _interval(scored, mine)
            p = _by_draws(scored, mine, len(parts)) if scored.right is None else _fisher(scored, mine)
        except MetricUndefined:  # one class only: the slice is told with its n, and without a score
            value, low, high, p = np.nan, np.nan, np.nan, 1.0
        gain = scored.metric.sign * (value - scored.whole)
        lines.append(
            line | {"score": value, "low": low, "high": high, "all": scored.whole, "gain": gain, "p": p}
        )
    lines.sort(key=lambda line: (np.isnan(line["gain"]), line["gain"]))
    for line, p in zip(lines, nested_cv.holm(np.array([line["p"] for line in lines])), strict=True):
        says = "better" if line.pop("gain") > 0 else "worse"
        line |= {"p": float(p), "against all": says if p <= ALPHA else ""}
    return lines


# --- what is cut out -----------------------------------------------------------------------------------------------------


def _by_class(own: Scored, head: Head, probability: Array) -> Iterator[tuple[str, Positions, Scored]]:
    """Rows of each class; of labels, those that have it. By the metric where it is a mean over rows, else by the share of them
    that is right: most metrics have no value where all rows are of one class, or another meaning."""
    import pandas as pd

    if head.spec.space == "value" and not head.classes:
        return
    scored, single = own, own.truth.ndim == 1
    if own.metric.kind != "row":
        accuracy = metrics.METRICS["accuracy"]
        label = (
            own.answer
            if own.metric.needs == "label"
            else score.default_predictions(accuracy, head, probability)
        )
        truth = own.truth.argmax(axis=1) if head.exclusive and not single else own.truth
        truth = np.where(np.isnan(truth), label, truth)  # a label that nobody gave
        scored = Scored(accuracy, truth, label, own.frame, own.groups)
    if single or head.exclusive:
        codes = own.truth if single else own.truth.argmax(axis=1)
        names = np.array(head.classes or head.outputs, object)[codes.astype(np.int64)]
        parts = _by_value(head.name, pd.Series(names))
    else:
        names_ = [head.outputs[i] for i in head.scored_indices]
        parts = (
            (f"{head.name} {each}", np.flatnonzero(own.truth[:, i] > 0)) for i, each in enumerate(names_)
        )
    yield from ((label, mine, scored) for label, mine in parts)


def _slices(rows: Samples, at: Positions) -> Iterator[tuple[str, Positions]]:
    """(name, places in `at`) by group and metadata."""
    for column in rows.frame:
        if column == "group" or str(column).startswith("meta."):
            yield from _by_value(str(column).removeprefix("meta."), rows.frame[column].iloc[at])


def _by_value(name: str, values: pd.Series) -> Iterator[tuple[str, Positions]]:
    """Values of a column of words, quarters of one of numbers, and where it is missing."""
    import pandas as pd

    missing = values.isna().to_numpy()
    if missing.any():
        yield f"{name} missing", np.flatnonzero(missing)
    if pd.api.types.is_numeric_dtype(values) and values.nunique() > PARTS:
        edges = np.unique(np.nanquantile(values.to_numpy(np.float64), np.linspace(0, 1, PARTS + 1)))
        for low, high in pairwise(edges):
            inside = (values >= low) & ((values <= high) if high == edges[-1] else (values < high))
            yield f"{name} {low:g} to {high:g}", np.flatnonzero(inside.to_numpy())
        return
    counts = values.value_counts()
    for value in counts.index[:VALUES]:
        yield f"{name} {_cell(value)}", np.flatnonzero((values == value).to_numpy())
    if len(counts) > VALUES:
        rest = ~values.isin(counts.index[:VALUES]).to_numpy() & ~missing
        yield f"{name}, {len(counts) - VALUES} more", np.flatnonzero(rest)


# --- what a slice is worth -----------------------------------------------------------------------------------------------


def _interval(scored: Scored, mine: Positions) -> tuple[float, float]:
    if scored.right is not None:
        rows = len(mine) / _design_effect(scored, mine)
        return nested_cv.wilson(float(scored.right[mine].mean()) * rows, rows, LEVEL)
    units = scored.units(mine)
    found = nested_cv.bootstrap(
        scored.metric, scored.truth[mine], scored.answer[mine], None if units is None else units[mine], DRAWS,
        rows=scored.frame.iloc[mine], level=LEVEL,
    )  # fmt: skip
    return found.low, found.high


def _fisher(scored: Scored, mine: Positions) -> float:
    """p-value of as many right rows in the slice, were it drawn from all rows by chance."""
    from scipy.stats import fisher_exact

    assert scored.right is not None
    inside = np.zeros(len(scored.right), bool)
    inside[mine] = True
    table_ = [[(scored.right[part] == value).sum() for value in (1, 0)] for part in (inside, ~inside)]
    return float(fisher_exact(np.rint(np.array(table_) / _design_effect(scored, mine)).astype(np.int64))[1])


def _design_effect(scored: Scored, mine: Positions) -> float:
    """How many rows of groups are worth one that is drawn alone (Kish), 1 at least: from what is left of right and wrong
    beside the difference that is asked about."""
    units = scored.units(mine)
    if units is None or scored.right is None:
        return 1.0
    inside = np.zeros(len(units), bool)
    inside[mine] = True
    rest = scored.right.copy()
    for part in (inside, ~inside):
        rest[part] -= rest[part].mean() if part.any() else 0.0
    alone, count = float((rest**2).sum()), len(np.unique(units))
    together = float((np.bincount(units, rest) ** 2).sum()) * count / (count - 1)
    return max(1.0, together / alone) if alone > 0 else 1.0


def _by_draws(scored: Scored, mine: Positions, looks: int) -> float:
    """p-value of the slice among random rows, as many, or random groups where it is made of whole ones. It ends where it is
    clear that the slice is ordinary (Besag and Clifford 1991)."""
    units, random = scored.units(mine), np.random.default_rng(0)
    if units is not None and np.isin(units, units[mine]).sum() > len(mine):
        units = None  # the slice cuts through groups
    far, beyond, drawn = abs(scored.of(mine) - scored.whole), 0, 0
    for _ in range(int(np.ceil(5 * looks / ALPHA))):  # enough for a p-value that survives so many looks
        if units is None:
            at = random.choice(len(scored.truth), len(mine), replace=False)
        else:
            sizes = np.bincount(units)
            order = random.permutation(len(sizes))
            count = int(np.abs(np.cumsum(sizes[order]) - len(mine)).argmin()) + 1
            at = np.flatnonzero(np.isin(units, order[:count]))
        try:
            beyond += abs(scored.of(at) - scored.whole) >= far - 1e-12
        except MetricUndefined:
            continue
        drawn += 1
        if beyond == BEYOND:
            return beyond / drawn
    return (beyond + 1) / (drawn + 1)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.4f}" if value % 1 else f"{value:g}"
    return str(value)
