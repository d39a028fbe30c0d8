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


EXPERIMENT = argument("experiment", help="name of a file in configs/, like exp001")
OVERRIDES = argument(
    "overrides", nargs="*", metavar="key=value", help="change a knob for this time, like optim.rate=3e-4"
)
DEBUG = flag("--debug", "a one-minute run with configs/debug.yaml")


def overview(verbs: dict[str, Verb]) -> str:
    lines = ["usage: comp VERB …", "", "From raw files to a submitted, honestly ensembled prediction."]
    for chapter in dict.fromkeys(verb.chapter for verb in verbs.values()):
        lines += ["", chapter] + [
            f"  {name:10} {verb.help}" for name, verb in verbs.items() if verb.chapter == chapter
        ]
    return "\n".join([*lines, "", "comp VERB --help says more."])


def parsed(name: str, verb: Verb, arguments: list[str]) -> Args:
    parser = argparse.ArgumentParser(f"comp {name}", description=verb.help)
    for names, options in verb.arguments:
        parser.add_argument(*names, **options)
    return parser.parse_intermixed_args(arguments)  # key=value may stand before and after options
