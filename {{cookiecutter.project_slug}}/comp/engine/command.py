"""A verb of the command line: its arguments, the function that it calls, and the packages that this function
needs."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any, NamedTuple

from comp.engine.errors import UserError

# For notebooks on Kaggle and Colab, whose packages may be older. The lowest versions are those of
# pyproject.toml.
TORCH = ("torch>=2.10",)
TRAINING = (*TORCH, "timm>=1.0.26", "albumentations==2.0.8", "opencv-python-headless>=4.12")
OTHER_NAMES = {"opencv-python-headless": ("opencv-python", "opencv-contrib-python")}  # each installs cv2


SIMILAR = 0.7  # ratio of difflib; a name below it is no likely misspelling


class Argument(NamedTuple):
    names: tuple[str, ...]
    options: dict[str, Any]  # of argparse's add_argument


class Verb(NamedTuple):
    chapter: str
    function: str  # "module:function" in comp.engine
    help: str
    own: tuple[Argument, ...] = ()
    instead: Mapping[str, str] = {}  # argument -> the function that is called instead when it is given
    needs: tuple[str, ...] = ()  # packages, like "optuna>=5"
    locks: bool = True  # whether it takes a lock that another process may hold, and so has --steal-lock

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return (*self.own, STEAL_LOCK) if self.locks else self.own


def argument(*names: str, **options: Any) -> Argument:
    return Argument(names, options)


def flag(name: str, help: str) -> Argument:
    return argument(name, action="store_true", help=help)


EXPERIMENT = argument(
    "experiment", help="name of a file in configs/, like exp001, or of a run, like those of --as NAME"
)
# With a default, argparse does not list it as required.
OVERRIDES = argument(
    "overrides", nargs="*", default=[], metavar="key=value", help="override knobs, like optim.lr=3e-4"
)
DEBUG = flag("--debug", "a one-minute run with configs/debug.yaml")
WITH_DEBUG = flag("--debug", "with configs/debug.yaml, as comp train --debug has it")
ON = argument(
    "--on",
    metavar="WHERE",
    help="in parallel: local (one process a GPU, or as many as the cores allow), local:4, or ray (a cluster)",
)
STEAL_LOCK = flag(
    "--steal-lock",
    "take over the lock of a process on another host or in another container, if it was not renewed for "
    "10 minutes",
)


def overview(verbs: Mapping[str, Verb]) -> str:
    """What comp --help prints."""
    lines = ["usage: comp VERB …", "", "From raw files to a submitted ensemble with nested scores."]
    for chapter in dict.fromkeys(verb.chapter for verb in verbs.values()):
        lines += ["", chapter]
        lines += [f"  {name:12} {verb.help}" for name, verb in verbs.items() if verb.chapter == chapter]
    return "\n".join([*lines, "", "comp VERB --help lists the arguments of a verb."])


def parse(name: str, verb: Verb, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(f"comp {name}", description=verb.help)
    for names, options in verb.arguments:
        parser.add_argument(*names, **options)
    # Intermixed: key=value may stand before and after options.
    parsed, unknown = parser.parse_known_intermixed_args(arguments)
    if not unknown:
        return parsed
    known = [option for spec in verb.arguments for option in spec.names if option.startswith("-")]
    close = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1, cutoff=SIMILAR)
    remedy = f"did you mean {close[0]}?" if close else f"comp {name} --help lists the arguments"
    raise UserError(
        "argument-unknown", where=f"comp {name} {unknown[0]}", what="no such argument", remedy=remedy
    )


def call(verb: Verb, args: Mapping[str, Any]) -> int:
    """Calls the verb's function with those arguments that are parameters of it. A parameter `cfg` gets the
    config of base.yaml and competition.yaml. The exit code is the function's, when it returns an int, and 0
    otherwise."""
    target = next((function for name, function in verb.instead.items() if args.get(name)), verb.function)
    module, _, function_name = target.partition(":")
    function: Callable[..., object] = getattr(import_module(f"comp.engine.{module}"), function_name)
    parameters = inspect.signature(function).parameters
    given = {name: value for name, value in args.items() if name in parameters}
    if "cfg" in parameters:
        from comp.engine.config import resolve
        from comp.engine.store import paths

        given["cfg"] = resolve.load(paths.root(), "base").config
    status = function(**given)
    return status if isinstance(status, int) else 0


@contextmanager
def lock_takeover(wanted: bool) -> Iterator[None]:
    """--steal-lock, for this call and for the processes that it starts."""
    if not wanted:
        yield
        return
    from comp.engine.store import locks

    with locks.steal():
        yield


def check_versions(who: str, needs: tuple[str, ...]) -> None:
    """Which packages are absent or too old, before anything is imported, and how to install them."""
    wrong, installed = [], []
    for need in needs:
        match = re.fullmatch(r"([\w-]+)(>=|==)([\d.]+)", need)
        assert match, need
        name, how, wanted = match.groups()
        version = next((v for each in (name, *OTHER_NAMES.get(name, ())) if (v := _installed(each))), None)
        if version is None:
            fine = False
        else:
            fine = _numbers(version) >= _numbers(wanted) if how == ">=" else version == wanted
        if not fine:
            wrong.append(need)
            installed.append(f"{name} {version}" if version else f"no {name}")
    if wrong:
        raise UserError(
            "package-version",
            where=who,
            what=f"needs {', '.join(wrong)}, installed: {', '.join(installed)}",
            remedy=f"pip install {' '.join(map(repr, wrong))}, and restart the notebook if this is one",
        )


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """2.10.0+cu128 -> (2, 10, 0)"""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:4])
