"""Converts target columns of the raw tables to heads and numbers, with one function per kind of target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine.config import declaration
from comp.engine.config.competition_schema import Competition
from comp.engine.config.resolve import nearest
from comp.engine.data import similar_labels
from comp.engine.data.sample_submission import load_sample
from comp.engine.data.tables import RawRows
from comp.engine.errors import UserError, joined
from comp.engine.readers.unicode_names import nfc
from comp.engine.tasks.kinds import Head

if TYPE_CHECKING:
    import pandas as pd

MISSING = "the label is missing"
ROUNDING = 1e-3  # the shares of a row may sum to 1 ± this


class Targets(NamedTuple):
    heads: tuple[Head, ...]
    columns: dict[str, NDArray]  # name -> values of the labeled rows; target.<name> of the samples table
    faults: list[UserError]  # of single rows
    notes: tuple[str, ...] = ()


def read(rows: RawRows, competition: Competition, labeled: NDArray) -> Targets:
    """Reads all targets. `labeled`: positions of the rows with labels. A list of targets is one task; a
    mapping has a task for each target."""
    one_task = isinstance(competition.target, list)
    heads: list[Head] = []
    columns: dict[str, NDArray] = {}
    faults: list[UserError] = []
    notes: list[str] = []
    for name, task in competition.tasks.items():
        names = competition.targets if one_task else [name]
        if task == "multiclass" and len(names) > 1:
            return _one_hot(rows, competition, labeled)
        if task == "multilabel" and len(names) > 1:
            return _label_columns(rows, competition, labeled)
        if task == "regression":
            found = _numbers(rows, names, labeled)
        elif task == "multilabel":
            found = _label_lists(rows, competition, name, labeled)
        else:
            found = _labels(rows, competition, name, task, labeled)
        heads += found.heads
        columns |= found.columns
        faults += found.faults
        notes += found.notes
        if task == "regression" and one_task:
            break
    return Targets(tuple(heads), columns, faults, tuple(notes))


# --- kinds of targets --------------------------------------------------------------------------------------


def _numbers(rows: RawRows, names: list[str], labeled: NDArray) -> Targets:
    """Regression: one head with an output for each column."""
    text = rows.columns.iloc[labeled]
    values = {name: to_numbers(text[name]) for name in names}
    head = Head("_".join(names), "regression", tuple(names), tuple(f"target.{n}" for n in names))
    return Targets((head,), values, [f for n in names for f in _not_numbers(rows, labeled, n, values[n])])


def _labels(rows: RawRows, competition: Competition, name: str, task: str, labeled: NDArray) -> Targets:
    """One label per row, as the code of its class. A binary label may be a share between 0 and 1."""
    text = rows.columns[name].iloc[labeled]
    if task == "binary" and competition.class_mapping is None and _is_soft(text):
        values = to_numbers(text)
        head = Head(name, task, (name,), (f"target.{name}",))
        return Targets((head,), {name: values}, _not_numbers(rows, labeled, name, values))
    from_sample = task == "multiclass" and _column_per_class(competition)
    doubtful = [] if from_sample else _doubtful(rows, competition, name, text.dropna().items())
    if doubtful and task == "binary":
        raise joined(doubtful)  # otherwise the error would be a third class
    classes = _classes(rows, competition, name, task, labeled)
    if competition.unknown is not None and competition.unknown not in classes:
        classes = (*classes, competition.unknown)  # also if no training row has it
    code = _codes(competition, classes)
    values = np.asarray(text.map(lambda label: code.get(nfc(label), np.nan), na_action="ignore"), np.float64)
    outputs = (name,) if task in ("binary", "ordinal") else classes
    wrong = labeled[np.isnan(values)]
    labels = rows.columns[name].iloc[wrong]
    reasons = {label: _unknown_label(label, competition, classes) for label in labels.dropna().unique()}
    faults = [
        _fault("label-unknown", rows, position, name, *reasons[label])
        if label in reasons
        else _fault("label-missing", rows, position, name, MISSING)
        for position, label in zip(wrong, labels, strict=True)
    ]
    head = Head(name, task, outputs, (f"target.{name}",), classes, unknown=competition.unknown or "")
    notes = _unused_labels(competition, name, set(text.dropna()))
    if task == "retrieval":  # thousands of ids may differ by case alone, and no line of YAML could list them
        notes += tuple(f"note: {fault.line}" for fault in doubtful)
    else:
        faults += doubtful
    return Targets((head,), {name: values}, faults, notes)


def _label_lists(rows: RawRows, competition: Competition, name: str, labeled: NDArray) -> Targets:
    """Multilabel in one column: `3 17 255` are the labels of a row. An empty cell is a row without labels."""
    text = rows.columns[name].iloc[labeled].fillna("")
    separator = competition.separator
    lists = [[part.strip() for part in cell.split(separator if separator.strip() else None)] for cell in text]
    none = competition.submission.none
    lists = [[part for part in parts if part and part != none] for parts in lists]
    found = {part for parts in lists for part in parts}
    from_sample = sample_columns(competition) if _column_per_class(competition) else []
    classes = tuple(competition.class_list or from_sample or _sorted_spellings(found))
    code = _codes(competition, classes)
    _validate_label_lists(name, separator, found, classes, from_sample, code)
    values = np.zeros((len(lists), len(classes)), np.float32)
    each = [(labeled[i], part) for i, parts in enumerate(lists) for part in parts]
    faults = [] if from_sample else _doubtful(rows, competition, name, each)
    ignored: Counter[str] = Counter()
    for i, parts in enumerate(lists):
        for part in parts:
            if (at := code.get(nfc(part))) is not None:
                values[i, int(at)] = 1
            elif competition.classes is None:
                ignored[part] += 1
            else:
                reason = _unknown_label(part, competition, classes)
                faults.append(_fault("label-unknown", rows, labeled[i], name, *reason))
    notes = _unused_labels(competition, name, found)
    if ignored:
        common = ", ".join(f"{label} ({count})" for label, count in ignored.most_common(6))
        notes += (
            f"note: {len(ignored)} of {len(found)} labels of {name} have no column in the sample submission "
            f"and are not trained on: {common}; list them in competition.classes to train on them as well",
        )
    graded = tuple(label for label in from_sample if label in classes)
    head = Head(
        name,
        "multilabel",
        classes,
        tuple(f"target.{label}" for label in classes),
        classes,
        graded if len(graded) < len(classes) else (),
    )
    return Targets((head,), dict(zip(classes, values.T, strict=True)), faults, notes)


def _validate_label_lists(
    name: str,
    separator: str,
    found: set[str],
    classes: Sequence[str],
    from_sample: Sequence[str],
    code: dict[str, float],
) -> None:
    if len(classes) < 2:
        raise declaration.error(
            "too-few-classes",
            "target",
            f"{name} has {len(classes)} labels with the separator {separator!r}",
            "set separator",
        )
    if from_sample and not code.keys() & set(map(nfc, found)):
        raise declaration.error(
            "labels-not-in-sample",
            "target",
            f"none of {len(found)} labels of {name}, like {min(found, default='')!r}, is a column of the "
            f"sample submission, like {from_sample[0]!r}",
            "correct separator or submission.form",
        )


def _label_columns(rows: RawRows, competition: Competition, labeled: NDArray) -> Targets:
    """Multilabel with a column of 0 and 1, or of shares, for each label. Only columns of the sample are
    scored."""
    names = competition.targets
    text = rows.columns.iloc[labeled]
    values = {name: to_numbers(text[name]) for name in names}
    faults = [fault for name in names for fault in _not_numbers(rows, labeled, name, values[name])]
    for name in names:
        for position in labeled[(values[name] < 0) | (values[name] > 1)]:
            cell = rows.columns[name].iloc[position]
            faults.append(_fault("label-range", rows, position, name, f"{cell!r} is not between 0 and 1"))
    graded: tuple[str, ...] = ()
    if _column_per_class(competition):
        graded = tuple(name for name in sample_columns(competition) if name in names)
    columns = tuple(f"target.{name}" for name in names)
    scored = graded if len(graded) < len(names) else ()
    head = Head("labels", "multilabel", tuple(names), columns, tuple(names), scored)
    return Targets((head,), dict(values), faults)


def _one_hot(rows: RawRows, competition: Competition, labeled: NDArray) -> Targets:
    """Multiclass with a column for each class. Rows of one 1 and otherwise 0 become codes; soft labels, whose
    shares sum to 1, stay as they are."""
    names = competition.targets
    classes = competition.class_list or names
    if competition.classes is None and competition.submission.form == "probabilities":
        in_sample = sample_columns(competition)
        classes = in_sample if set(in_sample) == set(names) else names
    if set(classes) != set(names) or len(classes) != len(names):
        what = f"{abbreviated(classes)} are not the target columns {abbreviated(names)}"
        raise declaration.error("classes-differ", "classes", what)
    text = rows.columns.iloc[labeled]
    shares = np.column_stack([to_numbers(text[name]) for name in classes])  # (rows, classes)
    faults = [f for i, name in enumerate(classes) for f in _not_numbers(rows, labeled, name, shares[:, i])]
    if competition.votes:
        shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)
    off = (shares < 0).any(axis=1) | (np.abs(shares.sum(axis=1) - 1) > ROUNDING)
    for position, total in zip(labeled[off], shares[off].sum(axis=1), strict=True):
        faults.append(
            UserError(
                "shares-invalid",
                where=rows.where(position),
                what=f"the shares of {len(classes)} classes sum to {total:g}; they must be >= 0 and sum to 1",
                remedy="votes: true reads counts",
            )
        )
    hard = np.isin(shares, (0.0, 1.0)).all(axis=1)
    if hard.all():
        head = Head("class", "multiclass", tuple(classes), ("target.class",), tuple(classes))
        return Targets((head,), {"class": shares.argmax(axis=1)}, faults)
    columns = tuple(f"target.{name}" for name in classes)
    head = Head("class", "multiclass", tuple(classes), columns, tuple(classes))
    return Targets((head,), dict(zip(classes, shares.T, strict=True)), faults)


# --- classes -----------------------------------------------------------------------------------------------


def _classes(
    rows: RawRows, competition: Competition, name: str, task: str, labeled: NDArray
) -> tuple[str, ...]:
    """The classes in the declared order, else in the order of the sample's columns, else sorted."""
    labels = rows.columns[name].iloc[labeled].dropna()
    values = to_numbers(labels)
    declared = competition.class_list if len(competition.targets) == 1 else None
    if declared:
        classes = declared
    elif task == "multiclass" and _column_per_class(competition):
        classes = sample_columns(competition)
    else:
        classes = _sorted_spellings(set(labels))
    if task == "ordinal" and not competition.classes and not np.isfinite(values).all():
        first = labels.index[~np.isfinite(values)][0]
        raise UserError(
            "grade-not-a-number",
            where=rows.where(first),
            key=name,
            what=f"{labels[first]!r} is not a number",
            remedy=f"list the grades in {declaration.FILE}: classes, lowest first",
        )
    if task == "binary" and len(classes) > 2:
        rare = labels.value_counts(sort=True).index[-1]
        raise UserError(
            "too-many-classes",
            where=rows.where(labels.index[labels == rare][0]),
            key=name,
            what=f"{rare!r} is one of {len(classes)} classes, {abbreviated(classes)}; task: binary has two",
        )
    if len(set(classes)) < len(classes) or len(classes) < 2:
        what = f"{name} needs at least two different classes, and has {abbreviated(classes) or 'none'}"
        raise declaration.error("too-few-classes", "classes", what)
    return tuple(classes)


