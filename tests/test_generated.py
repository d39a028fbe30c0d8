"""A project with names out of the ordinary passes its own checks, and its README works as written."""

import configparser
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
from conftest import link_environment

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
    """The light rules of its own pyproject.toml, and every rule of the template's."""
    strict = ["--no-cache", "--config", str(CHECKOUT / "pyproject.toml")]
    run(odd, sys.executable, "-m", "ruff", "check", "--no-cache", ".")
    run(odd, sys.executable, "-m", "ruff", "check", *strict, ".")
    run(odd, sys.executable, "-m", "ruff", "format", *strict, "--check", ".")


# Careless code that a user may add to a page: no types, unformatted, a lambda, an overwritten loop variable.
HASTY = """
def my_mix( x,y = None,**kw ) :
  import os; f = lambda a : a*2
  for i in [ 1,2 ] :
        i = f( i )
  if y == None : y = os.getpid( )
  return x,y,i
"""


@pytest.fixture
def edited(template, tmp_path) -> Path:
    return link_environment(bake(template, tmp_path, {}))


def make_check(project: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "check"], cwd=project, capture_output=True, text=True, check=False)


def append(project: Path, name: str, text: str) -> int:
    """The number of the last line."""
    with (project / name).open("a", encoding="utf-8") as file:
        file.write(text)
    return (project / name).read_text("utf-8").count("\n")


@pytest.mark.parametrize("page", ["losses.py", "transforms.py", "competition.py"])
def test_an_untyped_unformatted_function_in_a_page_passes(edited, page):
    append(edited, f"comp/{page}", HASTY)
    done = make_check(edited)
    assert done.returncode == 0, done.stdout + done.stderr
    for target in ("check", "test"):
        commands = run(edited, "make", "--dry-run", target)
        assert "ruff check" in commands
        assert not re.search(r"mypy|ruff format", commands)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("\n\ndef shifted(x):\n    return x + offzet\n", "F821"),
        ("\n\ndef shifted(x:\n", "invalid-syntax"),
        ("\n\nimport colorsys\n", "F401"),
    ],
)
def test_an_error_in_a_page_fails_with_file_and_line(edited, text, what):
    last = append(edited, "comp/losses.py", text)
    done = make_check(edited)
    assert done.returncode != 0
    assert what in done.stdout
    assert re.search(rf"comp/losses\.py:({last}|{last + 1}):\d+", done.stdout), done.stdout


def test_the_engine_is_not_checked_in_a_project(edited):
    append(edited, "comp/engine/cli.py", "\n\nimport colorsys\n")
    done = make_check(edited)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_template_checks_the_same_function_with_every_rule(edited):
    """The commands of the template's Makefile, with its settings, on a page and on the engine."""
    commands = run(CHECKOUT, "make", "--dry-run", "check")
    assert "ruff check --config pyproject.toml ." in commands
    assert "ruff format --config pyproject.toml --check ." in commands
    assert "mypy --config-file ../tests/engine/mypy.ini comp tests ../tests/engine" in commands
    for name in ("comp/losses.py", "comp/engine/cli.py"):
        append(edited, name, HASTY)
    settings = str(CHECKOUT / "pyproject.toml")
    for arguments in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--config", settings, "."]
        done = subprocess.run(command, cwd=edited, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        for name in ("comp/losses.py", "comp/engine/cli.py"):
            assert name in done.stdout, (arguments, done.stdout)
    types = configparser.ConfigParser()
    types.read(CHECKOUT / "tests" / "engine" / "mypy.ini")
    assert types["mypy"].getboolean("disallow_untyped_defs")


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
    """In a fresh shell, with nothing but what the README says: set-up, first commands, make test, first
    submission."""
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
        assert (odd / ".git" / "hooks" / "pre-commit").exists()
        first_submission(odd, readme, clean, tmp_path)
    finally:
        shutil.rmtree(odd / ".venv", ignore_errors=True)  # gigabytes


def steps(workflow: Path) -> list[str]:
    """What GitHub would type."""
    (job,) = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [step["run"] for step in job["steps"] if "run" in step]


def first_submission(project: Path, readme: Path, clean: dict[str, str], home: Path) -> None:
    """With the real client; all that differs from Kaggle is where it is, and that its data are the practice
    digits."""
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
        commands = "source .venv/bin/activate\n" + block(readme, "First submission in ten minutes")
        assert re.search(r"^mkdir -p \.\./practice && mv ", commands, re.MULTILINE)
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
