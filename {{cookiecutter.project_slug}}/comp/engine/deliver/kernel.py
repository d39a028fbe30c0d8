"""comp kernel NAME: kernels/NAME/, everything a code competition needs, without internet and with Kaggle's
package versions.

    bundle/      the dataset: the package, configs, weights, wheels; see bundle.py
    notebook/    the notebook and its metadata
    script.py    the same code as a script

The same predictions give the same bytes, so the hash of the manifest identifies a bundle.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from comp.engine.bank import bank
from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.data import samples
from comp.engine.deliver import bundle, wheels
from comp.engine.deliver.bundle import MemberRun
from comp.engine.ensemble import average
from comp.engine.errors import UserError
from comp.engine.store import artifacts, locks, paths

CODE = """import glob, os, subprocess, sys

found = [p for p in {places} if os.path.exists(p + '/bundle.json')]
assert found, 'add the dataset {slug} to this notebook'
os.environ['PYTHONPATH'] = found[0]
os.environ['PYTHONDONTWRITEBYTECODE'] = '1'
command = [sys.executable, '-m', 'comp', 'predict', '--kernel']
sys.exit(code) if (code := subprocess.call(command)) else None
"""


def folder(name: str) -> Path:
    return paths.path("kernels", name.replace(":", "-"))


def slug(name: str) -> str:
    """Of dataset and notebook; Kaggle takes 6 to 50 letters, digits and hyphens."""
    competition = resolve.load(paths.root(), "base").config.competition.slug
    text = re.sub(r"[^a-z0-9]+", "-", f"comp {competition} {name}".lower())
    return text.strip("-")[:50].strip("-")


def build(name: str, owner: str = "me") -> Path:
    """Build kernels/NAME in a temporary folder, then replace the old parts."""
    cfg = resolve.load(paths.root(), "base").config
    table = samples.load()
    runs = member_runs(name)
    size = sum(file.stat().st_size for run in runs for file in bundle.weights_of(run))
    artifacts.require_space(size, f"kernels/{name}")
    target = folder(name)
    with locks.lock(target, f"building kernel {name}"):
        temporary = target / ".making"
        if temporary.exists():
            shutil.rmtree(temporary)
        bundle.write(temporary / "bundle", cfg, table, name, runs)
        packed = wheels.build_wheels(temporary / "bundle" / "wheels", table, paths.path(cfg.competition.raw))
        bundle.write_manifest(temporary / "bundle")
        _write_notebook(temporary, cfg, name, owner)
        for part in ("bundle", "notebook", "script.py"):
            old = target / part
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            os.replace(temporary / part, old)
        temporary.rmdir()
    checkpoints = sum(len(run["checkpoints"]) for run in runs)
    names = ", ".join(wheel.name for wheel in packed) or "none"
    print(
        f"{paths.relative(target)}: {len(runs)} model{'s' * (len(runs) != 1)}, {checkpoints} checkpoints, "
        f"{artifacts.format_size(size)}; wheels: {names}"
    )
    return target


def member_runs(name: str) -> list[MemberRun]:
    """The runs (and members with weights or views of their own) that a prediction of `name` is made from,
    blends resolved."""
    recipe = bank.folder(name) / "apply.json"
    addresses = average.leaves(artifacts.read_json(artifacts.verified(recipe))) if recipe.exists() else [name]
    found: list[MemberRun] = []
    for address in addresses:
        meta = bank.read_meta(bank.find(address, "test"))
        if not meta["weights"] or "tta" not in meta:
            raise UserError(
                "predictions-without-weights",
                where=address,
                what="its predictions do not name the checkpoints and TTA views that made them",
                remedy=f"comp predict {address.partition(':')[0]} merges them again",
            )
        checkpoints = [_checkpoint(weights) for weights in meta["weights"]]
        found.append(
            {
                "address": address,
                "run": checkpoints[0][0],
                "checkpoints": [(seed, fold) for _, seed, fold in checkpoints],
                "tta": meta["tta"],
                "space": meta["space"],
                "backbone": None,  # known when the bundle is written
            }
        )
    return found


def _checkpoint(weights: str) -> tuple[str, int, str]:
    """exp003/seed0/fold3/snap2 -> exp003, 0, 3/snap2: weights of a member lie in a folder below the fold."""
    run, seed, fold = weights.split("/", 2)
    return run, int(seed.removeprefix("seed")), fold.removeprefix("fold")


def bundle_hash(kernel: Path) -> str:
    """Identifies a bundle by its content."""
    return artifacts.sha256(kernel / "bundle" / artifacts.MANIFEST)[:16]


def _write_notebook(target: Path, cfg: Config, name: str, owner: str) -> None:
    """notebook/ and script.py."""
    title, accelerator = slug(name), cfg.competition.kernel.gpu
    places = [f"/kaggle/input/{title}", f"/kaggle/input/datasets/{owner}/{title}"]
    code = CODE.format(places=places, slug=f"{owner}/{title}")
    (target / "notebook").mkdir()
    (target / "script.py").write_text(code)
    about = f"{name}, by `comp kernel`: all it does is `python -m comp predict --kernel`."
    cells = [
        {"cell_type": "markdown", "metadata": {}, "id": "about", "source": about},
        {"cell_type": "code", "metadata": {}, "id": "run", "execution_count": None, "outputs": [], "source": code},
    ]  # fmt: skip
    python = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    artifacts.write_json(
        target / "notebook" / f"{title}.ipynb",
        {"cells": cells, "metadata": python, "nbformat": 4, "nbformat_minor": 5},
    )
    metadata = {
        "id": f"{owner}/{title}", "title": title, "code_file": f"{title}.ipynb", "language": "python", "kernel_type": "notebook",
        "is_private": True, "enable_internet": False, "enable_gpu": accelerator != "none", "enable_tpu": False,
        "dataset_sources": [f"{owner}/{title}"], "competition_sources": [cfg.competition.slug], "kernel_sources": [], "model_sources": [],
    }  # fmt: skip
    if accelerator != "none":
        metadata["machine_shape"] = accelerator
    artifacts.write_json(target / "notebook" / "kernel-metadata.json", metadata)
