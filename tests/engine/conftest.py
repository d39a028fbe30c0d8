"""Fixtures: projects in a temporary folder. Tests have their own competition and experiments, so that they do
not depend on edits of configs/ and comp/competition.py; only base.yaml and debug.yaml are the project's.

    project    the practice competition: raw files, samples and folds; each test has its own copy
    trained    the same with a finished run, exp001, a member of it and a blend of both, blend001
    empty      configs only
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "{{cookiecutter.project_slug}}"  # the project, unbaked
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = str(HERE)  # for the processes that tests start

from forked import forked  # noqa: E402

from comp import competition  # noqa: E402
from comp.engine import hardware, pages  # noqa: E402
from comp.engine.config.resolve import load  # noqa: E402
from comp.engine.config.schema import Config  # noqa: E402
from comp.engine.store import paths  # noqa: E402

hardware.set_threads(1)  # before torch is imported: two test processes with two threads each would crawl

COMPETITION = """
slug: practice
title: Practice
raw: data/raw
train: {table: train.csv, image: "train/{id}.png"}
test: {table: test.csv, image: "test/{id}.png"}
id: id
target: label
task: multiclass
metric: accuracy
group: writer
metadata: [pen]
folds: {scheme: stratified_group, k: 5, seed: 0}
submission: {sample: sample_submission.csv, form: label}
"""
EXPERIMENTS = {
    "exp001": "base: base\ndata: {size: 32, channels: 1}\naugment: {recipe: light}\n"
    "model: {name: test_resnet, pretrained: false}\n"
    "optim: {lr: 5e-3}\ntrain: {epochs: 15, ema_decay: 0.98}\n",
    "exp002": "base: exp001\nmodel: {name: test_efficientnet}\n",
}


# Test files with the longest slow tests, longest first, so that parallel workers finish at about the same
# time.
LONG = (
    "test_random_labels", "test_resume_recipes", "test_tracking", "test_ensembles_killed", "test_kernel", "test_coin_flips", "test_audit", "test_launcher", "test_distributed",
    "test_study_killed", "test_planted", "test_resume", "test_malformed", "test_submit", "test_models", "test_mutations",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("markexpr") == "slow":
        rank = {name: number for number, name in enumerate(LONG)}
        items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


def lay_out(root: Path) -> Path:
    """A project without data."""
    (root / "configs" / "ensembles").mkdir(parents=True)
    for name in ("base.yaml", "debug.yaml"):
        shutil.copy(HERE / "configs" / name, root / "configs" / name)
    (root / "configs" / "competition.yaml").write_text(COMPETITION)
    for name, text in EXPERIMENTS.items():
        (root / "configs" / f"{name}.yaml").write_text(text)
    return root


def config(*overrides: str, experiment: str = "exp001", debug: bool = False) -> Config:
    """The resolved config of an experiment of the project that a test stands in."""
    return load(paths.root(), experiment, overrides, debug).config


@pytest.fixture(scope="session")
def practice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once a session; nobody writes here, `project` is a copy."""
    from comp.engine.data import cache, make_folds, prepare, samples
    from comp.engine.extras import practice as digits

    root = lay_out(tmp_path_factory.mktemp("practice"))
    with pytest.MonkeyPatch.context() as patch:
        _enter(root, patch)
        digits.make(root / "data" / "raw")
        prepare.prepare(config(experiment="base"))
        make_folds.make(config(experiment="base"), samples.load())
        cache.open_images(config(), [images[0] for images in samples.load().frame["images"]], progress=False)
    paths.root.cache_clear()
    return root


# The config of `trained`: a short run, with a metadata column whose levels come from the training rows and
# cannot be derived from a test set.
QUICK = [
    "track=none", "train.epochs=1", "schedule.warmup=0", "machine.num_workers=0", "machine.progress=false",
    "model.metadata=true",
]  # fmt: skip


@pytest.fixture(scope="session")
def finished(practice: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once a session; nobody writes here, `trained` is a copy."""
    root = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(practice, root)
    base = root / "configs" / "base.yaml"
    base.write_text(base.read_text().replace("mode: offline", "mode: none"))
    with pytest.MonkeyPatch.context() as patch:
        _enter(root, patch)
        assert forked(lambda: _finish(root)) == 0
    paths.root.cache_clear()
    return root


def _finish(root: Path) -> None:
    """A run, the same under two views, and a blend of both."""
    from comp.engine.ensemble.blend import blend
    from comp.engine.run import predict_run, runner

    runner.train("exp001", QUICK, name="exp001")
    predict_run.predict("exp001", tta="identity,hflip")
    text = "members: [exp001, 'exp001:tta-identity-hflip']\nmethod: rank\n"
    (root / "configs/ensembles/blend001.yaml").write_text(text)
    blend("blend001")


@pytest.fixture
def trained(finished: Path, tmp_path: Path, enter: Callable[[Path], Path]) -> Path:
    shutil.copytree(finished, tmp_path / "project")
    return enter(tmp_path / "project")


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Path]]:
    """enter(folder): from here on this folder is the project."""
    yield lambda root: _enter(root, monkeypatch)
    paths.root.cache_clear()


@pytest.fixture
def empty(tmp_path: Path, enter: Callable[[Path], Path]) -> Path:
    return enter(lay_out(tmp_path / "project"))


@pytest.fixture
def project(practice: Path, tmp_path: Path, enter: Callable[[Path], Path]) -> Path:
    shutil.copytree(practice, tmp_path / "project")
    return enter(tmp_path / "project")


def _enter(root: Path, patch: pytest.MonkeyPatch) -> Path:
    patch.setenv("COMP_ROOT", str(root))
    patch.chdir(root)
    for name in pages.HOOKS:  # your own functions are for your competition, not for the practice one
        patch.delattr(competition, name, raising=False)
    paths.root.cache_clear()
    return root
