"""data/raw -> data/samples.parquet, as configs/competition.yaml declares it.

Two kinds of mistake: a declaration that does not fit the tables stops at once (Refused); rows that are wrong are collected,
so that one run of `comp check` shows them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comp import samples, store
from comp.config import Config, Refused, nearest
from comp.knobs import Competition
from comp.prepare import sources
from comp.prepare.sources import Rows
from comp.tasks import Head

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 20  # faults on the screen; the rest is a count


@dataclass(frozen=True)
class Reading:
    frame: pd.DataFrame  # as it will stand in data/samples.parquet
    heads: tuple[Head, ...]
    faults: list[str]  # one line a wrong row
    where: Callable[[int], str]  # file and line of a row


def prepare(cfg: Config) -> Path:
    """The same raw files give the same bytes, however often it is killed and run again."""
    before = store.sha256(store.samples_file()) if store.samples_file().is_file() else None
    reading = read(cfg.competition)
    if reading.faults:
        more = len(reading.faults) - SHOWN
        raise Refused(*reading.faults[:SHOWN], *([f"and {more} more: comp check"] if more > 0 else []))
    sample = store.path(cfg.competition.raw, cfg.competition.submission.sample)
    file = samples.save(reading.frame, reading.heads, sample=store.sha256(sample) if sample.is_file() else "")
    counts = reading.frame["source"].value_counts(sort=False)
    print(
        f"{store.shown(file)}: "
        + ", ".join(f"{count} {source}" for source, count in counts.items())
        + " rows"
    )
    for head in reading.heads:
        classes = f", {len(head.classes)} classes {_listed(head.classes)}" if head.classes else ""
        print(f"  {head.name}: {head.task}{classes}, from {_listed(head.columns)}")
    extra = [c for c in sources.columns(reading.frame) if c in ("group", "time") or c.startswith("meta.")]
    if extra:
        print(f"  also {_listed(extra)}")
    if store.folds_file().is_file() and before not in (None, store.sha256(file)):
        print(
            f"{store.shown(store.folds_file())} was made for the table as it was before; comp folds says what to do"
        )
    print("next: comp check, then comp folds")
    return file


def read(competition: Competition) -> Reading:
    """The samples table, not yet written, and what is wrong with its rows."""
    import pandas as pd

    _refuse_features(competition)
    rows = sources.load(competition)
    frame, faults = _identified(rows)
    known = (frame["source"] != "test").to_numpy()
    if competition.group:
        frame["group"] = rows.columns[competition.group]
        faults += _missing(rows, frame["group"].isna().to_numpy() & known, competition.group)
    if competition.time:
        frame["time"], wrong = _times(rows, competition.time, known)
        faults += wrong
    heads, targets, wrong = _targets(rows, competition, np.flatnonzero(known))
    faults += wrong
    for name, values in targets.items():
        column = np.full(len(frame), np.nan)
        column[known] = values
        frame[f"target.{name}"] = column
    for name in competition.metadata:
        if name not in rows.has["test"]:
            raise Refused(
                f"configs/competition.yaml: metadata: {name!r} stands in the training table only; "
                "a column that the test rows lack cannot become a feature"
            )
        frame[f"meta.{name}"] = _feature(rows.columns[name])
    assert isinstance(frame, pd.DataFrame)
    return Reading(frame, heads, faults, rows.where)


def _refuse_features(competition: Competition) -> None:
    told = [name for name in competition.metadata if name in competition.target]
    if told:
        raise Refused(
            f"configs/competition.yaml: metadata: {told[0]!r} is the target; it cannot be a feature"
        )


def _identified(rows: Rows) -> tuple[pd.DataFrame, list[str]]:
    """Unique ids. Test rows that are numbered like training rows get a prefix; the key that the host scores stays."""
    frame = rows.samples.copy()
    faults = _missing(rows, frame["id"].isna().to_numpy(), "the id")
    test = frame["source"] == "test"
    if set(frame["id"][test].dropna()) & set(frame["id"][~test].dropna()):
        frame.loc[test, "id"] = "test:" + frame["id"][test]
    again = frame["id"].duplicated() & frame["id"].notna()
    first = {id_: position for position, id_ in reversed(list(enumerate(frame["id"])))} if again.any() else {}
    for position in np.flatnonzero(again).tolist():
        id_ = frame["id"].iloc[position]
        faults.append(
            f"{rows.where(position)}: the id {id_!r} stands there again, first in {rows.where(first[id_])}"
        )
    return frame, faults


def _targets(
    rows: Rows, competition: Competition, known: NDArray
) -> tuple[tuple[Head, ...], dict[str, NDArray], list[str]]:
    """Heads, their columns for the rows that have labels, faults."""
    names, task = competition.target, competition.task
    text = rows.columns.iloc[known]
    if task == "regression":
        numbers = {name: _numbers(text[name]) for name in names}
        head = Head("_".join(names), task, tuple(names), tuple(f"target.{n}" for n in names))
        return (head,), numbers, [f for n in names for f in _not_numbers(rows, known, n, numbers[n])]
    if task == "multiclass" and len(names) > 1:
        return _one_hot(rows, competition, known)
    heads: list[Head] = []
    columns: dict[str, NDArray] = {}
    faults: list[str] = []
    for name in names:
        if task == "binary" and _soft(text[name]):
            columns[name] = _numbers(text[name])
            heads.append(Head(name, task, (name,), (f"target.{name}",)))
            faults += _not_numbers(rows, known, name, columns[name])
            continue
        classes = _classes(rows, competition, name, known)
        code = {label: float(i) for i, label in enumerate(classes)}
        columns[name] = text[name].map(code).to_numpy(np.float64)
        heads.append(
            Head(name, task, classes if task == "multiclass" else (name,), (f"target.{name}",), classes)
        )
        wrong = known[np.isnan(columns[name])]
        close = {
            label: nearest(label, classes)[0] for label in rows.columns[name].iloc[wrong[:SHOWN]].dropna()
        }
        for position in wrong:
            label = rows.columns[name].iloc[position]
            if isinstance(label, str):
                hint = f", the nearest is {close[label]!r}" if label in close else ""
                why = f"{name}: {label!r} is none of the {len(classes)} classes{hint}; competition.classes can name them"
            else:
                why = f"{name}: the label is missing"
            faults.append(f"{rows.where(position)}: {why}")
    return tuple(heads), columns, faults


def _classes(rows: Rows, competition: Competition, name: str, known: NDArray) -> tuple[str, ...]:
    """Their order: as declared, else as the sample's columns, else sorted."""
    labels, task = rows.columns[name].iloc[known].dropna(), competition.task
    numbers = _numbers(labels)
    if competition.classes:
        classes = list(competition.classes)
    elif task == "multiclass" and competition.submission.form == "probabilities":
        classes = sample_columns(competition)
    elif np.isfinite(numbers).all():
        classes = sorted(labels.unique(), key=lambda label: (float(label), label))
    else:
        classes = sorted(labels.unique())
    if task == "ordinal" and not competition.classes and not np.isfinite(numbers).all():
        first = labels.index[~np.isfinite(numbers)][0]
        raise Refused(
            f"{rows.where(first)}: {name} is {labels[first]!r}, no number; competition.classes names the grades, lowest first"
        )
    if task == "binary" and len(classes) > 2:
        rare = labels.value_counts(sort=True).index[-1]
        place = rows.where(labels.index[labels == rare][0])
        raise Refused(
            f"{place}: {name} is {rare!r}, and task: binary wants two classes, not {len(classes)}: {_listed(classes)}"
        )
    if len(set(classes)) < len(classes) or len(classes) < 2:
        raise Refused(
            f"configs/competition.yaml: classes: {name} wants at least two different classes, not {_listed(classes)}"
        )
    return tuple(classes)


