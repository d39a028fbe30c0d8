"""A project with names out of the ordinary passes its own checks, and its README works as written."""

import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from bake import CHECKOUT, bake

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
    for target in ("setup", "test", "check", "lock"):
        run(odd, "make", "--dry-run", target)


def block(readme: Path, chapter: str) -> str:
    """The commands of a chapter, as one would copy them."""
    found = re.search(rf"## {chapter}\n.*?```bash\n(.+?)```", readme.read_text("utf-8"), re.DOTALL)
    assert found, chapter
    return found[1]


def typed(folder: Path, commands: str, environment: dict[str, str]) -> str:
    """What a shell says that stops at the first failure."""
    command = ["bash", "-c", f"set -euo pipefail\n{commands}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_projects_readme_works_as_written(odd, tmp_path):
    """In a fresh shell, with nothing but what the README says: set-up, first commands, make test, first submission."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean["PATH"] = os.pathsep.join(
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if Path(folder) != Path(sys.executable).parent
    )
    readme = odd / "README.md"
    try:
        said = typed(odd, block(readme, "First commands"), clean)
        score = re.search(r"accuracy ([\d.]+) on", said)
        assert score
        assert float(score[1]) >= 0.95
        for step in steps(
            odd / ".github/workflows/checks.yml"
        ):  # make setup again, which finds nothing to do, and make test
            said = typed(odd, step, clean)
        assert " passed" in said
        first_submission(odd, readme, clean, tmp_path)
    finally:
        shutil.rmtree(odd / ".venv", ignore_errors=True)  # gigabytes


def steps(workflow: Path) -> list[str]:
    """What GitHub would type."""
    (job,) = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [step["run"] for step in job["steps"] if "run" in step]


def first_submission(project: Path, readme: Path, clean: dict[str, str], home: Path) -> None:
    """With the real client; all that differs from Kaggle is where it is, and that its data are the practice digits."""
    sys.path.insert(0, str(CHECKOUT / "tests" / "engine"))
    try:
        from kaggle_server import KEY, Server
    finally:
        sys.path.pop(0)
    server = Server()
    try:
        server.archive = zipped(project / "data" / "raw")
        key = home / ".kaggle" / "access_token"
        assert f"~/{key.relative_to(home)}" in readme.read_text("utf-8")
        key.parent.mkdir()
        key.write_text(KEY)
        where = server.environment() | {"HOME": str(home)}
        keyless = {
            name: value for name, value in where.items() if name not in ("KAGGLE_USERNAME", "KAGGLE_KEY")
        }
        away = re.search(r"`(mkdir \.\./practice .+?)`", readme.read_text("utf-8"))
        assert away
        typed(project, away[1], clean)
        commands = "source .venv/bin/activate\n" + block(readme, "First submission in ten minutes")
        said = typed(project, commands, clean | keyless)
        (sent,) = server.submissions
        assert sent["description"].startswith("first ")
        assert sent["data"] == (project / "submissions" / "exp001.csv").read_bytes()
        assert "submission 1000: public 0.5" in said
        assert KEY not in said
    finally:
        server.close()


def zipped(raw: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for file in sorted(raw.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(raw))
    return out.getvalue()
