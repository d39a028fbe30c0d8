"""Labels and groups that are different texts and may be one: "cat", "cat " and "Cat"; 1, 1.0 and 01; and the words NaN, None and null,
which are texts here (a missing value is an empty cell). Tables are read as text, so each is a class or a group of its own until
configs/competition.yaml says what it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal

from comp.engine.config import yaml_lines

WORDS = frozenset(("nan", "none", "null"))
MOST = 30  # labels that a proposed line names
FILE = "configs/competition.yaml"


def normalized(text: str) -> str:
    """The same for texts that differ only in whitespace, case or number format."""
    words = " ".join(text.split()).casefold()
    if re.fullmatch(r"[+-]?\d+(\.\d*)?", words):
        number = Decimal(words)
        return format(number.normalize() if number else Decimal(0), "f")
    return words


def merge_spellings(counts: Mapping[str, int]) -> dict[str, str]:
    """Every text -> the most frequent of those that differ from it only so; of several the first to occur."""
    speaks: dict[str, str] = {}
    for text in sorted(counts, key=lambda each: -counts[each]):
        speaks.setdefault(normalized(text), text)
    return {text: speaks[normalized(text)] for text in counts}


def label_faults(
    counts: Mapping[str, int], classes: Sequence[str], unknown: str | None
) -> list[tuple[str, str]]:
    """(the label to show, what is wrong and the line that resolves it): where competition.classes says nothing."""
    into = merge_spellings(counts)
    apart = [text for text in classes if text in into and into[text] != text]
    words = [text for text in classes if text in counts and normalized(text) in WORDS and text != unknown]
    keeps = f"{FILE}: classes: {_shown(list(classes))}"
    found = []
    if apart:
        first, one = apart[0], into[apart[0]]
        mapping = {text: into.get(text, text) for text in classes}
        found.append(
            (first, f"{first!r} and {one!r} differ only in whitespace, case or number format, and are two classes of {counts[first]} and "
            f"{counts[one]} rows{_more(apart)}; {FILE}: classes: {_shown(mapping)} makes one of them, {keeps} keeps them apart")
        )  # fmt: skip
    if words:
        found.append(
            (words[0], f"{words[0]!r} is a text, no missing value, and would be a class, of {counts[words[0]]} rows{_more(words)}; "
            f"{keeps} says that it is one; of a missing label the cell is empty")
        )  # fmt: skip
    return found


def group_faults(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """The same of groups: where competition.group_spelling says nothing."""
    into = merge_spellings(counts)
    apart = sorted(text for text in counts if into[text] != text)
    words = sorted(text for text in counts if normalized(text) in WORDS)
    found = []
    if apart:
        first, one = apart[0], into[apart[0]]
        found.append(
            (first, f"the groups {first!r} and {one!r} differ only in whitespace, case or number format, and could stand on both sides of "
            f"a fold{_more(apart)}; {FILE}: group_spelling: merge makes one of them, {FILE}: group_spelling: keep leaves two")
        )  # fmt: skip
    if words:
        found.append(
            (words[0], f"the group {words[0]!r} is a text, no missing value, and would be one group of {counts[words[0]]} rows{_more(words)}; "
            f"{FILE}: group_spelling: keep says that it is one; rows without a group want an id each")
        )  # fmt: skip
    return found


def _more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more like it" if len(names) > 1 else ""


def _shown(value: Mapping[str, str] | Sequence[str]) -> str:
    """As it stands in YAML; the first few where there are many."""
    if len(value) > MOST:
        value = dict(list(value.items())[:MOST]) if isinstance(value, Mapping) else list(value)[:MOST]
        return f"{yaml_lines.inline(value)[:-1]}, … and the others)"
    return yaml_lines.inline(dict(value) if isinstance(value, Mapping) else list(value))
