"""What one cell of a submission may hold, and what probably happened to a text that is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from comp.engine.config.competition_schema import Submission
from comp.engine.config.resolve import nearest
from comp.engine.data.sample_submission import SampleSubmission
from comp.engine.errors import Refused
from comp.engine.tasks.kinds import Head

FORMS = ("probability", "probabilities", "label", "value", "labels", "ranking")
DIGITS = re.compile(r"[-+.\deE]*", re.ASCII)
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
WHOLE = re.compile(r"-?(0|[1-9]\d*)", re.ASCII)
SUM_TOLERANCE = 1e-6
IMAGE_NAME = re.compile(r"^.*/|\.(jpe?g|png|tiff?|webp|bmp|gif|dcm|dicom|npy|npz)$", re.IGNORECASE)


@dataclass(frozen=True)
class Form:
    """A form of competition.submission with all that it says about cells."""

    name: str
    low: float
    high: float
    sums_to_one: bool
    classes: frozenset[str]
    most: int = 0  # labels of a ranking
    none: str | None = None  # what a row without labels holds
    columns: tuple[Form, ...] = ()  # where every column has a form of its own

    def faults(self, cells: Sequence[str]) -> list[tuple[int | None, str]]:
        """(which cell, what is wrong with it); of a sum that is wrong no single cell is to blame."""
        if self.columns:
            each = zip(self.columns, cells, strict=True)
            return [(i, fault) for i, (form, cell) in enumerate(each) for _, fault in form.faults([cell])]
        if self.name == "either":  # lines of several targets: which of them a line asks for, its id says
            return [(i, fault) for i, c in enumerate(cells) if self._number(c) and (fault := self._label(c))]
        if self.name in ("labels", "ranking"):
            return [(i, fault) for i, cell in enumerate(cells) if (fault := self._list(cell))]
        if self.name == "label":
            return [(i, fault) for i, cell in enumerate(cells) if (fault := self._label(cell))]
        # Twice as fast as cell by cell, and of millions of cells all are sound. The pattern comes first because float()
        # also takes nan, 1_0, spaces and the digits of other scripts.
        values: list[float] = []
        if DIGITS.fullmatch("".join(cells)):
            try:
                values = list(map(float, cells))
            except ValueError:
                values = []
        if not values or not self._within(min(values)) or not self._within(max(values)):
            return [(i, fault) for i, cell in enumerate(cells) if (fault := self._number(cell))]
        total = math.fsum(values)
        if self.sums_to_one and abs(total - 1) > SUM_TOLERANCE:
            return [(None, f"sum to {total!r}, not to 1 within {SUM_TOLERANCE:g}")]
        return []

    def _within(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high

    def _number(self, cell: str) -> str | None:
        if not NUMBER.fullmatch(cell):
            return "is empty" if not cell.strip() else f"{cell!r} is not a number"
        if math.isinf(float(cell)):
            return f"{cell} is too large for a number"
        return None if self._within(float(cell)) else f"{cell} lies outside [{self.low:g}, {self.high:g}]"

    def _list(self, cell: str) -> str | None:
        labels = cell.split(" ")
        if not cell.strip():
            return None if self.none == "" else "is empty"
        if cell == self.none:
            return None
        if len(set(labels)) < len(labels):
            return f"{cell!r} names a label twice, or has a space too many"
        if self.name == "ranking" and len(labels) > self.most:
            return f"{cell!r} lists {len(labels)} labels, where submission.k allows {self.most}"
        return next((fault for label in labels if (fault := self._label(label))), None)

    def _label(self, cell: str) -> str | None:
        if cell in self.classes:
            return None
        if not cell.strip():
            return "is empty"
        if self.classes:
            known = sorted(self.classes)
            return f"{cell!r} is no class; {likeness(cell, known) or f'the classes are {some(known)}'}"
        if not WHOLE.fullmatch(cell):
            return f"{cell!r} is no whole number, as labels without names are"
        return None if self._within(float(cell)) else f"{cell} lies outside [{self.low:g}, {self.high:g}]"


def form_of(
    name: str,
    limits: Sequence[float] | None = None,
    sums_to_one: bool = False,
    classes: Sequence[str] | None = None,
    most: int = 0,
    none: str | None = None,
) -> Form:
    if name not in FORMS:
        close = nearest(name, FORMS)[0]
        raise Refused(f"competition.submission.form: there is no form {name!r}; the nearest is {close}")
    low, high = limits or ((0.0, 1.0) if name.startswith("probabilit") else (-math.inf, math.inf))
    return Form(name, low, high, sums_to_one, frozenset(classes or ()), most, none)


def rules_of_cells(rules: Submission, heads: Sequence[Head], sample: SampleSubmission) -> Form:
    """What the cells of this submission may hold."""
    if isinstance(rules.form, dict) and rules.rows is None:
        by_name = {head.name: head for head in heads}
        each = tuple(
            form_of(
                rules.form[name],
                rules.range if rules.form[name] == "value" else None,
                classes=by_name[name].classes,
                most=rules.k,
                none=rules.none,
            )
            for name in sample.prediction_columns
            if name in by_name
        )
        return Form("mixed", -math.inf, math.inf, False, frozenset(), columns=each)
    classes = [each for head in heads for each in head.classes]
    if isinstance(rules.form, dict):
        low, high = rules.range or (-math.inf, math.inf)
        return Form("either", low, high, False, frozenset(classes))
    apart = all(head.exclusive or head.task == "binary" for head in heads)
    # One distribution a line: of a lone target, or where each target has a line of its own.
    one_each = len(heads) == 1 if rules.rows is None else "{target}" in rules.rows and len(heads) > 1
    alone = rules.form == "probabilities" and one_each and apart
    sums_to_one = alone if rules.sums_to_one is None else rules.sums_to_one
    return form_of(rules.form, rules.range, sums_to_one, classes, rules.k, rules.none)


def _as_number(text: str) -> str:
    return str(int(float(text))) if NUMBER.fullmatch(text) and math.isfinite(float(text)) else text


# What usually happens to an id or a label on its way, and how to undo it to see which one it was.
ACCIDENTS: tuple[tuple[Callable[[str], str], str], ...] = (
    (str.strip, "spaces around it; right is"),
    (str.casefold, "capitals are kept as they are; right is"),
    (lambda text: IMAGE_NAME.sub("", text), "a folder or a suffix too many or too few; right is"),
    (lambda text: text.lstrip("0"), "leading zeros lost or added, text is never read as a number; right is"),
    (_as_number, "text turned into a number on its way; right is"),
    (lambda text: text.strip("'\""), "quotes around it; right is"),
)


def likeness(text: str, wanted: Sequence[str]) -> str | None:
    for undo, words in ACCIDENTS:
        match = next((each for each in wanted if undo(each) == undo(text) != ""), None)
        if match is not None:
            return f"{words} {match!r}"
    return None


def some(words: Sequence[str]) -> str:
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")
