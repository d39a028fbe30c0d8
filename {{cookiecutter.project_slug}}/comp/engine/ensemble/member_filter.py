"""Filters over members: `score>0.9 model~convnext` in configs/ensembles/*.yaml and in `comp bank`.

name~exp0       the address contains it          score>0.9    also < >= <= =; the score over all OOF rows
model~convnext  of the run's config; of an ensemble, those of all its runs      task=binary
exp003:snapshots, exp003:seeds                   all snapshots or seeds of a run, in order
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

from comp.engine.bank import bank
from comp.engine.config import resolve
from comp.engine.config.resolve import nearest
from comp.engine.ensemble import average
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

TERM = re.compile(r"^(\w+)(>=|<=|>|<|=|~)(.+)$")
FIELDS = ("name", "task", "model", "score")
PLURAL = {":snapshots": ":snap", ":seeds": ":seed"}
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
    "=": operator.eq,
}


def is_filter(entry: str) -> bool:
    return any(operator_ in entry for operator_ in "<>=~") or entry.endswith(tuple(PLURAL))


def addresses(entry: str) -> list[str]:
    """The members that a filter matches. A filter with conditions matches runs only: with their seeds and
    snapshots they would count twice."""
    known = [address for address in bank.members() if (bank.folder(address) / "oof.arrow").exists()]
    for end, stem in PLURAL.items():
        if entry.endswith(end):
            found = [a for a in known if a.startswith(entry.removesuffix(end) + stem)]
            found.sort(key=lambda a: [int(n) for n in re.findall(r"\d+", a.partition(":")[2])])
            if not found:
                there = f"there are {', '.join(known)}" if known else "there are no members yet"
                raise UserError("filter-empty", where=entry, what="no member matches", remedy=there)
            return found
    runs = [a for a in known if ":" not in a and paths.run_folder(a).is_dir()]
    found = matching(entry, runs)
    if not found:
        there = f"there are {', '.join(runs)}" if runs else "there are none yet: comp train exp001"
        raise UserError("filter-empty", where=entry, what="no run matches", remedy=there)
    return found


def matching(text: str, known: list[str]) -> list[str]:
    """The addresses of `known` that match every term of a filter, in their order."""
    terms = [_term(term) for term in text.split()]
    return [address for address in known if all(_matches(address, *term) for term in terms)]


def _term(text: str) -> tuple[str, str, str]:
    """(field, operator, value)"""
    found = TERM.match(text)
    if not found:
        raise _invalid(text, "not a filter", "write score>0.9, model~convnext, task=binary or name~exp0")
    field, sign, value = found.groups()
    if field not in FIELDS:
        raise _invalid(text, f"no field {field}", f"the nearest is {nearest(field, FIELDS)[0]}")
    if field == "score":
        try:
            float(value)
        except ValueError:
            raise _invalid(text, f"{value} is not a number") from None
        if sign == "~":
            raise _invalid(text, "a score is a number", "compare it with <, >, <=, >= or =")
    elif sign not in ("=", "~"):
        raise _invalid(text, f"{field} is text", "compare it with = or ~ (contains)")
    return field, sign, value


def _invalid(text: str, what: str, remedy: str = "") -> UserError:
    return UserError("filter-invalid", where=text, what=what, remedy=remedy)


def _matches(address: str, field: str, sign: str, value: str) -> bool:
    if field == "score":
        score = _score(address)
        return score is not None and COMPARE[sign](score, float(value))
    text = address if field == "name" else _config_value(address, field)
    return value in text if sign == "~" else text == value


def _score(address: str) -> float | None:
    file = bank.folder(address) / "score.json"
    return artifacts.read_json(artifacts.verified(file))["oof"] if artifacts.manifest_entry(file) else None


def _config_value(address: str, field: str) -> str:
    """The tasks or the model of a run. Of an ensemble: the competition's tasks, and the models of all its
    runs."""
    recipe = bank.folder(address) / "apply.json"
    if recipe.exists():
        if field == "task":
            return _tasks(resolve.load(paths.root(), "base").config)
        leaves = average.leaves(artifacts.read_json(artifacts.verified(recipe)))
        runs = {leaf.partition(":")[0] for leaf in leaves}
        return ", ".join(sorted({_config_value(run, field) for run in runs}))
    file = paths.run_folder(address.partition(":")[0]) / "config.yaml"
    if not artifacts.manifest_entry(file):
        return ""
    cfg = resolve.from_yaml(artifacts.verified(file))
    return cfg.model.name if field == "model" else _tasks(cfg)


def _tasks(cfg: resolve.Config) -> str:
    return ", ".join(dict.fromkeys(cfg.competition.tasks.values()))