def _one_hot(
    rows: Rows, competition: Competition, known: NDArray
) -> tuple[tuple[Head, ...], dict[str, NDArray], list[str]]:
    """One column a class. Rows that are all 0 and one 1 become codes; any other shares that sum to 1 stay as they are."""
    names = list(competition.target)
    classes = competition.classes or names
    if competition.classes is None and competition.submission.form == "probabilities":
        in_sample = sample_columns(competition)
        classes = in_sample if set(in_sample) == set(names) else names
    if set(classes) != set(names) or len(classes) != len(names):
        raise Refused(
            f"configs/competition.yaml: classes: {_listed(classes)} are not the target columns {_listed(names)}"
        )
    text = rows.columns.iloc[known]
    shares = np.column_stack([_numbers(text[name]) for name in classes])  # (rows, classes)
    faults = [f for i, name in enumerate(classes) for f in _not_numbers(rows, known, name, shares[:, i])]
    off = (shares < 0).any(axis=1) | (np.abs(shares.sum(axis=1) - 1) > 1e-3)
    for position, total in zip(known[off], shares[off].sum(axis=1), strict=True):
        faults.append(
            f"{rows.where(position)}: the shares of the {len(classes)} classes sum to {total:g}; a row's sum to 1, none below 0"
        )
    hard = np.isin(shares, (0.0, 1.0)).all(axis=1)
    if hard.all():
        return (
            (Head("class", "multiclass", tuple(classes), ("target.class",), tuple(classes)),),
            {"class": shares.argmax(axis=1)},
            faults,
        )
    columns = tuple(f"target.{name}" for name in classes)
    return (
        (Head("class", "multiclass", tuple(classes), columns, tuple(classes)),),
        dict(zip(classes, shares.T, strict=True)),
        faults,
    )


