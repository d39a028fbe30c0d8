"""Members by what they are, not by name: `score>0.9 model~convnext` in configs/ensembles/*.yaml and behind `comp bank`.

name~exp0       the address contains it          score>0.9    also < >= <=, of the score over all OOF rows
model~convnext  of the run's config, of an ensemble those of all its runs      task=binary
exp003:snapshots, exp003:seeds                   all snapshots, all seeds of a run, in their order
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
from comp.engine.errors import Refused
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
    return any(sign in entry for sign in "<>=~") or entry.endswith(tuple(PLURAL))


def addresses(entry: str) -> list[str]:
    """What an entry of `members` stands for. A filter is about runs: their seeds and snapshots would count them twice."""
    known = [address for address in bank.members() if (bank.folder(address) / "oof.arrow").exists()]
    for end, stem in PLURAL.items():
        if entry.endswith(end):
            found = [a for a in known if a.startswith(entry.removesuffix(end) + stem)]
            found.sort(key=lambda a: [int(n) for n in re.findall(r"\d+", a.partition(":")[2])])
            if not found:
                raise Refused(f"{entry}: there are none; the bank has {', '.join(known) or 'nothing yet'}")
            return found
    runs = [a for a in known if ":" not in a and paths.run_folder(a).is_dir()]
    found = matching(entry, runs)
    if not found:
        raise Refused(
            f"{entry}: no run is like that; there are {', '.join(runs) or 'none yet: comp train exp001'}"
        )
    return found


def matching(text: str, known: list[str]) -> list[str]:
    """The addresses that fit every term of a filter, in their order."""
    terms = [_term(each) for each in text.split()]
    return [a for a in known if all(_fits(a, *term) for term in terms)]


def _term(text: str) -> tuple[str, str, str]:
    found = TERM.match(text)
    if not found:
        raise Refused(
            f"{text!r} is no filter; they look like score>0.9, model~convnext, task=binary, name~exp0"
        )
    field, sign, value = found.groups()
    if field not in FIELDS:
        raise Refused(f"{text}: there is no field {field}; the nearest is {nearest(field, FIELDS)[0]}")
    if field == "score":
        try:
            float(value)
        except ValueError:
            raise Refused(f"{text}: {value} is no number") from None
        if sign == "~":
            raise Refused(f"{text}: a score is compared with < > <= >= or =")
    elif sign not in ("=", "~"):
        raise Refused(f"{text}: {field} is compared with = or ~ (contains)")
    return field, sign, value


def _fits(address: str, field: str, sign: str, value: str) -> bool:
    if field == "score":
        said = _score(address)
        return said is not None and COMPARE[sign](said, float(value))
    own = address if field == "name" else _knob(address, field)
    return value in own if sign == "~" else own == value


def _score(address: str) -> float | None:
    file = bank.folder(address) / "score.json"
    return artifacts.read_json(artifacts.verified(file))["oof"] if artifacts.manifest_entry(file) else None


def _knob(address: str, field: str) -> str:
    """Of an ensemble: the competition's tasks, and the models of all runs that it is made from."""
    recipe = bank.folder(address) / "apply.json"
    if recipe.exists():
        if field == "task":
            return _tasks(resolve.load(paths.root(), "base").config)
        runs = {
            leaf.partition(":")[0] for leaf in average.leaves(artifacts.read_json(artifacts.verified(recipe)))
        }
        return ", ".join(sorted({_knob(run, field) for run in runs}))
    file = paths.run_folder(address.partition(":")[0]) / "config.yaml"
    if not artifacts.manifest_entry(file):
        return ""
    cfg = resolve.from_yaml(artifacts.verified(file))
    return cfg.model.name if field == "model" else _tasks(cfg)


def _tasks(cfg: resolve.Config) -> str:
    return ", ".join(dict.fromkeys(cfg.competition.tasks.values()))
