"""Checks of this project, in under a minute: every config reads, every experiment's network can be built, no fold leaks, and exp001
trains. They use your data once `comp prepare` and `comp folds` have run, and the practice digits before that."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from comp.engine import cli, hardware
from comp.engine.config import resolve
from comp.engine.data import folds, samples
from comp.engine.store import paths

HERE = Path(__file__).resolve().parents[1]
PREPARED = (HERE / "data" / "samples.parquet").exists() and (HERE / "data" / "folds.parquet").exists()
EXPERIMENTS = sorted(file.stem for file in (HERE / "configs").glob("exp*.yaml"))
PRACTICE = """
slug: practice
title: Practice
train: {table: train.csv, image: "train/{id}.png"}
test: {table: test.csv, image: "test/{id}.png"}
raw: data/raw
id: id
target: label
task: multiclass
metric: accuracy
group: writer
metadata: [pen]
folds: {scheme: stratified_group, k: 5, seed: 0}
submission: {sample: sample_submission.csv, form: label}
"""
TINY = "base: base\ndata: {size: 32, channels: 1}\nmodel: {name: test_resnet, pretrained: false}\n"

hardware.set_threads(1)  # before torch is imported


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of configs and tables, so that nothing of yours is written to. Raw files are read where they lie."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(HERE / "configs", root / "configs")
    (root / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMP_ROOT", str(root))
        patch.chdir(root)
        paths.root.cache_clear()
        if PREPARED:
            (root / "data" / "raw").symlink_to(HERE / "data" / "raw")
            for name in ("samples.parquet", "folds.parquet", "manifest.json"):
                shutil.copy(HERE / "data" / name, root / "data" / name)
        else:
            (root / "configs" / "competition.yaml").write_text(PRACTICE)
            (root / "configs" / "exp001.yaml").write_text(TINY)
            for verb in ("practice", "prepare", "folds"):
                assert cli.main([verb]) == 0, verb
        yield root
    paths.root.cache_clear()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_reads_and_its_network_can_be_built(place: Path, name: str) -> None:
    """On the meta device, which holds no weights and downloads none."""
    from comp import models

    cfg = resolve.load(place, name).config
    assert models.weight_bytes(cfg, samples.load().heads) > 0


@pytest.mark.parametrize(
    "name", sorted(file.stem for file in (HERE / "configs" / "ensembles").glob("*.yaml"))
)
def test_an_ensemble_reads(place: Path, name: str) -> None:
    from comp.engine.ensemble import blend_config

    file = place / "configs" / "ensembles" / f"{name}.yaml"
    tree, lines = resolve.parse(file, file.name)  # which of its members are trained is not asked here
    assert resolve.validate(blend_config.Blend, tree, lines, file.name).members


@pytest.mark.parametrize("name", sorted(file.stem for file in (HERE / "configs" / "tune").glob("*.yaml")))
def test_a_search_space_reads(place: Path, name: str) -> None:
    from comp.engine.tune import study_config

    assert study_config.read(name, resolve.load(place, "exp001").config, "exp001").knobs


def test_no_fold_leaks(place: Path) -> None:
    """No row, and no group where the scheme keeps groups together, is trained on and scored by one fold; each row is scored once."""
    table = samples.load()
    split = folds.load(table)
    keep = ["row", *(["group"] if "group" in split.meta["scheme"] else [])]
    scored = []
    for number in range(split.count):
        train, valid = split.split(number)
        scored.append(valid)
        for column in keep:
            values = table.frame[column].to_numpy(object)
            assert not set(values[train]) & set(values[valid]), f"fold {number}: {column} on both sides"
    repeats = int(split.meta["repeats"])
    assert set(np.unique(np.concatenate(scored), return_counts=True)[1]) == {repeats}


def test_exp001_trains(place: Path) -> None:
    """One epoch of 64 images of one fold, as `comp train exp001 --debug` does it."""
    assert cli.main(["train", "exp001", "--debug", "--as", "check", "--fold", "0", "data.cache=false"]) == 0
    assert (place / "runs" / "check" / "seed0" / "fold0" / "weights.safetensors").is_file()
