"""Target columns into heads and their numbers: one row a kind of target, so that several kinds stand side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine.config.competition_schema import Competition
from comp.engine.config.resolve import nearest
from comp.engine.data import similar_labels
from comp.engine.data.sample_submission import load_sample
from comp.engine.data.tables import RawRows
from comp.engine.errors import Refused
from comp.engine.readers.unicode_names import nfc
from comp.engine.tasks.kinds import Head

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 20  # faults on the screen; the rest is a count


class Targets(NamedTuple):
    heads: tuple[Head, ...]
    columns: dict[str, NDArray]  # of the samples table -> values
    faults: list[str]  # one line a wrong row
    notes: tuple[str, ...] = ()  # what is worth knowing of labels that are left out


def read(rows: RawRows, competition: Competition, known: NDArray) -> Targets:
    """Of the rows that have labels. A list of targets is one task together, a mapping one task each."""
    together = isinstance(competition.target, list)
    heads: list[Head] = []
    columns: dict[str, NDArray] = {}
    faults: list[str] = []
    notes: list[str] = []
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
        heads += found.heads
        columns |= found.columns
        faults += found.faults
        notes += found.notes
        if task == "regression" and together:
            break
    return Targets(tuple(heads), columns, faults, tuple(notes))


def _values(rows: RawRows, names: list[str], known: NDArray) -> Targets:
    text = rows.columns.iloc[known]
    values = {name: to_numbers(text[name]) for name in names}
    head = Head("_".join(names), "regression", tuple(names), tuple(f"target.{n}" for n in names))
    return Targets((head,), values, [f for n in names for f in _not_numbers(rows, known, n, values[n])])


def _labels(rows: RawRows, competition: Competition, name: str, task: str, known: NDArray) -> Targets:
    """One label a row, as the code of its class; a binary one may be a share between 0 and 1."""
    text = rows.columns[name].iloc[known]
    if task == "binary" and competition.class_mapping is None and _soft(text):
        values = to_numbers(text)
        head = Head(name, task, (name,), (f"target.{name}",))
        return Targets((head,), {name: values}, _not_numbers(rows, known, name, values))
    asked = task == "multiclass" and _by_column(competition)
    doubtful = [] if asked else _doubtful(rows, competition, name, text.dropna().items())
    if doubtful and task == "binary":
        raise Refused(*doubtful)  # rather than for a third class
    classes = _classes(rows, competition, name, task, known)
    if competition.unknown is not None and competition.unknown not in classes:
        classes = (*classes, competition.unknown)  # no training row may show it
    code = _codes(competition, classes)
    values = np.asarray(text.map(lambda label: code.get(nfc(label), np.nan), na_action="ignore"), np.float64)
    outputs = (name,) if task in ("binary", "ordinal") else classes
    wrong = known[np.isnan(values)]
    given = rows.columns[name].iloc[wrong]
    why = {label: _no_class(label, competition, classes) for label in given.dropna().unique()}
    faults = [
        f"{rows.where(position)}: {name}: {why.get(label, 'the label is missing')}"
        for position, label in zip(wrong, given, strict=True)
    ]
    head = Head(name, task, outputs, (f"target.{name}",), classes, unknown=competition.unknown or "")
    notes = _never(competition, name, set(text.dropna()))
    if task == "retrieval":  # ids by the thousand, which may differ by case: no line could name them all
        notes += tuple(f"note: {line}" for line in doubtful)
    else:
        faults += doubtful
    return Targets((head,), {name: values}, faults, notes)


def _doubtful(
    rows: RawRows, competition: Competition, name: str, labelled: Iterable[tuple[Any, str]]
) -> list[str]:
    """Labels that may be one class, or none, of (position, label): where competition.classes says nothing of it."""
    if competition.classes is not None:
        return []
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for position, label in labelled:
        counts[nfc(label)] += 1
        first.setdefault(nfc(label), int(position))
    found = similar_labels.label_faults(counts, _sorted(set(counts)), competition.unknown)
    return [f"{rows.where(first[label])}: {name}: {why}" for label, why in found]


def _codes(competition: Competition, classes: Sequence[str]) -> dict[str, float]:
    """Label of the tables, as NFC -> the code of its class."""
    code = {nfc(label): float(i) for i, label in enumerate(classes)}
    if competition.class_mapping is None:
        return code
    return {
        nfc(label): code[nfc(host)] for label, host in competition.class_mapping.items() if nfc(host) in code
    }


def _no_class(label: str, competition: Competition, classes: Sequence[str]) -> str:
    named = competition.class_mapping
    if named is not None and nfc(label) not in map(nfc, named):
        return f"{label!r} is not named by competition.classes, which maps {abbreviated(list(named))}; the nearest is {nearest(label, named)[0]!r}"
    if named is not None:
        return f"competition.classes maps {label!r} to a class that is none of {abbreviated(classes)}"
    return f"{label!r} is none of the {len(classes)} classes, the nearest is {nearest(label, classes)[0]!r}; competition.classes can name them"


def _never(competition: Competition, name: str, labels: set[str]) -> tuple[str, ...]:
    """Labels of the mapping that no row has: a slip of the pen looks the same."""
    there = set(map(nfc, labels))
    gone = [label for label in competition.class_mapping or () if nfc(label) not in there]
    return (
        (f"note: competition.classes names {abbreviated(gone)}, and no row's {name} is that",) if gone else ()
    )


def _label_strings(rows: RawRows, competition: Competition, name: str, known: NDArray) -> Targets:
    """`3 17 255`: the labels of a row in one cell. An empty cell is a row without any."""
    text = rows.columns[name].iloc[known].fillna("")
    mark = competition.separator
    lists = [[part.strip() for part in cell.split(mark if mark.strip() else None)] for cell in text]
    none = competition.submission.none
    lists = [[part for part in parts if part and part != none] for parts in lists]
    found = {part for parts in lists for part in parts}
    by_column = _by_column(competition)
    asked = sample_columns(competition) if by_column else []
    classes = tuple(competition.class_list or asked or _spelled(found))
    if len(classes) < 2:
        raise Refused(
            f"configs/competition.yaml: target: {name} holds {len(classes)} labels parted by {mark!r}; see separator"
        )
    code = _codes(competition, classes)
    if asked and not code.keys() & set(map(nfc, found)):
        raise Refused(
            f"configs/competition.yaml: target: none of {len(found)} labels of {name}, like {min(found, default='')!r}, is a column of "
            f"the sample submission, like {asked[0]!r}; see separator and submission.form"
        )
    values = np.zeros((len(lists), len(classes)), np.float32)
    each = [(known[place], part) for place, parts in enumerate(lists) for part in parts]
    faults = [] if asked else _doubtful(rows, competition, name, each)
    left: Counter[str] = Counter()
    for place, parts in enumerate(lists):
        for part in parts:
            if (at := code.get(nfc(part))) is not None:
                values[place, int(at)] = 1
            elif competition.classes is None:
                left[part] += 1
            else:
                faults.append(f"{rows.where(known[place])}: {name}: {_no_class(part, competition, classes)}")
    notes = _never(competition, name, found)
    if left:
        common = ", ".join(f"{label} ({count})" for label, count in left.most_common(6))
        notes += (
            f"note: {len(left)} of {len(found)} labels of {name} have no column in the sample submission and are not learned: {common}; "
            "competition.classes can name those to learn beside the scored ones",
        )
    graded = tuple(label for label in asked if label in classes)
    head = Head(
        name,
        "multilabel",
        classes,
        tuple(f"target.{label}" for label in classes),
        classes,
        graded if len(graded) < len(classes) else (),
    )
    return Targets((head,), dict(zip(classes, values.T, strict=True)), faults, notes)


def _by_column(competition: Competition) -> bool:
    """Whether the sample has a column for each class."""
    return competition.submission.form == "probabilities" and competition.submission.rows is None


def _spelled(labels: set[str]) -> list[str]:
    """Sorted, each once, whichever way its accents are written."""
    return _sorted(set({nfc(label): label for label in sorted(labels)}.values()))


def _label_columns(rows: RawRows, competition: Competition, known: NDArray) -> Targets:
    """A column of 0 and 1 (or shares) for each label. The sample's columns decide which of them are scored."""
    names = competition.targets
    text = rows.columns.iloc[known]
    values = {name: to_numbers(text[name]) for name in names}
    faults = [fault for name in names for fault in _not_numbers(rows, known, name, values[name])]
    for name in names:
        for position in known[(values[name] < 0) | (values[name] > 1)]:
            faults.append(
                f"{rows.where(position)}: {name}: {rows.columns[name].iloc[position]!r} is no label, 0 or 1"
            )
    graded: tuple[str, ...] = ()
    if _by_column(competition):
        graded = tuple(name for name in sample_columns(competition) if name in names)
    columns = tuple(f"target.{name}" for name in names)
    scored = graded if len(graded) < len(names) else ()
    head = Head("labels", "multilabel", tuple(names), columns, tuple(names), scored)
    return Targets((head,), dict(values), faults)


