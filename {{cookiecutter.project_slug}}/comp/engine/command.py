"""What a verb of the command line is: the function that runs, its help, its arguments, and what it needs installed. The
verbs themselves stand in cli.py."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

from comp.engine.errors import Refused

# The project's own environment has all of it; a notebook's image (Kaggle, Colab) may be older. The floors are pyproject's.
TRAINS = ("torch>=2.10", "timm>=1.0.26", "albumentations==2.0.8", "opencv-python-headless>=4.12")
NEEDS = {  # of a verb; those of the chapter training need TRAINS
    "predict": ("torch>=2.10",),  # in a kernel timm comes out of the bundle
    "tta": TRAINS,
    "tune": (*TRAINS, "optuna>=5"),
    "studies": ("optuna>=5",),
}
SAME = {
    "opencv-python-headless": ("opencv-python", "opencv-contrib-python")
}  # the same cv2 under other names

Args = argparse.Namespace


class Argument(NamedTuple):
    names: tuple[str, ...]
    options: dict[str, Any]


class Verb(NamedTuple):
    chapter: str
    run: Callable[[Args], int | None]
    help: str
    own: tuple[Argument, ...] = ()
    locks: bool = True  # whether it may meet another process's lock, and so has --steal-lock

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return (*self.own, STEAL) if self.locks else self.own


def refuse_older(what: str, needs: tuple[str, ...]) -> None:
    """Before anything is imported: which package is absent or too old, and how to get it."""
    wrong = []
    for need in needs:
        found = re.fullmatch(r"([\w-]+)(>=|==)([\d.]+)", need)
        assert found, need
        name, how, floor = found.groups()
        there = next((v for each in (name, *SAME.get(name, ())) if (v := _installed(each))), "")
        fine = there and (_numbers(there) >= _numbers(floor) if how == ">=" else there == floor)
        if not fine:
            wrong.append((need, f"{name} {there}" if there else f"no {name}"))
    if wrong:
        raise Refused(
            f"{what} needs {', '.join(need for need, _ in wrong)}, and here is {', '.join(is_ for _, is_ in wrong)}: "
            f"pip install {' '.join(repr(need) for need, _ in wrong)}, then restart the notebook if this is one"
        )


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """2.10.0+cu128 -> (2, 10, 0)"""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:4])


def needs(name: str, verb: Verb) -> tuple[str, ...]:
    return NEEDS.get(name, TRAINS if verb.chapter == "training" else ())


def argument(*names: str, **options: Any) -> Argument:
    return Argument(names, options)


def flag(name: str, help: str) -> Argument:
    return argument(name, action="store_true", help=help)


EXPERIMENT = argument(
    "experiment", help="name of a file in configs/, like exp001, or of a run, like those of --as NAME"
)
OVERRIDES = argument(
    "overrides", nargs="*", metavar="key=value", help="change a knob for this time, like optim.lr=3e-4"
)
DEBUG = flag("--debug", "a one-minute run with configs/debug.yaml")
ON = argument(
    "--on",
    metavar="WHERE",
    help="side by side: local (one a GPU, or as many as the cores allow), local:4, or ray (a Ray cluster)",
)

STEAL = flag(
    "--steal-lock",
    "take over the lock of a process on another host or in another container that gave no heartbeat for 10 minutes",
)


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
