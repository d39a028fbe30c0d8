"""The forms a host asks for: from probabilities or values to the cells of the sample's columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from comp.engine.bank import thresholds as decide
from comp.engine.config.competition_schema import Submission
from comp.engine.data import sample_submission
from comp.engine.data.sample_submission import SampleSubmission
from comp.engine.errors import Refused
from comp.engine.store import paths
from comp.engine.tasks.kinds import Array, Head

# head -> (scored rows, outputs): probabilities or values, as the metric sees them
Answers = Mapping[str, Array]
Cuts = Mapping[str, Sequence[float]]  # head -> where its values become the next label
FITTING_TASKS = {
    "probability": ("binary",),
    "probabilities": ("multiclass", "binary", "multilabel", "retrieval"),
    "label": ("binary", "multiclass", "ordinal", "regression", "retrieval"),
    "value": ("regression", "ordinal"),
    "labels": ("multilabel",),
    "ranking": ("multiclass", "retrieval", "multilabel"),
}


@dataclass(frozen=True)
class Written:
    """Columns to fill in, as text, in the sample's order; and what a person should know of how they came about."""

    lines: list[list[str]]  # header first
    notes: list[str]


def form_named(rules: Submission, target: str) -> str:
    """The form of one target; with several kinds of targets each has its own."""
    return rules.form[target] if isinstance(rules.form, dict) else rules.form


def refuse_misfit(rules: Submission, heads: Sequence[Head]) -> None:
    where = "competition.submission"
    for head in heads:
        form = form_named(rules, head.name) if not isinstance(rules.form, str) else rules.form
        if head.task not in FITTING_TASKS[form] and not (form == "probability" and rules.rows):
            fits = [form for form, tasks in FITTING_TASKS.items() if head.task in tasks]
            takes = " or ".join(fits)
            raise Refused(
                f"{where}.form: the {head.task} target {head.name!r} is written as {takes}, not as {form}"
            )
        parted = next((name for name in head.classes if " " in name), None)
        if form in ("labels", "ranking") and parted is not None:
            raise Refused(
                f"{where}.form: {form} are parted by spaces, and the class {parted!r} holds one; competition.classes can map it to "
                f"what the host calls it, like {{{parted!r}: {parted.replace(' ', '_')!r}}}"
            )
    if rules.sums_to_one and rules.form != "probabilities":
        raise Refused(f"{where}.sums_to_one: only form probabilities has columns to sum, not {rules.form}")


def from_form(
    rules: Submission,
    heads: Sequence[Head],
    answers: Answers,
    sample: SampleSubmission,
    cuts: Cuts,
    ids: Sequence[str] | None = None,
) -> Written:
    """`ids` are the rows of `answers`, each once: those of the sample, or, of a long form, what its lines speak of."""
    notes: list[str] = []
    cells: Sequence[Sequence[str]]
    if rules.rows is not None:
        cells = _long(rules, heads, answers, sample, cuts, ids or sample.row_keys, notes)
    else:
        once = sample.deduplicated()
        columns = _columns(rules, heads, answers, once, cuts, once.prediction_columns, notes)
        by_row = dict(zip(once.row_keys, zip(*columns, strict=True), strict=True))
        cells = [by_row[key] for key in sample.row_keys]
    lines = [sample.fill(number, line) for number, line in enumerate(cells)]
    return Written([list(sample.columns), *lines], notes)


def _columns(
    rules: Submission,
    heads: Sequence[Head],
    answers: Answers,
    sample: SampleSubmission,
    cuts: Cuts,
    asked: Sequence[str],
    notes: list[str],
) -> list[list[str]]:
    """One list of cells for each name that is asked for."""
    if isinstance(rules.form, dict):
        made = []
        by_name = {head.name: head for head in heads}
        for name in asked:
            if name not in by_name:
                raise Refused(
                    f"{paths.relative(sample.file)}:1: column {name!r} is none of the targets {', '.join(by_name)}"
                )
            alone = rules.model_copy(update={"form": rules.form[name]})
            made += _columns(alone, [by_name[name]], answers, sample, cuts, [name], notes)
        return made
    if rules.form in ("label", "labels", "ranking"):
        return list(labels(rules, heads, answers, sample, cuts, notes, asked))
    table = numbers(rules, heads, answers, sample, notes, asked)
    table = clipped(table, rules.range, sample, notes) if rules.form == "value" else table
    # repr of a float64 is the shortest text that reads back as the same float64: nothing is rounded.
    return [list(map(repr, column)) for column in table.T.tolist()]


def _long(
    rules: Submission,
    heads: Sequence[Head],
    answers: Answers,
    sample: SampleSubmission,
    cuts: Cuts,
    ids: Sequence[str],
    notes: list[str],
) -> list[list[str]]:
    """A line for each class or target of a row: one column to fill in, or, of a target, one for each of its classes."""
    assert rules.rows is not None
    place = {each: i for i, each in enumerate(ids)}
    if rules.form == "probabilities" and "{target}" in rules.rows and len(heads) > 1:
        lines = sample_submission.parse_ids(rules.rows, sample.row_keys, heads)
        tables = {
            head.name: numbers(rules, [head], answers, sample, notes, sample.prediction_columns).tolist()
            for head in heads
        }
        return [list(map(repr, tables[line.name][place[line.row]])) for line in lines]
    if len(sample.prediction_columns) != 1:
        raise Refused(
            f"{paths.relative(sample.file)}:1: with submission.rows one column is filled in, not {len(sample.prediction_columns)}"
        )
    lines = sample_submission.parse_ids(rules.rows, sample.row_keys, heads)
    asked = list(dict.fromkeys(line.name for line in lines))
    columns = _columns(rules, heads, answers, sample, cuts, asked, notes)
    by_name = dict(zip(asked, columns, strict=True))
    return [[by_name[line.name][place[line.row]]] for line in lines]


