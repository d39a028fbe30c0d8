"""What competition.py defines, by name."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any

from comp import competition
from comp.engine.errors import Refused

HOOKS = {
    "read_samples": ("raw",),
    "load_image": ("row", "decode"),
    "model": ("cfg", "outputs"),
    "loss": ("output", "target"),
    "metric": ("truth", "prediction", "rows"),
    "recipe": ("size",),
    "postprocess": ("rows", "prediction"),
    "write_submission": ("rows", "prediction", "sample"),
}


def get(name: str) -> Callable[..., Any] | None:
    """A hook of competition.py, or None. One that takes other arguments than promised is refused before it is called."""
    hook = getattr(competition, name, None)
    if hook is None:
        return None
    taken = tuple(inspect.signature(hook).parameters)
    if name in HOOKS and len(taken) != len(HOOKS[name]):
        raise Refused(f"comp/competition.py: {name}({', '.join(taken)}) must take ({', '.join(HOOKS[name])})")
    return hook


def in_force() -> list[str]:
    return [name for name in HOOKS if get(name) is not None]


def failed(name: str, error: Exception, what: str = "", remedy: str = "") -> Refused:
    """An exception inside a hook, in one line with the line of competition.py it came from."""
    file = inspect.getsourcefile(competition)
    hook = get(name)
    here = {file, hook.__code__.co_filename if inspect.isfunction(hook) else file}
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename in here]
    where = f"comp/competition.py:{lines[-1] if lines else 1}"
    return Refused(f"{where}: {name} fails{' ' * bool(what)}{what}: {type(error).__name__}: {error}{remedy}")