def _codes(competition: Competition, classes: Sequence[str]) -> dict[str, float]:
    """Label of the tables, in NFC -> the code of its class."""
    code = {nfc(label): float(i) for i, label in enumerate(classes)}
    if competition.class_mapping is None:
        return code
    return {
        nfc(label): code[nfc(host)] for label, host in competition.class_mapping.items() if nfc(host) in code
    }


def sample_columns(competition: Competition) -> list[str]:
    """The columns of the sample submission to fill in."""
    return list(load_sample(competition).prediction_columns)


def _column_per_class(competition: Competition) -> bool:
    """Whether the sample submission has a column for each class."""
    return competition.submission.form == "probabilities" and competition.submission.rows is None


def _sorted_spellings(labels: set[str]) -> list[str]:
    """Sorted labels; of several Unicode spellings of a label, one."""
    return _sorted(set({nfc(label): label for label in sorted(labels)}.values()))


def _sorted(labels: set[str]) -> list[str]:
    """Sorted by value if all are numbers, otherwise as text."""
    try:
        return sorted(labels, key=lambda label: (float(label), label))
    except ValueError:
        return sorted(labels)


# --- faults ------------------------------------------------------------------------------------------------


def _fault(code: str, rows: RawRows, position: int, name: str, what: str, remedy: str = "") -> UserError:
    return UserError(code, where=rows.where(position), key=name, what=what, remedy=remedy)