def sample_columns(competition: Competition) -> list[str]:
    """The columns of the sample submission beside the id, in their order."""
    sample = sources.read(store.path(competition.raw, competition.submission.sample))
    columns = sources.columns(sample.frame)
    return [c for c in columns if c != (competition.id if competition.id in columns else columns[0])]


def _times(rows: Rows, name: str, known: NDArray) -> tuple[NDArray, list[str]]:
    """Numbers as they are; dates as days since 1970, so that `gap` is days."""
    import pandas as pd

    text = rows.columns[name]
    present = text.notna().to_numpy()
    values: NDArray = _numbers(text)
    if not np.isfinite(values[present]).any():
        dates = pd.to_datetime(text, format="ISO8601", utc=True, errors="coerce")
        values = ((dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)).to_numpy(
            np.float64, na_value=np.nan
        )
    faults = _missing(rows, ~present & known, name)
    for position in np.flatnonzero(present & ~np.isfinite(values)).tolist():
        faults.append(
            f"{rows.where(position)}: {name} is {text.iloc[position]!r}; all numbers, or all dates like 2020-01-31"
        )
    return values, faults


def _feature(text: pd.Series) -> pd.Series:
    """A number where every value of train and test is one, text otherwise."""
    import pandas as pd

    numbers = _numbers(text)
    if (np.isfinite(numbers) | text.isna().to_numpy()).all():
        return pd.Series(numbers, index=text.index)
    return text


def _missing(rows: Rows, missing: NDArray, what: str) -> list[str]:
    return [f"{rows.where(position)}: {what} is missing" for position in np.flatnonzero(missing).tolist()]


def _not_numbers(rows: Rows, known: NDArray, name: str, values: NDArray) -> list[str]:
    return [
        f"{rows.where(p)}: {name}: "
        + (f"{label!r} is not a number" if isinstance(label, str) else "the label is missing")
        for p in known[~np.isfinite(values)]
        for label in [rows.columns[name].iloc[p]]
    ]


def _numbers(text: pd.Series) -> NDArray[np.float64]:
    """NaN where the text is none."""
    import pandas as pd

    return pd.to_numeric(text, errors="coerce").to_numpy(np.float64, na_value=np.nan)


def _soft(labels: pd.Series) -> bool:
    """Shares between 0 and 1 rather than two classes."""
    values = np.unique(_numbers(labels.dropna()))
    return bool(len(values) > 2 and values.min() >= 0 and values.max() <= 1)


def _listed(names: Sequence[str]) -> str:
    names = list(names)
    return ", ".join(names if len(names) <= 6 else [*names[:4], "…", names[-1]])
