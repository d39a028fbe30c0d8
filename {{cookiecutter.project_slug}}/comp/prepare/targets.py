"""Target columns into heads and their numbers: one row a kind of target, so that several kinds stand side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comp import store
from comp.config import Refused, nearest
from comp.declared import Competition
from comp.prepare import sources
from comp.prepare.sources import Rows
from comp.tasks import Head

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 20  # faults on the screen; the rest is a count
Found = tuple[tuple[Head, ...], dict[str, NDArray], list[str]]  # heads, column -> values, faults


def read(rows: Rows, competition: Competition, known: NDArray) -> Found:
    """Of the rows that have labels. A list of targets is one task together, a mapping one task each."""
    together = isinstance(competition.target, list)
    heads: list[Head] = []
    columns: dict[str, NDArray] = {}
    faults: list[str] = []
    for name, task in competition.tasks.items():
        names = competition.targets if together else [name]
        if task == "multiclass" and len(names) > 1:
            return _one_hot(rows, competition, known)
        if task == "multilabel" and len(names) > 1:
            return _label_columns(rows, competition, known)
        if task == "regression":
            found = _values(rows, names, known)
        elif task == "multilabel":
            found = _label_strings(rows, competition, name, known)
        else:
            found = _labels(rows, competition, name, task, known)
        heads += found[0]
        columns |= found[1]
        faults += found[2]
        if task == "regression" and together:
            break
    return tuple(heads), columns, faults


def _values(rows: Rows, names: list[str], known: NDArray) -> Found:
    text = rows.columns.iloc[known]
    values = {name: numbers(text[name]) for name in names}
    head = Head("_".join(names), "regression", tuple(names), tuple(f"target.{n}" for n in names))
    return (head,), values, [f for n in names for f in _not_numbers(rows, known, n, values[n])]


def _labels(rows: Rows, competition: Competition, name: str, task: str, known: NDArray) -> Found:
    """One label a row, as the code of its class; a binary one may be a share between 0 and 1."""
    text = rows.columns[name].iloc[known]
    if task == "binary" and _soft(text):
        values = numbers(text)
        return (
            (Head(name, task, (name,), (f"target.{name}",)),),
            {name: values},
            _not_numbers(rows, known, name, values),
        )
    classes = _classes(rows, competition, name, task, known)
    if competition.unknown is not None and competition.unknown not in classes:
        classes = (*classes, competition.unknown)  # no training row may show it
    code = {label: float(i) for i, label in enumerate(classes)}
    values = np.asarray(text.map(code), np.float64)
    outputs = (name,) if task in ("binary", "ordinal") else classes
    wrong = known[np.isnan(values)]
    close = {label: nearest(label, classes)[0] for label in rows.columns[name].iloc[wrong[:SHOWN]].dropna()}
    faults = []
    for position in wrong:
        label = rows.columns[name].iloc[position]
        if isinstance(label, str):
            hint = f", the nearest is {close[label]!r}" if label in close else ""
            why = f"{name}: {label!r} is none of the {len(classes)} classes{hint}; competition.classes can name them"
        else:
            why = f"{name}: the label is missing"
        faults.append(f"{rows.where(position)}: {why}")
    head = Head(name, task, outputs, (f"target.{name}",), classes, unknown=competition.unknown or "")
    return (head,), {name: values}, faults


def _label_strings(rows: Rows, competition: Competition, name: str, known: NDArray) -> Found:
    """`3 17 255`: the labels of a row in one cell. An empty cell is a row without any."""
    text = rows.columns[name].iloc[known].fillna("")
    mark = competition.separator
    lists = [[part.strip() for part in cell.split(mark if mark.strip() else None)] for cell in text]
    none = competition.submission.none
    lists = [[part for part in parts if part and part != none] for parts in lists]
    found = {part for parts in lists for part in parts}
    classes = tuple(competition.classes or _sorted(found))
    if len(classes) < 2:
        raise Refused(
            f"configs/competition.yaml: target: {name} holds {len(classes)} labels parted by {mark!r}; see separator"
        )
    code = {label: i for i, label in enumerate(classes)}
    values = np.zeros((len(lists), len(classes)), np.float32)
    faults = []
    for place, parts in enumerate(lists):
        for part in parts:
            if part in code:
                values[place, code[part]] = 1
            else:
                near = nearest(part, classes)[0]
                faults.append(
                    f"{rows.where(known[place])}: {name}: {part!r} is none of the {len(classes)} classes, the nearest is {near!r}"
                )
    head = Head(name, "multilabel", classes, tuple(f"target.{label}" for label in classes), classes)
    return (head,), dict(zip(classes, values.T, strict=True)), faults


def _label_columns(rows: Rows, competition: Competition, known: NDArray) -> Found:
    """A column of 0 and 1 (or shares) for each label. The sample's columns decide which of them are scored."""
    names = competition.targets
    text = rows.columns.iloc[known]
    values = {name: numbers(text[name]) for name in names}
    faults = [fault for name in names for fault in _not_numbers(rows, known, name, values[name])]
    for name in names:
        for position in known[(values[name] < 0) | (values[name] > 1)]:
            faults.append(
                f"{rows.where(position)}: {name}: {rows.columns[name].iloc[position]!r} is no label, 0 or 1"
            )
    graded: tuple[str, ...] = ()
    if competition.submission.form == "probabilities" and competition.submission.rows is None:
        graded = tuple(name for name in sample_columns(competition) if name in names)
    columns = tuple(f"target.{name}" for name in names)
    return (
        (
            Head(
                "labels",
                "multilabel",
                tuple(names),
                columns,
                tuple(names),
                graded if len(graded) < len(names) else (),
            ),
        ),
        dict(values),
        faults,
    )


