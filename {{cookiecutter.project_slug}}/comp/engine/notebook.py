"""In a notebook on Kaggle or Colab: where things lie there, and which keys its secrets hold.

from comp.engine import notebook
notebook.setup()        # the first cell, once; then !comp prepare and so on, as in a terminal
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

KEYS = ("WANDB_API_KEY", "KAGGLE_API_TOKEN")


def setup() -> Path:
    """From here on `comp` is a command, in this folder, with the keys that the notebook's secrets hold. Answers with the folder."""
    project = Path(__file__).resolve().parents[2]
    os.chdir(project)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(project), os.environ.get("PYTHONPATH")]))
    place = Path(tempfile.mkdtemp(prefix="comp-bin-"))
    # Where nothing can be installed there is no console script, and scripts/ call one.
    for name, more in (("comp", " -m comp"), ("python", "")):
        (place / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{more} "$@"\n')
        (place / name).chmod(0o755)
    os.environ["PATH"] = f"{place}{os.pathsep}{os.environ.get('PATH', '')}"
    print(f"project: {project}")
    for name in KEYS:
        print(f"{name}: {load_key(name)}")
    return project


def load_key(name: str) -> str:
    """Into the environment of this process and what it starts, never shown. Answers with where it was found."""
    if os.environ.get(name):
        return "in the environment"
    if (ask := _secrets()) is None:
        return "neither in the environment nor in a notebook's secrets"
    try:
        os.environ[name] = ask(name)
    except (
        Exception
    ) as error:  # each service has its own errors for absent, not attached to this notebook, and offline
        return f"not in the notebook's secrets ({type(error).__name__}); add it there, and attach it"
    return "from the notebook's secrets"


def _secrets() -> Callable[[str], str] | None:
    """How this notebook's service is asked; None where this is no notebook of a service."""
    try:
        if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
            found: Callable[[str], str] = import_module("kaggle_secrets").UserSecretsClient().get_secret
            return found
        found = import_module("google.colab.userdata").get
    except ImportError:
        return None
    return found


def input_folder(slug: str) -> Path | None:
    """The competition's files, where Kaggle puts them for its notebooks: read-only, nothing to fetch."""
    home = Path(os.environ.get("COMP_KAGGLE", "/kaggle")) / "input"
    return next((place for place in (home / slug, home / "competitions" / slug) if place.is_dir()), None)
