"""What comp audit comes to: leaks by name, and by name too whatever could not be looked at, since silence would read as innocence."""

from __future__ import annotations

from typing import NamedTuple


class Leak(NamedTuple):
    name: str
    where: str
    knew: str  # hash | provenance | recomputation (on permuted labels) | re-prediction


class NotChecked(NamedTuple):
    what: str
    why: str


Finding = Leak | NotChecked