def _unknown_label(label: str, competition: Competition, classes: Sequence[str]) -> tuple[str, str]:
    """(what, remedy) for a label that is not one of the classes."""
    mapping = competition.class_mapping
    if mapping is not None and nfc(label) not in map(nfc, mapping):
        what = f"{label!r} is not in competition.classes, which maps {abbreviated(list(mapping))}"
        return what, f"did you mean {nearest(label, mapping)[0]!r}?"
    if mapping is not None:
        return f"competition.classes maps {label!r} to a class that is not one of {abbreviated(classes)}", ""
    what = f"{label!r} is not one of the {len(classes)} classes"
    return what, f"did you mean {nearest(label, classes)[0]!r}? competition.classes lists them"


def _not_numbers(rows: RawRows, labeled: NDArray, name: str, values: NDArray) -> list[UserError]:
    faults = []
    for position in labeled[~np.isfinite(values)]:
        cell = rows.columns[name].iloc[position]
        if isinstance(cell, str):
            faults.append(_fault("not-a-number", rows, position, name, f"{cell!r} is not a number"))
        else:
            faults.append(_fault("label-missing", rows, position, name, MISSING))
    return faults


def _doubtful(
    rows: RawRows, competition: Competition, name: str, labels: Iterable[tuple[Any, str]]
) -> list[UserError]:
    """Faults for labels that may be one class, or none, if competition.classes is not declared. `labels`:
    (position, label)."""
    if competition.classes is not None:
        return []
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for position, label in labels:
        counts[nfc(label)] += 1
        first.setdefault(nfc(label), int(position))
    found = similar_labels.of_labels(counts, _sorted(set(counts)), competition.unknown)
    return [_fault(each.code, rows, first[each.text], name, each.what, each.remedy) for each in found]


def _unused_labels(competition: Competition, name: str, labels: set[str]) -> tuple[str, ...]:
    """A note on labels of competition.classes that no row has, since they may be misspelt."""
    present = set(map(nfc, labels))
    unused = [label for label in competition.class_mapping or () if nfc(label) not in present]
    text = f"note: competition.classes lists {abbreviated(unused)}, which no row has as {name}"
    return (text,) if unused else ()


# --- cells -------------------------------------------------------------------------------------------------


def to_numbers(text: pd.Series) -> NDArray[np.float64]:
    """Converts text to floats; NaN if it is not a number."""
    import pandas as pd

    return pd.to_numeric(text, errors="coerce").to_numpy(np.float64, na_value=np.nan)


def _is_soft(labels: pd.Series) -> bool:
    """Whether binary labels are shares between 0 and 1 rather than two classes."""
    values = np.unique(to_numbers(labels.dropna()))
    return bool(len(values) > 2 and values.min() >= 0 and values.max() <= 1)


def abbreviated(names: Sequence[str]) -> str:
    """Lists names; of many only the first and the last."""
    names = list(names)
    return ", ".join(names if len(names) <= 6 else [*names[:4], "…", names[-1]])
