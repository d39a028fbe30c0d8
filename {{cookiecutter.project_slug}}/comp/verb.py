"""What a verb of the command line is: the function that runs, its help, its arguments. The verbs themselves stand in cli.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

Args = argparse.Namespace


class Argument(NamedTuple):
    names: tuple[str, ...]
    options: dict[str, Any]


class Verb(NamedTuple):
    chapter: str
    run: Callable[[Args], int | None]
    help: str
    arguments: tuple[Argument, ...] = ()


def argument(*names: str, **options: Any) -> Argument:
    return Argument(names, options)


def flag(name: str, help: str) -> Argument:
    return argument(name, action="store_true", help=help)
