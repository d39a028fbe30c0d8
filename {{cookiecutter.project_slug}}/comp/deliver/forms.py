"""The forms a host asks for: from probabilities or values to the cells of the sample's columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from comp import decide, store
from comp.config import Refused
from comp.deliver.sample import Sample
from comp.knobs import Submission
from comp.tasks import Array, Head

# head -> (scored rows, outputs): probabilities or values, as the metric sees them
Answers = Mapping[str, Array]
Cuts = Mapping[str, Sequence[float]]  # head -> where its values become the next label
FITTING_TASKS = {
    "probability": ("binary",),
    "probabilities": ("multiclass", "binary"),
    "label": ("binary", "multiclass", "ordinal", "regression"),
    "value": ("regression", "ordinal"),
}


@dataclass(frozen=True)
class Written:
    """Columns to fill in, as text, in the sample's order; and what a person should know of how they came about."""

    lines: list[list[str]]  # header first
    notes: list[str]


def refuse_misfit(rules: Submission, heads: Sequence[Head]) -> None:
    where = "competition.submission"
    for head in heads:
        if head.task not in FITTING_TASKS[rules.form]:
            fits = [form for form, tasks in FITTING_TASKS.items() if head.task in tasks]
            takes = " or ".join(fits)
            raise Refused(
                f"{where}.form: the {head.task} target {head.name!r} is written as {takes}, not as {rules.form}"
            )
    if rules.sums_to_one and rules.form != "probabilities":
        raise Refused(f"{where}.sums_to_one: only form probabilities has columns to sum, not {rules.form}")


def from_form(
    rules: Submission, heads: Sequence[Head], answers: Answers, sample: Sample, cuts: Cuts
) -> Written:
    notes: list[str] = []
    cells: Iterable[Sequence[str]]
    if rules.form == "label":
        cells = zip(*labels(rules, heads, answers, sample, cuts, notes), strict=True)
    else:
        table = numbers(rules, heads, answers, sample, notes)
        table = clipped(table, rules.range, sample, notes) if rules.form == "value" else table
        # repr of a float64 is the shortest text that reads back as the same float64: nothing is rounded.
        cells = (list(map(repr, line)) for line in table.tolist())
    return Written([list(sample.columns), *_with_ids(cells, sample)], notes)


def numbers(
    rules: Submission, heads: Sequence[Head], answers: Answers, sample: Sample, notes: list[str]
) -> Array:
    """(rows, the sample's columns), found by name; a lone output fills a lone column whatever it is called."""
    outputs: dict[str, Array] = {}
    for head in heads:
        value = answers[head.name]
        if (
            rules.form == "probabilities"
            and head.task == "binary"
            and set(sample.answers) == set(head.classes)
        ):
            outputs |= {head.classes[0]: 1 - value[:, 0], head.classes[1]: value[:, 0]}
        else:
            outputs |= dict(zip(head.outputs, value.T, strict=True))
        if rules.form == "probability" and head.classes:
            notes.append(f"{head.name}: the probability of {head.classes[1]!r}, not of {head.classes[0]!r}")
    if len(outputs) == len(sample.answers) == 1:
        return np.column_stack(list(outputs.values()))
    where = store.shown(sample.file)
    for column in sample.answers:
        if column not in outputs:
            raise Refused(
                f"{where}:1: column {column!r} is no output of the model, which has {', '.join(outputs)}; see competition.classes"
            )
    exclusive = [each for head in heads if head.task == "multiclass" for each in head.outputs]
    left = [each for each in exclusive if each not in sample.answers]
    if left:
        raise Refused(
            f"{where}:1: has no column for class {left[0]!r}, which the model predicts; see competition.classes"
        )
    return np.column_stack([outputs[column] for column in sample.answers])


def clipped(table: Array, limits: Sequence[float] | None, sample: Sample, notes: list[str]) -> Array:
    """A regression oversteps its range a little, and one such value makes a host refuse the file. Far out is a fault."""
    if limits is None:
        return table
    low, high = limits
    room = (high - low) / 4
    far = np.argwhere((table < low - room) | (table > high + room))
    if len(far):
        row, column = far[0]
        raise Refused(
            f"row {sample.ids[row]!r}, column {sample.answers[column]!r}: the model says {table[row, column]:g}, far outside the range "
            f"[{low:g}, {high:g}] of competition.submission.range (and {len(far) - 1} more like it)"
        )
    over = int(((table < low) | (table > high)).sum())
    if over:
        notes.append(
            f"{over} of {table.size} values lay a little outside [{low:g}, {high:g}] and were moved to its edge"
        )
    return np.clip(table, low, high)


def labels(
    rules: Submission, heads: Sequence[Head], answers: Answers, sample: Sample, cuts: Cuts, notes: list[str]
) -> Iterator[list[str]]:
    """One list of class names a column, written as the raw table writes them."""
    by_name = {head.name: head for head in heads}
    if len(heads) == len(sample.answers) == 1:
        by_name = {sample.answers[0]: heads[0]}
    for column in sample.answers:
        if column not in by_name:
            known = ", ".join(by_name)
            raise Refused(f"{store.shown(sample.file)}:1: column {column!r} is none of the targets {known}")
        head = by_name[column]
        value, cut = answers[head.name], cuts.get(head.name)
        if head.task == "regression":
            value = clipped(value, rules.range, sample, notes)
        if cut is not None:  # of two classes the one cut is the threshold
            codes = decide.apply_cuts(value[:, 0], np.asarray(cut))
            places = ", ".join(f"{each:.4g}" for each in cut)
            notes.append(f"{column}: cut at {places}, as fitted on the OOF rows")
        else:
            codes = head.row.label(value)
        if head.classes:
            yield [head.classes[code] for code in np.clip(codes, 0, len(head.classes) - 1).tolist()]
        else:
            yield [str(code) for code in codes.tolist()]


def _with_ids(cells: Iterable[Sequence[str]], sample: Sample) -> Iterator[list[str]]:
    for each, line in zip(sample.ids, cells, strict=True):
        yield [*line[: sample.key], each, *line[sample.key :]]