def _classes(
    rows: RawRows, competition: Competition, name: str, task: str, known: NDArray
) -> tuple[str, ...]:
    """Their order: as declared, else as the sample's columns, else sorted."""
    labels = rows.columns[name].iloc[known].dropna()
    values = to_numbers(labels)
    declared = competition.class_list if len(competition.targets) == 1 else None
    if declared:
        classes = declared
    elif task == "multiclass" and _by_column(competition):
        classes = sample_columns(competition)
    else:
        classes = _spelled(set(labels))
    if task == "ordinal" and not competition.classes and not np.isfinite(values).all():
        first = labels.index[~np.isfinite(values)][0]
        raise Refused(
            f"{rows.where(first)}: {name} is {labels[first]!r}, no number; competition.classes names the grades, lowest first"
        )
    if task == "binary" and len(classes) > 2:
        rare = labels.value_counts(sort=True).index[-1]
        place = rows.where(labels.index[labels == rare][0])
        raise Refused(
            f"{place}: {name} is {rare!r}, and task: binary wants two classes, not {len(classes)}: {abbreviated(classes)}"
        )
    if len(set(classes)) < len(classes) or len(classes) < 2:
        raise Refused(
            f"configs/competition.yaml: classes: {name} wants at least two different classes, not {abbreviated(classes)}"
        )
    return tuple(classes)


