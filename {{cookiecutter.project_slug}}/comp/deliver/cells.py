"""What one cell of a submission may hold, and what probably happened to a text that is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from comp.config import Refused, nearest

FORMS = ("probability", "probabilities", "label", "value")
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

    def faults(self, cells: Sequence[str]) -> list[tuple[int | None, str]]:
        """(which cell, what is wrong with it); of a sum that is wrong no single cell is to blame."""
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
) -> Form:
    if name not in FORMS:
        close = nearest(name, FORMS)[0]
        raise Refused(f"competition.submission.form: there is no form {name!r}; the nearest is {close}")
    low, high = limits or ((0.0, 1.0) if name.startswith("probabilit") else (-math.inf, math.inf))
    return Form(name, low, high, sums_to_one, frozenset(classes or ()))


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
