"""kernels/NAME/bundle/: the dataset that a kernel runs from. It is laid out like the project, so the same
code reads it.

comp/, configs/         the package; base.yaml and competition.yaml
runs/, ensembles/       weights and configs of the member runs, recipes of blends; each with its manifest
backbones/RUN/          config.json of networks that timm does not build by name
data/samples.parquet    metadata of the training rows, if the model uses metadata
wheels/                 see wheels.py
bundle.json             what kernel_predict.py has to predict
manifest.json           size and hash of every file; its own hash identifies the bundle
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from comp.engine.bank import bank, predictions
from comp.engine.config import resolve, run_members
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.data.samples import Samples
from comp.engine.run import backbone, frozen_heads, knn
from comp.engine.store import artifacts, paths


class MemberRun(TypedDict):
    """A run, or a member with weights or views of its own, that a kernel has to predict."""

    address: str  # exp003, or exp003:snap2
    run: str
    checkpoints: list[tuple[int, str]]  # (seed, fold); the fold is 3, or 3/snap2
    tta: list[str]
    space: str  # in which views and checkpoints are averaged
    backbone: str | None  # see _write_backbone


def write(bundle: Path, cfg: Config, table: Samples, name: str, runs: list[MemberRun]) -> None:
    """Everything but wheels and the manifest."""
    _copy_package(bundle)
    _link_artefacts(bundle, name, runs)
    for run in runs:
        run["backbone"] = _write_backbone(bundle, run["run"])
    if cfg.competition.metadata:
        _write_metadata(bundle, table)
    artifacts.write_json(bundle / "bundle.json", describe(cfg, table, name, runs))


def describe(cfg: Config, table: Samples, name: str, runs: list[MemberRun]) -> dict[str, Any]:
    """bundle.json: what to predict, and what is known of the training rows."""
    split = folds.load(table)
    return {
        "name": name,
        "competition": cfg.competition.slug,
        "member_runs": runs,
        "heads": [asdict(head) for head in table.heads],
        "multi_image": table.multi_image,
        "prior": {head.name: predictions.prior(head, table, split).tolist() for head in table.heads},
        "made_with": bank.load(name, "test", table, split).meta["versions"],
        "samples": table.hash,
    }


def weights_of(run: MemberRun) -> list[Path]:
    return [
        paths.fold_folder(run["run"], seed, fold) / "weights.safetensors" for seed, fold in run["checkpoints"]
    ]


def write_manifest(bundle: Path) -> None:
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


def link(file: str | Path, target: str | Path) -> None:
    """A hard link, since weights are large; a copy if `target` is on another disk."""
    try:
        os.link(os.path.realpath(file), target)
    except OSError:
        shutil.copyfile(file, target)


def _copy_package(bundle: Path) -> None:
    package = Path(__file__).resolve().parents[2]
    for file in sorted(package.rglob("*.py")):
        target = bundle / "comp" / file.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    (bundle / "configs").mkdir()
    for name in ("base.yaml", "competition.yaml"):
        shutil.copyfile(paths.path("configs", name), bundle / "configs" / name)


def _link_artefacts(bundle: Path, name: str, runs: list[MemberRun]) -> None:
    """Weights, what belongs to them, and configs; verified here, with their manifest entries for
    kernel_predict."""
    weights = [file for run in runs for file in weights_of(run)]
    files = list(weights)
    files += [
        file for head in weights if frozen_heads.is_head(head) for file in frozen_heads.required_files(head)
    ]
    files += [file for file in map(knn.gallery_file, files) if file.exists()]
    files += [paths.run_folder(run["run"]) / "config.yaml" for run in runs]
    folders = {bank.folder(name), bank.folder(run_members.cv_address(name))}
    files += [
        folder / file
        for folder in sorted(folders)
        for file in ("apply.json", "score.json")
        if (folder / file).exists()
    ]
    for file in dict.fromkeys(files):
        artifacts.verified(file, "comp kernel needs it")
        target = bundle / file.relative_to(paths.root())
        target.parent.mkdir(parents=True, exist_ok=True)
        link(file, target)
        manifest = target.parent / artifacts.MANIFEST
        entries = json.loads(manifest.read_text()) if manifest.exists() else {}
        entries[file.name] = artifacts.manifest_entry(file)
        manifest.write_text(json.dumps(entries, indent=1, sort_keys=True))


def _write_backbone(bundle: Path, run: str) -> str | None:
    """The folder of the bundle with config.json of a network from the Hugging Face hub or a folder, so that
    it can be built offline; None for a network that timm builds by name."""
    config = backbone.hub_config(resolve.from_yaml(paths.run_folder(run) / "config.yaml").model.name)
    if not config:
        return None
    artifacts.write_json(bundle / "backbones" / run / "config.json", config)
    return f"backbones/{run}"


def _write_metadata(bundle: Path, table: Samples) -> None:
    """Metadata columns of the training rows, without ids, images and labels: means and categories are
    computed from them."""
    columns = ["weight", *(name for name in table.frame.columns if str(name).startswith("meta."))]
    frame = table.frame.loc[table.positions("train"), columns].reset_index(drop=True)
    frame["id"] = frame["row"] = [f"known:{i}" for i in range(len(frame))]
    frame["images"], frame["source"] = [[""]] * len(frame), "train"
    samples.save(frame, (), bundle / "data" / "samples.parquet")
