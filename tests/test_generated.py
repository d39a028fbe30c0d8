"""A project with names out of the ordinary passes its own checks, and its README works as written."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bake import bake

ODD = {
    "project_name": "O\"Neill's \\ 🎉 {digits} %s",
    "project_slug": "Odd_1-x",
    "author": '日本 \\N{DEL} "x" <a@b>',
}


@pytest.fixture(scope="module")
def odd(template, tmp_path_factory) -> Path:
    return bake(template, tmp_path_factory.mktemp("odd"), ODD)


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_lint_and_format(odd):
    run(odd, sys.executable, "-m", "ruff", "check", "--no-cache", ".")
    run(odd, sys.executable, "-m", "ruff", "format", "--no-cache", "--check", ".")


def test_verbs_start_and_the_config_reads(odd):
    assert "comp VERB" in run(odd, sys.executable, "-m", "comp", "--help")
    assert ODD["project_name"] in run(odd, sys.executable, "-m", "comp", "config", "exp001")


def test_make_knows_its_targets(odd):
    for target in ("setup", "test", "slow", "check", "lock"):
        run(odd, "make", "--dry-run", target)


@pytest.mark.slow
def test_the_projects_readme_works_as_written(odd):
    """In a fresh shell, with nothing but what the README says: set-up, first commands, make test."""
    block = re.search(
        r"## First commands\n\n```bash\n(.+?)```", (odd / "README.md").read_text("utf-8"), re.DOTALL
    )
    assert block
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean["PATH"] = os.pathsep.join(
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if Path(folder) != Path(sys.executable).parent
    )
    try:
        script = f"set -euo pipefail\n{block[1]}\nmake test\n"
        done = subprocess.run(
            ["bash", "-c", script], cwd=odd, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        score = re.search(r"accuracy ([\d.]+) on", done.stdout)
        assert score
        assert float(score[1]) >= 0.9
    finally:
        shutil.rmtree(odd / ".venv", ignore_errors=True)  # gigabytes
