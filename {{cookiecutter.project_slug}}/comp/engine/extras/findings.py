"""The results of comp audit: leaks, and what could not be checked, since a silent gap would look like a clean
result."""

from __future__ import annotations

from typing import NamedTuple

# The checks, by the leak that each one searches for.
DUPLICATES = "duplicates across folds"
GROUPS = "a split group"
BASE = "in-sample base predictions"
MISALIGNED = "misaligned rows"
STATISTICS = "statistics fitted on validation rows"
EPOCH = "best epoch picked on the scored fold"
META_MODEL = "in-sample meta-model"
PSEUDO = "pseudo-labels from models trained on the fold"
PREDICTIONS = (BASE, MISALIGNED)
OF_RUNS = (*PREDICTIONS, STATISTICS, EPOCH)


class Leak(NamedTuple):
    name: str  # one of the above, or "… that differ from …" where the cause is unknown
    where: str
    method: str  # how it was found: hash, provenance, recomputation or re-prediction


class NotChecked(NamedTuple):
    what: str
    reason: str
    checks: tuple[str, ...]  # that are incomplete because of it


Finding = Leak | NotChecked
