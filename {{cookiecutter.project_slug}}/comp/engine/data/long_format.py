"""Submissions with a line for each class or target of a row: their ids are built by a template like `{id}_{class}`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from comp.engine.errors import Refused
from comp.engine.tasks.kinds import Head


class LongId(NamedTuple):
    row: str  # the key that is scored
    name: str  # the class or target that this line asks for


def parse_ids(template: str, ids: Sequence[str], heads: Sequence[Head]) -> list[LongId]:
    """What each line asks for."""
    where = f"competition.submission.rows: {template}"
    if "{id}" not in template or not re.search(r"\{(class|target)\}", template):
        raise Refused(
            f"{where}: a template of {{id}} and {{class}} or {{target}} is wanted, like {{id}}_{{class}}"
        )
    known = class_names(template, heads)
    asked = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    parts = re.split(r"(\{id\}|\{class\}|\{target\})", template)
    kinds = {"{id}": "(?P<id>.+?)", "{class}": f"(?P<name>{asked})", "{target}": f"(?P<name>{asked})"}
    pattern = re.compile("".join(kinds.get(part, re.escape(part)) for part in parts))
    out = []
    for line, each in enumerate(ids, 2):
        found = pattern.fullmatch(each)
        if found is None:
            raise Refused(
                f"{where}: line {line} of the sample, {each!r}, is not built like that from {', '.join(known[:6])}"
            )
        out.append(LongId(found["id"], found["name"]))
    return out


def class_names(template: str, heads: Sequence[Head]) -> list[str]:
    if "{target}" in template and len(heads) > 1:
        return [head.name for head in heads]
    return [
        name
        for head in heads
        for name in (head.outputs if "{class}" in template or len(head.outputs) > 1 else [head.name])
    ]
