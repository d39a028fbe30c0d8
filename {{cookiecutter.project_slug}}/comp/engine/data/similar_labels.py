"""Finds labels and groups that differ as text but may mean the same: "cat", "cat " and "Cat"; 1, 1.0 and 01.
Also the words NaN, None and null, which are not missing values here; an empty cell is.

Tables are read as text, so different texts are different classes or groups unless configs/competition.yaml
merges them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

from comp.engine.config import declaration, yaml_lines

NULL_WORDS = frozenset(("nan", "none", "null"))
DIFFER = "differ only in whitespace, case or number format"
LISTED = 30  # labels that a proposed line of YAML lists


class Doubt(NamedTuple):
    """A label or group that may be another spelling of a second one, and the line of competition.yaml
    that decides whether they are equal."""

    text: str
    code: str
    what: str
    remedy: str


def normalized(text: str) -> str:
    """A form that is equal for texts that differ only in whitespace, case or number format."""
    words = " ".join(text.split()).casefold()
    if re.fullmatch(r"[+-]?\d+(\.\d*)?", words):
        number = Decimal(words)
        return format(number.normalize() if number else Decimal(0), "f")
    return words


def merge_spellings(counts: Mapping[str, int]) -> dict[str, str]:
    """text -> the most frequent of its spellings; of equally frequent ones the first to occur."""
    most_frequent: dict[str, str] = {}
    for text in sorted(counts, key=lambda each: -counts[each]):
        most_frequent.setdefault(normalized(text), text)
    return {text: most_frequent[normalized(text)] for text in counts}


def of_labels(counts: Mapping[str, int], classes: Sequence[str], unknown: str | None) -> list[Doubt]:
    """Checks labels if competition.classes is not declared. `counts`: rows of each label."""
    into = merge_spellings(counts)
    different = [text for text in classes if text in into and into[text] != text]
    words = [text for text in classes if text in counts and text != unknown and _is_null_word(text)]
    separate = f"{declaration.FILE}: classes: {_yaml(list(classes))}"
    found = []
    if different:
        first, other = different[0], into[different[0]]
        mapping = {text: into.get(text, text) for text in classes}
        found.append(
            Doubt(
                first,
                "labels-similar",
                f"{first!r} and {other!r} {DIFFER}, and are two classes of {counts[first]} and "
                f"{counts[other]} rows{_more(different)}",
                f"{declaration.FILE}: classes: {_yaml(mapping)} makes one of them, {separate} keeps two",
            )
        )
    if words:
        found.append(
            Doubt(
                words[0],
                "label-null-word",
                f"{words[0]!r} is a text, not a missing value, and makes a class of {counts[words[0]]} rows"
                f"{_more(words)}",
                f"{separate} keeps it as a class; for a missing label leave the cell empty",
            )
        )
    return found


def of_groups(counts: Mapping[str, int]) -> list[Doubt]:
    """Checks groups if competition.group_spelling is not declared. `counts`: rows of each group."""
    into = merge_spellings(counts)
    different = sorted(text for text in counts if into[text] != text)
    words = sorted(filter(_is_null_word, counts))
    spelling = f"{declaration.FILE}: group_spelling"
    found = []
    if different:
        first, other = different[0], into[different[0]]
        found.append(
            Doubt(
                first,
                "groups-similar",
                f"the groups {first!r} and {other!r} {DIFFER}, and may be in different folds"
                f"{_more(different)}",
                f"{spelling}: merge makes one of them, {spelling}: keep leaves two",
            )
        )
    if words:
        found.append(
            Doubt(
                words[0],
                "group-null-word",
                f"the group {words[0]!r} is a text, not a missing value, and makes one group of "
                f"{counts[words[0]]} rows{_more(words)}",
                f"{spelling}: keep leaves it a group; rows without a group need a name of their own each",
            )
        )
    return found


def _is_null_word(text: str) -> bool:
    return normalized(text) in NULL_WORDS


def _more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more like it" if len(names) > 1 else ""


def _yaml(value: Mapping[str, str] | Sequence[str]) -> str:
    """YAML on one line, with at most LISTED items."""
    if len(value) > LISTED:
        value = dict(list(value.items())[:LISTED]) if isinstance(value, Mapping) else list(value)[:LISTED]
        return f"{yaml_lines.inline(value)[:-1]}, … and the others)"
    return yaml_lines.inline(dict(value) if isinstance(value, Mapping) else list(value))
