"""What competition.py defines, by name."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any

from comp import competition
from comp.engine.errors import UserError

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
    """A hook of competition.py, or None. A hook with other parameters than those of HOOKS is refused before
    it is called."""
    hook = getattr(competition, name, None)
    if hook is None:
        return None
    parameters = tuple(inspect.signature(hook).parameters)
    if name in HOOKS and len(parameters) != len(HOOKS[name]):
        what = f"{name}({', '.join(parameters)}) must take ({', '.join(HOOKS[name])})"
        raise UserError("hook-signature", where="comp/competition.py", what=what)
    return hook


def in_force() -> list[str]:
    return [name for name in HOOKS if get(name) is not None]


def failed(name: str, error: Exception, what: str = "", remedy: str = "") -> UserError:
    """An exception inside a hook, with the line of competition.py where it was raised. `what`: was
    processed."""
    file = inspect.getsourcefile(competition)
    hook = get(name)
    files = {file, hook.__code__.co_filename if inspect.isfunction(hook) else file}
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    where = f"comp/competition.py:{lines[-1] if lines else 1}"
    raised = f"{name} fails{' ' * bool(what)}{what}: {type(error).__name__}: {error}"
    return UserError("hook-failed", where=where, what=raised, remedy=remedy)
