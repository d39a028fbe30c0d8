"""Notebooks on Kaggle and Colab: paths, keys from secrets, old package versions, and
notebooks/five_commands.ipynb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from comp.engine import cli, command, notebook
from comp.engine.deliver import kaggle

HERE = Path(__file__).resolve().parents[2] / "{{cookiecutter.project_slug}}"
KEY = "planted-notebook-0123456789"


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The secrets service of a notebook, with these keys."""
    held: dict[str, str] = {}
    for name in notebook.KEYS:
        monkeypatch.setenv(name, "")
    module = ModuleType("kaggle_secrets")
    module.UserSecretsClient = lambda: SimpleNamespace(get_secret=held.__getitem__)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    return held


def test_keys_come_from_the_notebooks_secrets(
    secrets: dict[str, str], empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets["WANDB_API_KEY"] = KEY
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("PYTHONPATH", "")
    assert notebook.setup() == HERE == Path.cwd()
    output = capsys.readouterr().out
    assert os.environ["WANDB_API_KEY"] == KEY and KEY not in output
    assert "WANDB_API_KEY: from the notebook's secrets" in output
    assert "KAGGLE_API_TOKEN: not in the notebook's secrets (KeyError)" in output
    done = subprocess.run(["comp", "--help"], capture_output=True, text=True, check=True)
    assert "comp VERB" in done.stdout, "a command, although nothing was installed"


def test_without_secrets_the_key_is_reported_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert "neither" in notebook.load_key("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert notebook.load_key("WANDB_API_KEY") == "in the environment"


def test_files_of_the_competition_are_found(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "kaggle" / "input" / "competitions" / "practice"
    there.mkdir(parents=True)
    (there / "train.csv").write_text("id\n1\n")
    monkeypatch.setenv("COMP_KAGGLE", str(tmp_path / "kaggle"))
    for _ in "another session":
        assert cli.main(["download"]) == 0
    assert (empty / "data" / "raw").is_symlink() and (empty / "data/raw/train.csv").read_text() == "id\n1\n"
    assert "a link to" in capsys.readouterr().out


def test_old_packages_are_listed_with_the_install_command(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {
        "torch": "2.9.1+cu126",
        "timm": "1.0.26",
        "albumentations": "2.0.8",
        "opencv-python": "4.13.0.92",
    }
    monkeypatch.setattr(command, "_installed", versions.get)
    assert cli.main(["tune", "exp001"]) == 2
    output = capsys.readouterr().err.strip()
    assert output.startswith(
        "comp tune: needs torch>=2.10, optuna>=5, installed: torch 2.9.1+cu126, no optuna; pip install"
    )
    assert len(output.splitlines()) == 1
    versions |= {"torch": "2.10.0", "optuna": "5.0.0"}
    command.check_versions("comp tune", cli.VERBS["tune"].needs)


def test_required_versions_are_those_of_pyproject() -> None:
    listed = tomllib.loads((HERE / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    needs = {need for verb in cli.VERBS.values() for need in verb.needs} | set(kaggle.REQUIREMENTS)
    assert needs <= set(listed)
    training = [verb.needs for verb in cli.VERBS.values() if verb.chapter == "training"]
    assert len(training) == 10 and set(training) == {command.TRAINING}


def test_the_notebook_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python code runs, and its five commands are existing verbs and scripts."""
    cells = json.loads((HERE / "notebooks" / "five_commands.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    commands = [
        part.strip(" !").split()
        for text in code
        for line in text.splitlines()
        if line.startswith("!")
        for part in line.split("&&")
    ]
    assert {words[1] for words in commands if words[0] == "comp"} <= cli.VERBS.keys()
    assert [words[1] for words in commands if words[0] == "bash"] == ["scripts/train_folds.sh"]
    assert len([text for text in code if text.startswith("!")]) == 5
    assert (HERE / "scripts" / "train_folds.sh").exists()
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code[:2])],
        cwd=HERE / "notebooks",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and f"project: {HERE}" in done.stdout, done.stderr
