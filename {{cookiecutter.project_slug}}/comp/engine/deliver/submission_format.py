"""The forms of a submission: from probabilities or values to the cells of the sample's columns, and what a
cell may hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from comp.engine.bank import thresholds
from comp.engine.config.competition_schema import Submission
from comp.engine.config.resolve import nearest
from comp.engine.data import sample_submission
from comp.engine.data.sample_submission import SampleSubmission
from comp.engine.errors import UserError
from comp.engine.store import paths
from comp.engine.tasks.kinds import Array, Head

# head -> (scored rows, outputs): probabilities or values, as the metric gets them
Predictions = Mapping[str, Array]
Cuts = Mapping[str, Sequence[float]]  # head -> fitted thresholds, or the borders between neighboring labels
TASKS_OF_FORM = {
    "probability": ("binary",),
    "probabilities": ("multiclass", "binary", "multilabel", "retrieval"),
    "label": ("binary", "multiclass", "ordinal", "regression", "retrieval"),
    "value": ("regression", "ordinal"),
    "labels": ("multilabel",),
    "ranking": ("multiclass", "retrieval", "multilabel"),
}
FORM = "competition.submission.form"


@dataclass(frozen=True)
class Lines:
    """The cells of a submission, header first, and notes to print on how they were made."""

    lines: list[list[str]]
    notes: list[str]


def validate_form(rules: Submission, heads: Sequence[Head]) -> None:
    """Whether each head can be written in the form that is declared for it."""
    for head in heads:
        form = rules.form[head.name] if isinstance(rules.form, dict) else rules.form
        if head.task not in TASKS_OF_FORM[form] and not (form == "probability" and rules.rows):
            possible = [form for form, tasks in TASKS_OF_FORM.items() if head.task in tasks]
            raise UserError(
                "submission-form",
                key=FORM,
                what=f"the {head.task} target {head.name!r} cannot be written as {form}",
                remedy=f"use {' or '.join(possible)}",
            )
        spaced = next((name for name in head.classes if " " in name), None)
        if form in ("labels", "ranking") and spaced is not None:
            raise UserError(
                "submission-form",
                key=FORM,
                what=f"the labels of form {form} are separated by spaces, and class {spaced!r} contains one",
                remedy="map it to the host's name for it in competition.classes, like "
                f"{{{spaced!r}: {spaced.replace(' ', '_')!r}}}",
            )
    if rules.sums_to_one and rules.form != "probabilities":
        raise UserError(
            "submission-form",
            key="competition.submission.sums_to_one",
            what=f"needs form probabilities, not {rules.form}",
        )


# --- from predictions to cells ------------------------------------------------------------------------------


def format_lines(
    rules: Submission,
    heads: Sequence[Head],
    predictions: Predictions,
    sample: SampleSubmission,
    cuts: Cuts,
    ids: Sequence[str] | None = None,
) -> Lines:
    """`ids` are the rows of `predictions`, each once: the sample's own, or in long format the rows its lines
    are made of."""
    notes: list[str] = []
    cells: Sequence[Sequence[str]]
    if rules.rows is not None:
        cells = _long_format(rules, heads, predictions, sample, cuts, ids or sample.row_keys, notes)
    else:
        once = sample.deduplicated()
        columns = _columns(rules, heads, predictions, once, cuts, once.prediction_columns, notes)
        by_row = dict(zip(once.row_keys, zip(*columns, strict=True), strict=True))
        cells = [by_row[key] for key in sample.row_keys]
    lines = [sample.fill(number, line) for number, line in enumerate(cells)]
    return Lines([list(sample.columns), *lines], notes)


def _columns(
    rules: Submission,
    heads: Sequence[Head],
    predictions: Predictions,
    sample: SampleSubmission,
    cuts: Cuts,
    names: Sequence[str],
    notes: list[str],
) -> list[list[str]]:
    """One list of cells for each of the names, which are columns or, in long format, classes or targets."""
    if isinstance(rules.form, dict):
        columns = []
        by_name = {head.name: head for head in heads}
        for name in names:
            if name not in by_name:
                raise _unknown_target(sample, name, by_name)
            rules_of_one = rules.model_copy(update={"form": rules.form[name]})
            columns += _columns(rules_of_one, [by_name[name]], predictions, sample, cuts, [name], notes)
        return columns
    if rules.form in ("label", "labels", "ranking"):
        return list(_labels(rules, heads, predictions, sample, cuts, names, notes))
    table = _numbers(rules, heads, predictions, sample, names, notes)
    table = _clip(table, rules.range, sample, notes) if rules.form == "value" else table
    # repr of a float64 is the shortest text that reads back as the same float64: nothing is rounded.
    return [list(map(repr, column)) for column in table.T.tolist()]


def _long_format(
    rules: Submission,
    heads: Sequence[Head],
    predictions: Predictions,
    sample: SampleSubmission,
    cuts: Cuts,
    ids: Sequence[str],
    notes: list[str],
) -> list[list[str]]:
    """A line for each class or target of a row: one column to fill in, or, per target, one column for each
    class."""
    assert rules.rows is not None
    place = {row: i for i, row in enumerate(ids)}
    if rules.form == "probabilities" and "{target}" in rules.rows and len(heads) > 1:
        lines = sample_submission.parse_long_ids(rules.rows, sample.row_keys, heads)
        tables = {
            head.name: _numbers(rules, [head], predictions, sample, sample.prediction_columns, notes).tolist()
            for head in heads
        }
        return [list(map(repr, tables[line.name][place[line.row]])) for line in lines]
    if len(sample.prediction_columns) != 1:
        raise UserError(
            "submission-columns",
            where=f"{paths.relative(sample.file)}:1",
            what=f"{len(sample.prediction_columns)} columns to fill in, where competition.submission.rows "
            "(long format) has one",
        )
    lines = sample_submission.parse_long_ids(rules.rows, sample.row_keys, heads)
    names = list(dict.fromkeys(line.name for line in lines))
    columns = _columns(rules, heads, predictions, sample, cuts, names, notes)
    by_name = dict(zip(names, columns, strict=True))
    return [[by_name[line.name][place[line.row]]] for line in lines]


def _numbers(
    rules: Submission,
    heads: Sequence[Head],
    predictions: Predictions,
    sample: SampleSubmission,
    names: Sequence[str],
    notes: list[str],
) -> Array:
    """(rows, names), outputs found by name; a single output fills a single column whatever its name."""
    outputs: dict[str, Array] = {}
    for head in heads:
        value = predictions[head.name]
        if (
            (rules.form == "probabilities" or rules.rows is not None)
            and head.task == "binary"
            and set(names) == set(head.classes)
        ):
            outputs |= {head.classes[0]: 1 - value[:, 0], head.classes[1]: value[:, 0]}
        else:
            outputs |= dict(zip(head.outputs, value.T, strict=True))
        if rules.form == "probability" and head.task == "binary" and head.classes and rules.rows is None:
            notes.append(f"{head.name}: the probability of {head.classes[1]!r}, not of {head.classes[0]!r}")
    if len(outputs) == len(names) == 1:
        return np.column_stack(list(outputs.values()))
    where = f"{paths.relative(sample.file)}:1"
    for column in names:
        if column not in outputs:
            raise UserError(
                "submission-columns",
                where=where,
                key=f"column {column!r}",
                what=f"no output of the model; it has {', '.join(outputs)}",
                remedy="see competition.classes",
            )
    exclusive = [name for head in heads if head.task in ("multiclass", "retrieval") for name in head.outputs]
    missing = [name for name in exclusive if name not in names]
    if missing:
        raise UserError(
            "submission-columns",
            where=where,
            what=f"no column for class {missing[0]!r}, which the model predicts",
            remedy="see competition.classes",
        )
    return np.column_stack([outputs[column] for column in names])


def _clip(table: Array, limits: Sequence[float] | None, sample: SampleSubmission, notes: list[str]) -> Array:
    """Values slightly outside the range are moved to its edge, since a host rejects the file for one such
    value. Far outside is an error."""
    if limits is None:
        return table
    low, high = limits
    slack = (high - low) / 4
    far = np.argwhere((table < low - slack) | (table > high + slack))
    if len(far):
        row, column = far[0]
        name = sample.prediction_columns[column] if column < len(sample.prediction_columns) else str(column)
        raise UserError(
            "prediction-range",
            key=f"row {sample.ids[row]!r}, column {name!r}",
            what=f"the prediction {table[row, column]:g} is far outside the range [{low:g}, {high:g}] of "
            f"competition.submission.range, as are {len(far) - 1} others",
        )
    outside = int(((table < low) | (table > high)).sum())
    if outside:
        notes.append(
            f"{outside} of {table.size} values slightly outside [{low:g}, {high:g}] were clipped to it"
        )
    return np.clip(table, low, high)


def _labels(
    rules: Submission,
    heads: Sequence[Head],
    predictions: Predictions,
    sample: SampleSubmission,
    cuts: Cuts,
    names: Sequence[str],
    notes: list[str],
) -> Iterator[list[str]]:
    """One list of labels a column, each a class (or several, or the k most likely) as the raw table writes
    it."""
    by_name = {head.name: head for head in heads}
    if len(heads) == len(names) == 1:
        by_name = {names[0]: heads[0]}
    for column in names:
        if column not in by_name:
            raise _unknown_target(sample, column, by_name)
        head = by_name[column]
        value, cut = predictions[head.name], cuts.get(head.name)
        if rules.form == "labels":
            yield list(_multilabel(rules, head, value, cut, column, notes))
            continue
        if rules.form == "ranking":
            yield _ranking(rules, head, value, cut)
            continue
        if head.task == "regression":
            value = _clip(value, rules.range, sample, notes)
        if cut is not None and head.unknown:
            codes = thresholds.with_unknown(value, head.classes.index(head.unknown), cut[0], 1)[:, 0]
        elif cut is not None:  # of two classes the one cut is the threshold
            codes = thresholds.apply_cuts(value[:, 0], np.asarray(cut))
            places = ", ".join(f"{each:.4g}" for each in cut)
            notes.append(f"{column}: cut at {places}, as fitted on the OOF rows")
        else:
            codes = head.spec.to_label(value)
        if head.classes:
            yield [head.classes[code] for code in np.clip(codes, 0, len(head.classes) - 1).tolist()]
        else:
            yield [str(code) for code in codes.tolist()]


def _multilabel(
    rules: Submission, head: Head, value: Array, cut: Sequence[float] | None, column: str, notes: list[str]
) -> Iterator[str]:
    """Every label above its threshold; at least the most likely one, unless submission.none says how to write
    a row without."""
    fitted = np.full(len(head.outputs), 0.5) if cut is None else np.asarray(cut)
    origin = "the default" if cut is None else "fitted on the OOF rows"
    notes.append(f"{column}: thresholds from {fitted.min():.4g} to {fitted.max():.4g}, {origin}")
    selected = thresholds.apply_threshold(value, fitted, at_least_one=rules.none is None)
    counts = selected.sum(axis=1)
    notes.append(f"{column}: {counts.mean():.2f} labels a row, {int((counts == 0).sum())} rows without any")
    for row in selected:
        yield " ".join(head.classes[code] for code in np.flatnonzero(row)) or rules.none or ""


def _ranking(rules: Submission, head: Head, value: Array, cut: Sequence[float] | None) -> list[str]:
    """The k most likely classes, most likely first."""
    if cut is not None and head.unknown:
        order = thresholds.with_unknown(value, head.classes.index(head.unknown), cut[0], rules.k)
    else:
        order = np.argsort(-value, axis=1, kind="stable")[:, : rules.k]
    return [" ".join(head.classes[code] for code in row) for row in order.tolist()]


def _unknown_target(sample: SampleSubmission, column: str, targets: Mapping[str, Head]) -> UserError:
    return UserError(
        "submission-columns",
        where=f"{paths.relative(sample.file)}:1",
        key=f"column {column!r}",
        what=f"no such target; there are {', '.join(targets)}",
    )


# --- what a cell may hold -----------------------------------------------------------------------------------

DIGITS = re.compile(r"[-+.\deE]*", re.ASCII)
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
INTEGER = re.compile(r"-?(0|[1-9]\d*)", re.ASCII)
SUM_TOLERANCE = 1e-6
IMAGE_NAME = re.compile(r"^.*/|\.(jpe?g|png|tiff?|webp|bmp|gif|dcm|dicom|npy|npz)$", re.IGNORECASE)


@dataclass(frozen=True)
class CellRules:
    """A form of competition.submission with its limits and classes."""

    form: str  # of TASKS_OF_FORM; with several forms "by column", or "number or label" in long format
    low: float
    high: float
    sums_to_one: bool
    classes: frozenset[str]
    max_labels: int = 0  # of a ranking
    none: str | None = None  # the cell of a row without labels
    columns: tuple[CellRules, ...] = ()  # for "by column"

    def errors(self, cells: Sequence[str]) -> list[tuple[int | None, str]]:
        """(position of the cell, what is wrong with it) for each wrong cell of a line; None for a wrong sum
        of all cells."""
        if self.columns:
            pairs = zip(self.columns, cells, strict=True)
            return [(i, error) for i, (rules, cell) in enumerate(pairs) for _, error in rules.errors([cell])]
        if self.form == "number or label":  # which of them a line holds depends on its target
            return [(i, e) for i, cell in enumerate(cells) if self._number(cell) and (e := self._label(cell))]
        if self.form in ("labels", "ranking"):
            return [(i, error) for i, cell in enumerate(cells) if (error := self._list(cell))]
        if self.form == "label":
            return [(i, error) for i, cell in enumerate(cells) if (error := self._label(cell))]
        # Twice as fast as cell by cell, and nearly all of millions of cells are valid. The pattern comes
        # first because float() also takes nan, 1_0, spaces and the digits of other scripts.
        values: list[float] = []
        if DIGITS.fullmatch("".join(cells)):
            try:
                values = list(map(float, cells))
            except ValueError:
                values = []
        if not values or not self._in_range(min(values)) or not self._in_range(max(values)):
            return [(i, error) for i, cell in enumerate(cells) if (error := self._number(cell))]
        total = math.fsum(values)
        if self.sums_to_one and abs(total - 1) > SUM_TOLERANCE:
            return [(None, f"sum to {total!r}, not to 1 within {SUM_TOLERANCE:g}")]
        return []

    def _in_range(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high

    def _number(self, cell: str) -> str | None:
        if not NUMBER.fullmatch(cell):
            return "empty" if not cell.strip() else f"{cell!r} is not a number"
        if math.isinf(float(cell)):
            return f"{cell} overflows a float64"
        return None if self._in_range(float(cell)) else f"{cell} is outside [{self.low:g}, {self.high:g}]"

    def _list(self, cell: str) -> str | None:
        labels = cell.split(" ")
        if not cell.strip():
            return None if self.none == "" else "empty"
        if cell == self.none:
            return None
        if len(set(labels)) < len(labels):
            return f"{cell!r} repeats a label, or has a superfluous space"
        if self.form == "ranking" and len(labels) > self.max_labels:
            return f"{cell!r} has {len(labels)} labels; submission.k allows {self.max_labels}"
        return next((error for label in labels if (error := self._label(label))), None)

    def _label(self, cell: str) -> str | None:
        if cell in self.classes:
            return None
        if not cell.strip():
            return "empty"
        if self.classes:
            known = sorted(self.classes)
            cause = likely_cause(cell, known) or f"the classes are {shortened(known)}"
            return f"{cell!r} is not a class; {cause}"
        if not INTEGER.fullmatch(cell):
            return f"{cell!r} is not an integer, which labels without class names are"
        return None if self._in_range(float(cell)) else f"{cell} is outside [{self.low:g}, {self.high:g}]"


def rules_for(
    form: str,
    limits: Sequence[float] | None = None,
    sums_to_one: bool = False,
    classes: Sequence[str] | None = None,
    max_labels: int = 0,
    none: str | None = None,
) -> CellRules:
    if form not in TASKS_OF_FORM:
        close = nearest(form, tuple(TASKS_OF_FORM))[0]
        raise UserError(
            "submission-form", key=FORM, what=f"no such form: {form!r}", remedy=f"did you mean {close}?"
        )
    low, high = limits or ((0.0, 1.0) if form.startswith("probabilit") else (-math.inf, math.inf))
    return CellRules(form, low, high, sums_to_one, frozenset(classes or ()), max_labels, none)


def cell_rules(rules: Submission, heads: Sequence[Head], sample: SampleSubmission) -> CellRules:
    """What the cells of this competition's submission may hold."""
    if isinstance(rules.form, dict) and rules.rows is None:
        by_name = {head.name: head for head in heads}
        columns = tuple(
            rules_for(
                rules.form[name],
                rules.range if rules.form[name] == "value" else None,
                classes=by_name[name].classes,
                max_labels=rules.k,
                none=rules.none,
            )
            for name in sample.prediction_columns
            if name in by_name
        )
        return CellRules("by column", -math.inf, math.inf, False, frozenset(), columns=columns)
    classes = [name for head in heads for name in head.classes]
    if isinstance(rules.form, dict):
        low, high = rules.range or (-math.inf, math.inf)
        return CellRules("number or label", low, high, False, frozenset(classes))
    exclusive = all(head.exclusive or head.task == "binary" for head in heads)
    # One distribution a line: of the only target, or where each target has a line of its own.
    one_target = len(heads) == 1 if rules.rows is None else "{target}" in rules.rows and len(heads) > 1
    distribution = rules.form == "probabilities" and one_target and exclusive
    sums_to_one = distribution if rules.sums_to_one is None else rules.sums_to_one
    return rules_for(rules.form, rules.range, sums_to_one, classes, rules.k, rules.none)


def _as_number(text: str) -> str:
    return str(int(float(text))) if NUMBER.fullmatch(text) and math.isfinite(float(text)) else text


# What usually damages an id or a label, and the function that undoes it, so that the right one is found.
DAMAGE: tuple[tuple[Callable[[str], str], str], ...] = (
    (str.strip, "surrounding spaces; expected"),
    (str.casefold, "different capitals; expected"),
    (lambda text: IMAGE_NAME.sub("", text), "a folder or a suffix was added or lost; expected"),
    (lambda text: text.lstrip("0"), "leading zeros were added or lost; expected"),
    (_as_number, "the text was read as a number; expected"),
    (lambda text: text.strip("'\""), "surrounding quotes; expected"),
)


def likely_cause(text: str, wanted: Sequence[str]) -> str | None:
    for undo, cause in DAMAGE:
        match = next((name for name in wanted if undo(name) == undo(text) != ""), None)
        if match is not None:
            return f"{cause} {match!r}"
    return None


def shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