def _one_hot(rows: RawRows, competition: Competition, known: NDArray) -> Targets:
    """One column a class. Rows that are all 0 and one 1 become codes; any other shares that sum to 1 stay as they are."""
    names = competition.targets
    classes = competition.class_list or names
    if competition.classes is None and competition.submission.form == "probabilities":
        in_sample = sample_columns(competition)
        classes = in_sample if set(in_sample) == set(names) else names
    if set(classes) != set(names) or len(classes) != len(names):
        raise Refused(
            f"configs/competition.yaml: classes: {abbreviated(classes)} are not the target columns {abbreviated(names)}"
        )
    text = rows.columns.iloc[known]
    shares = np.column_stack([to_numbers(text[name]) for name in classes])  # (rows, classes)
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
        head = Head("class", "multiclass", tuple(classes), ("target.class",), tuple(classes))
        return Targets((head,), {"class": shares.argmax(axis=1)}, faults)
    columns = tuple(f"target.{name}" for name in classes)
    head = Head("class", "multiclass", tuple(classes), columns, tuple(classes))
    return Targets((head,), dict(zip(classes, shares.T, strict=True)), faults)


def sample_columns(competition: Competition) -> list[str]:
    """The columns of the sample submission that are to be filled in, in their order."""
    return list(load_sample(competition).prediction_columns)


def _sorted(labels: set[str]) -> list[str]:
    """By value where all are numbers."""
    try:
        return sorted(labels, key=lambda label: (float(label), label))
    except ValueError:
        return sorted(labels)


def _not_numbers(rows: RawRows, known: NDArray, name: str, values: NDArray) -> list[str]:
    return [
        f"{rows.where(p)}: {name}: "
        + (f"{label!r} is not a number" if isinstance(label, str) else "the label is missing")
        for p in known[~np.isfinite(values)]
        for label in [rows.columns[name].iloc[p]]
    ]


def to_numbers(text: pd.Series) -> NDArray[np.float64]:
    """NaN where the text is none."""
    import pandas as pd

    return pd.to_numeric(text, errors="coerce").to_numpy(np.float64, na_value=np.nan)


def _soft(labels: pd.Series) -> bool:
    """Shares between 0 and 1 rather than two classes."""
    values = np.unique(to_numbers(labels.dropna()))
    return bool(len(values) > 2 and values.min() >= 0 and values.max() <= 1)


def abbreviated(names: Sequence[str]) -> str:
    names = list(names)
    return ", ".join(names if len(names) <= 6 else [*names[:4], "…", names[-1]])
