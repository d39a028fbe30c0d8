"""comp kernel NAME: kernels/NAME/, all that a code competition needs, without internet and under Kaggle's own versions.

    bundle/      the dataset: the package, resolved configs, weights, wheels, bundle.json, manifest.json with every hash
    notebook/    the notebook and its metadata
    script.py    the same as a script

The same predictions give the same bytes, so the hash of the manifest names a bundle.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from comp.engine.bank import bank, predictions
from comp.engine.config import resolve, run_members
from comp.engine.config.schema import Config
from comp.engine.data import folds, image_key, samples
from comp.engine.data.samples import Samples
from comp.engine.deliver import kernel_predict
from comp.engine.ensemble import average
from comp.engine.errors import Refused
from comp.engine.readers import decode
from comp.engine.run import frozen_heads, knn
from comp.engine.store import artifacts, locks, paths

PYTHON = "3.12"  # of Kaggle's image
IMAGE = {  # what it has; expect it to move, and then move this
    "torch": "2.10", "torchvision": "0.25", "timm": "1.0.26", "albumentations": "2.0.8", "numpy": "2.0", "pandas": "2.2",
    "scikit-learn": "1.6", "opencv-python-headless": "4.13", "pyarrow": "18", "pydantic": "2.12", "safetensors": "0.7",
    "pillow": "11", "PyYAML": "6", "tqdm": "4.66", "scipy": "1.15", "matplotlib": "3.9", "wandb": "0.26",
}  # fmt: skip
ALWAYS = ("timm",)  # its models change with its version, and weights belong to one
CODE = "import glob, os, subprocess, sys\n\nfound = [p for p in {places} if os.path.exists(p + '/bundle.json')]\nassert found, 'add the dataset {slug} to this notebook'\nos.environ['PYTHONPATH'] = found[0]\nos.environ['PYTHONDONTWRITEBYTECODE'] = '1'\nsys.exit(code) if (code := subprocess.call([sys.executable, '-m', 'comp', 'predict', '--kernel'])) else None\n"


def folder(name: str) -> Path:
    return paths.path("kernels", name.replace(":", "-"))


def slug(name: str) -> str:
    """Of dataset and notebook; Kaggle takes 6 to 50 letters, digits and hyphens."""
    text = re.sub(
        r"[^a-z0-9]+",
        "-",
        f"comp {resolve.load(paths.root(), 'base').config.competition.slug} {name}".lower(),
    )
    return text.strip("-")[:50].strip("-")


def build(name: str, owner: str = "me") -> Path:
    """kernels/NAME, made anew; takes its place when it is complete."""
    cfg = resolve.load(paths.root(), "base").config
    table = samples.load()
    leaves = leaves_of(name)
    size = sum(f.stat().st_size for leaf in leaves for f in weights_of(leaf))
    artifacts.require_space(size, f"kernels/{name}")
    with locks.lock(folder(name), f"building kernel {name}"):
        beside = folder(name) / ".making"
        if beside.exists():
            shutil.rmtree(beside)
        bundle = beside / "bundle"
        _package(bundle)
        _artefacts(bundle, name, leaves)
        if cfg.competition.metadata:
            _known(bundle, table)
        wheels = [
            _wheel(bundle / "wheels", each)
            for each in sorted({*needed(), *readers(table, paths.path(cfg.competition.raw))})
        ]
        artifacts.write_json(bundle / "bundle.json", about(cfg, table, name, leaves))
        _manifest(bundle)
        _notebook(beside, cfg, name, owner)
        for part in ("bundle", "notebook", "script.py"):
            old = folder(name) / part
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            os.replace(beside / part, old)
        beside.rmdir()
    made = folder(name)
    print(
        f"{paths.relative(made)}: {len(leaves)} models of {sum(len(leaf['checkpoints']) for leaf in leaves)} checkpoints, {artifacts.format_size(size)}, with {', '.join(w.name for w in wheels) or 'no wheels'}"
    )
    print(f"next: comp kernel {name} --rehearse")
    return made


def leaves_of(name: str) -> list[dict[str, Any]]:
    """The runs and members that have to predict a new row: which checkpoints, which views."""
    recipe = bank.folder(name) / "apply.json"
    addresses = average.leaves(artifacts.read_json(artifacts.verified(recipe))) if recipe.exists() else [name]
    found = []
    for address in addresses:
        said = bank.read_meta(bank.find(address, "test"))
        if not said["weights"] or "tta" not in said:
            raise Refused(
                f"{address}: its predictions do not say from which checkpoints and views they come; comp predict {address.partition(':')[0]} merges them anew"
            )
        checkpoints = [_checkpoint(each) for each in said["weights"]]
        found.append(
            {
                "address": address,
                "run": checkpoints[0][0],
                "checkpoints": [c[1:] for c in checkpoints],
                "tta": said["tta"],
                "space": said["space"],
            }
        )
    return found


def _checkpoint(weights: str) -> tuple[str, int, str]:
    """exp003/seed0/fold3/snap2 -> exp003, 0, 3/snap2: of a member with weights of its own, their folder goes with the fold."""
    run, seed, fold = weights.split("/", 2)
    return run, int(seed.removeprefix("seed")), fold.removeprefix("fold")


def weights_of(leaf: dict[str, Any]) -> list[Path]:
    return [
        paths.fold_folder(leaf["run"], seed, fold) / "weights.safetensors"
        for seed, fold in leaf["checkpoints"]
    ]


def about(cfg: Config, table: Samples, name: str, leaves: list[dict[str, Any]]) -> dict[str, Any]:
    split = folds.load(table)
    said = bank.load(name, "test", table, split).meta
    return {
        "name": name,
        "competition": cfg.competition.slug,
        "leaves": leaves,
        "heads": [asdict(head) for head in table.heads],
        "multi_image": table.multi_image,
        "prior": {head.name: predictions.prior(head, table, split).tolist() for head in table.heads},
        "made_with": said["versions"],
        "samples": table.hash,
    }


def content(made: Path) -> str:
    """Names a bundle by what is in it."""
    return artifacts.sha256(made / "bundle" / artifacts.MANIFEST)[:16]


# --- parts ---------------------------------------------------------------------------------------------------------------


def _package(bundle: Path) -> None:
    here = Path(__file__).resolve().parents[2]
    for file in sorted(here.rglob("*.py")):
        target = bundle / "comp" / file.relative_to(here)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    (bundle / "configs").mkdir()
    for each in ("base.yaml", "competition.yaml"):
        shutil.copyfile(paths.path("configs", each), bundle / "configs" / each)


def _artefacts(bundle: Path, name: str, leaves: list[dict[str, Any]]) -> None:
    """Everything lies where it lies in the project, with its manifest, so that the same code reads it the same way."""
    wanted = [file for leaf in leaves for file in weights_of(leaf)]
    wanted += [
        file
        for weights in wanted
        if frozen_heads.is_head(weights)
        for file in frozen_heads.required_files(weights)
    ]
    wanted += [file for file in map(knn.gallery_file, wanted) if file.exists()]
    wanted += [paths.run_folder(leaf["run"]) / "config.yaml" for leaf in leaves]
    homes = {bank.folder(name), bank.folder(run_members.cv_address(name))}
    wanted += [
        home / each
        for home in sorted(homes)
        for each in ("apply.json", "score.json")
        if (home / each).exists()
    ]
    for file in dict.fromkeys(wanted):
        artifacts.verified(file, "comp kernel needs it")
        target = bundle / file.relative_to(paths.root())
        target.parent.mkdir(parents=True, exist_ok=True)
        link(file, target)
        entry = artifacts.manifest_entry(file)
        listed = target.parent / artifacts.MANIFEST
        known = json.loads(listed.read_text()) if listed.exists() else {}
        listed.write_text(json.dumps(known | {file.name: entry}, indent=1, sort_keys=True))
    _backbones(bundle, {leaf["run"] for leaf in leaves})


def _backbones(bundle: Path, runs: set[str]) -> None:
    """What the hub or a folder says of a network: without either it is made from this, where comp/engine/deliver/kernel_predict.py looks."""
    from comp.engine.run import backbone

    for run in sorted(runs):
        name = resolve.from_yaml(paths.run_folder(run) / "config.yaml").model.name
        if said := backbone.hub_config(name):
            artifacts.write_json(bundle / kernel_predict.BACKBONES / run / "config.json", said)


def _known(bundle: Path, table: Samples) -> None:
    """Metadata of the training rows, without ids, pictures and labels: means and levels of a column come from them."""
    kept = ["weight", *(name for name in table.frame.columns if str(name).startswith("meta."))]
    frame = table.frame.loc[table.positions("train"), kept].reset_index(drop=True)
    frame["id"] = frame["row"] = [f"known:{i}" for i in range(len(frame))]
    frame["images"], frame["source"] = [[""]] * len(frame), "train"
    samples.save(frame, (), bundle / "data" / "samples.parquet")


def link(file: str | Path, target: str | Path) -> None:
    """Gigabytes need not lie there twice; on another disk they do."""
    try:
        os.link(os.path.realpath(file), target)
    except OSError:
        shutil.copyfile(file, target)


def _manifest(bundle: Path) -> None:
    files = sorted(file for file in bundle.rglob("*") if file.is_file())
    artifacts.write_json(
        bundle / artifacts.MANIFEST,
        {
            file.relative_to(bundle).as_posix(): {
                "sha256": artifacts.sha256(file),
                "size": file.stat().st_size,
            }
            for file in files
        },
    )


def _notebook(beside: Path, cfg: Config, name: str, owner: str) -> None:
    made, kind = slug(name), cfg.competition.kernel.gpu
    places = [f"/kaggle/input/{made}", f"/kaggle/input/datasets/{owner}/{made}"]
    code = CODE.format(places=places, slug=f"{owner}/{made}")
    (beside / "notebook").mkdir()
    (beside / "script.py").write_text(code)
    cells = [
        {
            "cell_type": "markdown",
            "metadata": {},
            "id": "about",
            "source": f"{name}, by `comp kernel`: all it does is `python -m comp predict --kernel`.",
        },
        {
            "cell_type": "code",
            "metadata": {},
            "id": "run",
            "execution_count": None,
            "outputs": [],
            "source": code,
        },
    ]
    python = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    artifacts.write_json(
        beside / "notebook" / f"{made}.ipynb",
        {"cells": cells, "metadata": python, "nbformat": 4, "nbformat_minor": 5},
    )
    facts = {
        "id": f"{owner}/{made}", "title": made, "code_file": f"{made}.ipynb", "language": "python", "kernel_type": "notebook",
        "is_private": True, "enable_internet": False, "enable_gpu": kind != "none", "enable_tpu": False,
        "dataset_sources": [f"{owner}/{made}"], "competition_sources": [cfg.competition.slug], "kernel_sources": [], "model_sources": [],
    }  # fmt: skip
    if kind != "none":
        facts["machine_shape"] = kind
    artifacts.write_json(beside / "notebook" / "kernel-metadata.json", facts)


# --- wheels --------------------------------------------------------------------------------------------------------------


def needed() -> list[str]:
    """Distributions that Kaggle's image lacks, or whose version decides what weights mean: timm, and what competition.py
    imports."""
    source = (Path(__file__).resolve().parents[2] / "competition.py").read_text()
    tops = set()
    for node in ast.walk(ast.parse(source)):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
        tops |= {name.split(".")[0] for name in names}
    owners = metadata.packages_distributions()
    used = {owners[top][0] for top in tops - set(sys.stdlib_module_names) - {"comp"} if top in owners}
    image = {name.lower() for name in IMAGE}
    return sorted({*ALWAYS, *(name for name in used if name.lower() not in image)})


def readers(table: Samples, raw: Path) -> list[str]:
    """What opens this competition's pictures, where an image without internet may lack it. A suffix may be wrong, or there may be
    none, so the bytes of one file of each count, too."""
    names = (name for each in table.frame["images"] for key in each for name in image_key.files(key))
    of_suffix = {Path(name).suffix.lower(): name for name in names}
    found = set()
    for suffix, name in of_suffix.items():
        try:
            start = decode.read(raw / name, name)[:132]
        except decode.DamagedImage:  # the raw files need not be here any more
            start = b""
        if suffix in (".dcm", ".dicom") or start[128:] == b"DICM":
            found.add("pydicom")
        if suffix in (".jpg", ".jpeg") or start.startswith(b"\xff\xd8\xff"):
            found.add("simplejpeg")
    return sorted(found)


def _wheel(place: Path, name: str) -> Path:
    """A pure Python distribution is packed as it is installed here; one with compiled code is fetched for the image."""
    place.mkdir(exist_ok=True)
    found = metadata.distribution(name)
    tag = re.search(r"^Tag: (.+)$", found.read_text("WHEEL") or "", re.MULTILINE)
    if tag is None or not tag[1].endswith("-none-any"):
        return _fetched(place, name, found.version)
    file = place / f"{re.sub(r'[-_.]+', '_', name)}-{found.version}-{tag[1]}.whl"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
        for each in sorted(found.files or [], key=str):
            lies = Path(str(found.locate_file(each)))
            if ".." in each.parts or each.suffix == ".pyc" or not lies.is_file():
                continue
            entry = zipfile.ZipInfo(each.as_posix())  # without a clock: the same bytes every time
            entry.compress_type = zipfile.ZIP_DEFLATED
            wheel.writestr(entry, lies.read_bytes())
    return file


def _fetched(place: Path, name: str, version: str) -> Path:
    wanted = [
        "--only-binary=:all:",
        "--no-deps",
        "--python-version",
        PYTHON,
        "--platform",
        "manylinux_2_28_x86_64",
        "--platform",
        "manylinux2014_x86_64",
    ]
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(place), *wanted, f"{name}=={version}"], capture_output=True, text=True, check=False)  # fmt: skip
    found = sorted(place.glob(f"{re.sub(r'[-_.]+', '_', name)}-{version}-*.whl"))
    if done.returncode or not found:
        raise Refused(
            f"{name} {version}: Kaggle's image lacks it, and there is no wheel of it for Python {PYTHON} to be had ({(done.stderr.strip().splitlines() or ['no reason given'])[-1]})"
        )
    return found[0]
