"""What a kernel finds on Kaggle: the wheels of its bundle, and the test rows of the competition's folder,
with other ids and another size than at home. Runs with the package versions of Kaggle's image."""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from comp.engine import notebook
from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.data import samples
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.store import paths
from comp.engine.tasks.kinds import Head


def unpack_wheels(folder: Path) -> None:
    """Unpack wheels into a temporary folder and put it first on the path, without installing anything. A
    wheel whose version is installed already is skipped."""
    target = tempfile.mkdtemp(prefix="comp-wheels-")
    for wheel in sorted(folder.glob("*.whl")):
        name, version, *_ = wheel.name.split("-")
        if _installed_version(name) == version:
            continue
        python, abi = wheel.stem.split("-")[-3:-1]
        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        if abi != "abi3" and not {f"cp{here.replace('.', '')}", "py3"} & set(python.split(".")):
            raise UserError(
                "wheel-python",
                where=wheel.name,
                what=f"is not for Python {here}, which runs here",
                remedy="set PYTHON in comp/engine/deliver/wheels.py to it, then build and push the kernel "
                "again: comp kernel NAME --push",
            )
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(target)
    sys.path.insert(0, target)
    # The workers of the data loader import them too.
    os.environ["PYTHONPATH"] = os.pathsep.join([target, os.environ.get("PYTHONPATH", "")])


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def competition_config(kaggle: Path, slug: str) -> Config:
    """base.yaml and competition.yaml of the bundle, with the competition's files where Kaggle puts them."""
    base = resolve.load(paths.root(), "base").config
    raw = notebook.input_folder(slug)
    if raw is None:
        raise UserError(
            "kernel-input",
            where=str(kaggle / "input" / slug),
            what="no such folder",
            remedy=f"add the competition {slug} to the notebook's inputs",
        )
    competition = base.competition.model_copy(update={"raw": str(raw)})
    return base.model_copy(update={"competition": competition})


def test_rows(cfg: Config, heads: tuple[Head, ...], multi_image: bool) -> Samples:
    """The samples table of the hidden test set: no targets, and of training rows only their metadata."""
    import pandas as pd

    from comp.engine.data import raw_tables

    raw = raw_tables.load_test(cfg.competition)
    is_test = (raw.samples["source"] == "test").to_numpy()
    table = raw.samples[is_test].reset_index(drop=True)
    if cfg.competition.metadata:
        known = samples.load().frame
        for name in cfg.competition.metadata:
            text = raw.columns[name][is_test].reset_index(drop=True)
            # Whether a column is numeric was decided by comp prepare, over all rows at home.
            numeric = known[f"meta.{name}"].dtype.kind == "f"
            table[f"meta.{name}"] = (
                pd.to_numeric(text, errors="coerce").astype("float64") if numeric else text
            )
        table = pd.concat([known, table], ignore_index=True)
    for column in dict.fromkeys(column for head in heads for column in head.columns):
        table[column] = np.nan
    return Samples(table, heads, "", multi_image)


def head_of(fields: dict[str, Any]) -> Head:
    """From bundle.json, where tuples have become lists."""
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    return Head(**values)