def numbers(
    rules: Submission,
    heads: Sequence[Head],
    answers: Answers,
    sample: SampleSubmission,
    notes: list[str],
    asked: Sequence[str],
) -> Array:
    """(rows, the names asked for), found by name; a lone output fills a lone column whatever it is called."""
    outputs: dict[str, Array] = {}
    for head in heads:
        value = answers[head.name]
        if (
            (rules.form == "probabilities" or rules.rows is not None)
            and head.task == "binary"
            and set(asked) == set(head.classes)
        ):
            outputs |= {head.classes[0]: 1 - value[:, 0], head.classes[1]: value[:, 0]}
        else:
            outputs |= dict(zip(head.outputs, value.T, strict=True))
        if rules.form == "probability" and head.task == "binary" and head.classes and rules.rows is None:
            notes.append(f"{head.name}: the probability of {head.classes[1]!r}, not of {head.classes[0]!r}")
    if len(outputs) == len(asked) == 1:
        return np.column_stack(list(outputs.values()))
    where = paths.relative(sample.file)
    for column in asked:
        if column not in outputs:
            raise Refused(
                f"{where}:1: column {column!r} is no output of the model, which has {', '.join(outputs)}; see competition.classes"
            )
    exclusive = [each for head in heads if head.task in ("multiclass", "retrieval") for each in head.outputs]
    left = [each for each in exclusive if each not in asked]
    if left:
        raise Refused(
            f"{where}:1: has no column for class {left[0]!r}, which the model predicts; see competition.classes"
        )
    return np.column_stack([outputs[column] for column in asked])


def clipped(
    table: Array, limits: Sequence[float] | None, sample: SampleSubmission, notes: list[str]
) -> Array:
    """A regression oversteps its range a little, and one such value makes a host refuse the file. Far out is a fault."""
    if limits is None:
        return table
    low, high = limits
    room = (high - low) / 4
    far = np.argwhere((table < low - room) | (table > high + room))
    if len(far):
        row, column = far[0]
        named = sample.prediction_columns[column] if column < len(sample.prediction_columns) else str(column)
        raise Refused(
            f"row {sample.ids[row]!r}, column {named!r}: the model says {table[row, column]:g}, far outside the range "
            f"[{low:g}, {high:g}] of competition.submission.range (and {len(far) - 1} more like it)"
        )
    over = int(((table < low) | (table > high)).sum())
    if over:
        notes.append(
            f"{over} of {table.size} values lay a little outside [{low:g}, {high:g}] and were moved to its edge"
        )
    return np.clip(table, low, high)


def labels(
    rules: Submission,
    heads: Sequence[Head],
    answers: Answers,
    sample: SampleSubmission,
    cuts: Cuts,
    notes: list[str],
    asked: Sequence[str],
) -> Iterator[list[str]]:
    """One list of class names (or of several, or the likeliest few) a column, written as the raw table writes them."""
    by_name = {head.name: head for head in heads}
    if len(heads) == len(asked) == 1:
        by_name = {asked[0]: heads[0]}
    for column in asked:
        if column not in by_name:
            known = ", ".join(by_name)
            raise Refused(
                f"{paths.relative(sample.file)}:1: column {column!r} is none of the targets {known}"
            )
        head = by_name[column]
        value, cut = answers[head.name], cuts.get(head.name)
        if rules.form == "labels":
            yield list(_several(rules, head, value, cut, column, notes))
            continue
        if rules.form == "ranking":
            yield _ranked(rules, head, value, cut)
            continue
        if head.task == "regression":
            value = clipped(value, rules.range, sample, notes)
        if cut is not None and head.unknown:
            codes = decide.with_unknown(value, head.classes.index(head.unknown), cut[0], 1)[:, 0]
        elif cut is not None:  # of two classes the one cut is the threshold
            codes = decide.apply_cuts(value[:, 0], np.asarray(cut))
            places = ", ".join(f"{each:.4g}" for each in cut)
            notes.append(f"{column}: cut at {places}, as fitted on the OOF rows")
        else:
            codes = head.spec.to_label(value)
        if head.classes:
            yield [head.classes[code] for code in np.clip(codes, 0, len(head.classes) - 1).tolist()]
        else:
            yield [str(code) for code in codes.tolist()]


def _several(
    rules: Submission, head: Head, value: Array, cut: Sequence[float] | None, column: str, notes: list[str]
) -> Iterator[str]:
    """Every label above its threshold; at least the likeliest one, unless a row may be without any (submission.none)."""
    thresholds = np.full(len(head.outputs), 0.5) if cut is None else np.asarray(cut)
    notes.append(
        f"{column}: thresholds from {thresholds.min():.4g} to {thresholds.max():.4g}, "
        + ("as none were fitted" if cut is None else "as fitted on the OOF rows")
    )
    chosen = decide.apply_threshold(value, thresholds, at_least_one=rules.none is None)
    notes.append(
        f"{column}: {chosen.sum(axis=1).mean():.2f} labels a row, {int((chosen.sum(axis=1) == 0).sum())} rows without any"
    )
    for row in chosen:
        yield " ".join(head.classes[code] for code in np.flatnonzero(row)) or rules.none or ""


def _ranked(rules: Submission, head: Head, value: Array, cut: Sequence[float] | None) -> list[str]:
    if cut is not None and head.unknown:
        code = head.classes.index(head.unknown)
        order = decide.with_unknown(value, code, cut[0], rules.k)
        return [" ".join(head.classes[code] for code in row) for row in order.tolist()]
    order = np.argsort(-value, axis=1, kind="stable")[:, : rules.k]
    return [" ".join(head.classes[code] for code in row) for row in order.tolist()]