def _classes(rows: Rows, competition: Competition, name: str, task: str, known: NDArray) -> tuple[str, ...]:
    """Their order: as declared, else as the sample's columns, else sorted."""
    labels = rows.columns[name].iloc[known].dropna()
    values = numbers(labels)
    if competition.classes and len(competition.targets) == 1:
        classes = list(competition.classes)
    elif (
        task == "multiclass"
        and competition.submission.form == "probabilities"
        and competition.submission.rows is None
    ):
        classes = sample_columns(competition)
    else:
        classes = _sorted(set(labels))
    if task == "ordinal" and not competition.classes and not np.isfinite(values).all():
        first = labels.index[~np.isfinite(values)][0]
        raise Refused(
            f"{rows.where(first)}: {name} is {labels[first]!r}, no number; competition.classes names the grades, lowest first"
        )
    if task == "binary" and len(classes) > 2:
        rare = labels.value_counts(sort=True).index[-1]
        place = rows.where(labels.index[labels == rare][0])
        raise Refused(
            f"{place}: {name} is {rare!r}, and task: binary wants two classes, not {len(classes)}: {listed(classes)}"
        )
    if len(set(classes)) < len(classes) or len(classes) < 2:
        raise Refused(
            f"configs/competition.yaml: classes: {name} wants at least two different classes, not {listed(classes)}"
        )
    return tuple(classes)


def _one_hot(
    rows: Rows, competition: Competition, known: NDArray
) -> tuple[tuple[Head, ...], dict[str, NDArray], list[str]]:
    """One column a class. Rows that are all 0 and one 1 become codes; any other shares that sum to 1 stay as they are."""
    names = competition.targets
    classes = competition.classes or names
    if competition.classes is None and competition.submission.form == "probabilities":
        in_sample = sample_columns(competition)
        classes = in_sample if set(in_sample) == set(names) else names
    if set(classes) != set(names) or len(classes) != len(names):
        raise Refused(
            f"configs/competition.yaml: classes: {listed(classes)} are not the target columns {listed(names)}"
        )
    text = rows.columns.iloc[known]
    shares = np.column_stack([numbers(text[name]) for name in classes])  # (rows, classes)
    faults = [f for i, name in enumerate(classes) for f in _not_numbers(rows, known, name, shares[:, i])]
    if competition.votes:
        shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)
    off = (shares < 0).any(axis=1) | (np.abs(shares.sum(axis=1) - 1) > 1e-3)
    for position, total in zip(known[off], shares[off].sum(axis=1), strict=True):
        faults.append(
            f"{rows.where(position)}: the shares of the {len(classes)} classes sum to {total:g}; a row's sum to 1, none below 0 (votes: true counts them)"
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


def _sorted(labels: set[str]) -> list[str]:
    """By value where all are numbers."""
    try:
        return sorted(labels, key=lambda label: (float(label), label))
    except ValueError:
        return sorted(labels)


def _not_numbers(rows: Rows, known: NDArray, name: str, values: NDArray) -> list[str]:
    return [
        f"{rows.where(p)}: {name}: "
        + (f"{label!r} is not a number" if isinstance(label, str) else "the label is missing")
        for p in known[~np.isfinite(values)]
        for label in [rows.columns[name].iloc[p]]
    ]


def numbers(text: pd.Series) -> NDArray[np.float64]:
    """NaN where the text is none."""
    import pandas as pd

    return pd.to_numeric(text, errors="coerce").to_numpy(np.float64, na_value=np.nan)


def _soft(labels: pd.Series) -> bool:
    """Shares between 0 and 1 rather than two classes."""
    values = np.unique(numbers(labels.dropna()))
    return bool(len(values) > 2 and values.min() >= 0 and values.max() <= 1)


def listed(names: Sequence[str]) -> str:
    names = list(names)
    return ", ".join(names if len(names) <= 6 else [*names[:4], "…", names[-1]])
