"""The tree of the template is the tree of the project, and only four of its files are rendered."""

import fnmatch
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from bake import PROJECT, bake

RENDERED = {"README.md", "LICENSE", "pyproject.toml", "configs/competition.yaml"}


def files(folder: Path) -> set[str]:
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in inside if path.parts[0] != ".git"}


def test_same_files_same_bytes_same_modes(template, project):
    lies = template / PROJECT
    assert files(project) == files(lies)
    assert len(files(project)) > 40
    for name in files(project):
        assert (project / name).stat().st_mode == (lies / name).stat().st_mode, name
        same = (project / name).read_bytes() == (lies / name).read_bytes()
        assert same == (name not in RENDERED), name


def test_only_four_files_are_rendered(template):
    """A new kind of file goes into _copy_without_render of cookiecutter.json: an f-string with {{ stops the
    bake."""
    patterns = json.loads((template / "cookiecutter.json").read_text())["_copy_without_render"]
    rendered = set()
    for name in files(template / PROJECT):
        ways = [name, *map(str, Path(name).parents)]  # cookiecutter copies whole folders, too
        if not any(fnmatch.fnmatch(way, pattern) for way in ways for pattern in patterns):
            rendered.add(name)
    assert rendered == RENDERED


def test_jinja_stands_only_where_it_is_rendered(template):
    holds = {
        name
        for name in files(template / PROJECT)
        if re.search(
            r"\{[{%#]-?\s*cookiecutter|\{%-?\s*(if|for|set|raw)",
            (template / PROJECT / name).read_text("utf-8"),
        )
    }
    assert holds == RENDERED


def test_no_braces_left(project):
    for name in RENDERED:
        text = (project / name).read_text("utf-8")
        assert "cookiecutter." not in text, name
        assert not re.search(r"\{\{|\}\}|\{%|%\}", text), name


def test_lies_parseable_as_template(template):
    """Tools read the tree unbaked: placeholders stand inside quoted strings."""
    tomllib.loads((template / PROJECT / "pyproject.toml").read_text("utf-8"))
    yaml.safe_load((template / PROJECT / "configs" / "competition.yaml").read_text("utf-8"))


def test_defaults(project):
    about = tomllib.loads((project / "pyproject.toml").read_text("utf-8"))["project"]
    assert (project.name, about["name"]) == ("digits-practice", "comp-digits-practice")
    assert about["scripts"] == {"comp": "comp.engine.cli:main"}


def test_git_repository_is_made_and_clean_of_products(project):
    """What the verbs write is ignored, what a person writes is not."""
    assert (project / ".git").is_dir()

    def ignored(*names: str) -> bool:
        asked = subprocess.run(["git", "check-ignore", "-q", *names], cwd=project, check=False)
        return asked.returncode == 0

    products = ["data/raw/train.csv", "runs/exp001/score.json", "studies/a", "ensembles/blend001/oof.arrow"]
    for name in [
        *products,
        "submissions/x.csv",
        ".venv/bin/comp",
        "comp/engine/__pycache__/cli.cpython-311.pyc",
        "kaggle.json",
    ]:
        assert ignored(name), name
    for name in [
        *files(project),
        "submissions/ledger.jsonl",
        "configs/ensembles/new.yaml",
        "configs/exp009.yaml",
    ]:
        assert not ignored(name), name


def test_repository_of_a_git_hook_is_not_touched(template, tmp_path, monkeypatch):
    """git exports GIT_DIR to its hooks: `git init` would go there."""
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    made = bake(template, tmp_path / "target", {})
    assert (made / ".git").is_dir()
    assert not (tmp_path / "other").exists()


def test_no_git_is_no_reason_to_stop(template, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    made = bake(template, tmp_path / "target", {})
    assert not (made / ".git").exists()
    assert "git init" in capfd.readouterr().out


def test_packs_under_every_allowed_name(template, tmp_path):
    """What pip needs of pyproject.toml holds for names out of the ordinary."""
    made = bake(
        template,
        tmp_path,
        {"project_name": 'a "b" \\ 🎉 {c}', "author": "Ł, O'N <x@y> 日本", "project_slug": "9_x-Y"},
    )
    from hatchling.builders.wheel import WheelBuilder

    builder = WheelBuilder(str(made))
    assert builder.metadata.core.description.startswith('a "b" \\ 🎉 {c}:')
    (wheel,) = builder.build(directory=str(tmp_path / "dist"), versions=["standard"])
    assert os.path.basename(wheel) == "comp_9_x_y-0.1.0-py3-none-any.whl"


@pytest.mark.parametrize("folder", [".", PROJECT])
def test_every_script_runs_and_stops_at_the_first_failure(template, folder):
    for script in (template / folder).glob("**/*.sh" if folder == PROJECT else ".ci/run"):
        lines = script.read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash"
        assert "set -euo pipefail" in lines
        assert os.access(script, os.X_OK), script
