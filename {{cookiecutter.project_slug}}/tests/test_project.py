"""Tests of this project, in under two minutes: every config resolves, every experiment's network builds, the
functions of competition.py have the right parameters, folds do not leak, and exp001 trains. They use your
data once `comp prepare` and `comp folds` have run, and practice digits before that."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from comp import competition
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
# function of comp/competition.py -> its parameters
SIGNATURES = {
    "read_samples": ["raw"],
    "load_image": ["row", "decode"],
    "model": ["cfg", "outputs"],
    "loss": ["output", "target"],
    "metric": ["truth", "prediction", "rows"],
    "recipe": ["size"],
    "postprocess": ["rows", "prediction"],
    "write_submission": ["rows", "prediction", "sample"],
}
TINY = "base: base\ndata: {size: 32, channels: 1}\nmodel: {name: test_resnet, pretrained: false}\n"

hardware.set_threads(1)  # before torch is imported


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of configs and tables, so that no file of yours is changed. data/raw is a link."""
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
def test_experiment_resolves_and_its_network_builds(place: Path, name: str) -> None:
    """On the meta device: no weights are allocated or downloaded."""
    from comp import models

    cfg = resolve.load(place, name).config
    assert models.weight_bytes(cfg, samples.load().heads) > 0


@pytest.mark.parametrize(
    "name", sorted(file.stem for file in (HERE / "configs" / "ensembles").glob("*.yaml"))
)
def test_ensemble_resolves(place: Path, name: str) -> None:
    from comp.engine.ensemble import blend_config

    file = place / "configs" / "ensembles" / f"{name}.yaml"
    tree, lines = resolve.parse(file, file.name)  # its members need not be trained
    assert resolve.validate(blend_config.Blend, tree, lines, file.name).members


@pytest.mark.parametrize("name", sorted(file.stem for file in (HERE / "configs" / "tune").glob("*.yaml")))
def test_search_space_resolves(place: Path, name: str) -> None:
    from comp.engine.tune import study_config

    assert study_config.read(name, resolve.load(place, "exp001").config, "exp001").knobs


@pytest.mark.parametrize("name", SIGNATURES)
def test_function_of_competition_has_its_parameters(name: str) -> None:
    function = getattr(competition, name, None)
    if function is not None:
        assert len(inspect.signature(function).parameters) == len(SIGNATURES[name]), SIGNATURES[name]


def test_folds_do_not_leak(place: Path) -> None:
    """No row (and no group, if the scheme keeps groups together) is in the training and validation rows of
    the same fold; each row is scored once per repeat."""
    table = samples.load()
    split = folds.load(table)
    keep = ["row", *(["group"] if "group" in split.meta["scheme"] else [])]
    scored = []
    for fold in range(split.count):
        train, valid = split.split(fold)
        scored.append(valid)
        for column in keep:
            values = table.frame[column].to_numpy(object)
            assert not set(values[train]) & set(values[valid]), (
                f"fold {fold}: {column} in training and validation"
            )
    repeats = int(split.meta["repeats"])
    assert set(np.unique(np.concatenate(scored), return_counts=True)[1]) == {repeats}


def test_exp001_trains(place: Path) -> None:
    """One epoch of 64 images of one fold, like `comp train exp001 --debug`."""
    assert cli.main(["train", "exp001", "--debug", "--as", "check", "--fold", "0", "data.cache=false"]) == 0
    assert (place / "runs" / "check" / "seed0" / "fold0" / "weights.safetensors").is_file()
