"""For notebooks on Kaggle and Colab: working directory, the command `comp`, and keys from the notebook's
secrets.

    from comp.engine import notebook
    notebook.setup()        # in the first cell, once; then !comp prepare and so on, as in a terminal
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
    """Makes `comp` a command, changes to the project's folder, and puts keys from the notebook's secrets into
    the environment. Returns the folder."""
    project = Path(__file__).resolve().parents[2]
    os.chdir(project)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(project), os.environ.get("PYTHONPATH")]))
    bin_folder = Path(tempfile.mkdtemp(prefix="comp-bin-"))
    # Where the project cannot be installed there is no console script, and scripts/ call one.
    for name, more in (("comp", " -m comp"), ("python", "")):
        (bin_folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{more} "$@"\n')
        (bin_folder / name).chmod(0o755)
    os.environ["PATH"] = f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}"
    print(f"project: {project}")
    for name in KEYS:
        print(f"{name}: {load_key(name)}")
    return project


def load_key(name: str) -> str:
    """Puts a key into the environment, of child processes as well; never prints it. Returns where it was
    found."""
    if os.environ.get(name):
        return "in the environment"
    if (get_secret := _secrets()) is None:
        return "neither in the environment nor in a notebook's secrets"
    try:
        os.environ[name] = get_secret(name)
    except (
        Exception
    ) as error:  # each service has its own for absent, not attached to this notebook, and offline
        return f"not in the notebook's secrets ({type(error).__name__}); add it there, and attach it"
    return "from the notebook's secrets"


def _secrets() -> Callable[[str], str] | None:
    """The function that reads a secret, of Kaggle or Colab; None elsewhere."""
    try:
        if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
            get: Callable[[str], str] = import_module("kaggle_secrets").UserSecretsClient().get_secret
            return get
        get = import_module("google.colab.userdata").get
    except ImportError:
        return None
    return get


def input_folder(slug: str) -> Path | None:
    """The competition's files in a notebook on Kaggle, which are read-only; None elsewhere."""
    home = Path(os.environ.get("COMP_KAGGLE", "/kaggle")) / "input"
    return next((each for each in (home / slug, home / "competitions" / slug) if each.is_dir()), None)
