"""The results of comp audit: leaks, and what could not be checked, since a silent gap would look like a clean
result."""

from __future__ import annotations

from typing import NamedTuple


class Leak(NamedTuple):
    name: str
    where: str
    method: str  # how it was found: hash, provenance, recomputation or re-prediction


class NotChecked(NamedTuple):
    what: str
    reason: str


Finding = Leak | NotChecked
