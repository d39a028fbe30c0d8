"""`cruft update` brings the template's changes, and never touches what is the user's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import CODE

from bake import PROJECT, settings


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commit(folder: Path, why: str) -> None:
    run("git", "add", "-A", cwd=folder)
    run("git", "-c", "user.name=T", "-c", "user.email=t@example.com", "commit", "-qm", why, cwd=folder)


def cruft(*command: str | Path, cwd: Path) -> str:
    return run(sys.executable, "-m", "cruft", *command, cwd=cwd)


@pytest.fixture
def upstream(template, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COOKIECUTTER_CONFIG", str(settings(tmp_path)))
    clone = shutil.copytree(template, tmp_path / "upstream")
    run("git", "init", "-q", cwd=clone)
    commit(clone, "first")
    return clone


def made(upstream: Path, folder: Path) -> Path:
    """As the last lines of a bake say: the untouched project is the first commit, so that git can merge
    later."""
    cruft("create", upstream, "--output-dir", folder, "--no-input", cwd=folder)
    commit(folder / "digits-practice", "from the template")
    return folder / "digits-practice"


def append(file: Path, line: str) -> None:
    file.write_text(file.read_text() + line + "\n")


def test_update_merges_the_rest_and_leaves_yours(upstream, tmp_path):
    project = made(upstream, tmp_path)
    assert (project / ".git").is_dir()

    mine = [
        "comp/competition.py",
        "configs/competition.yaml",
        "configs/exp001.yaml",
        "notebooks/explore.ipynb",
    ]
    mine.append("configs/ensembles/blend001.yaml")
    for name in mine:
        append(project / name, "")
    append(project / "comp" / "metrics.py", "# my own last line")
    (project / "configs" / "exp003.yaml").write_text("base: exp001\n")
    commit(project, "mine")

    lies = upstream / PROJECT
    for name in mine:
        append(lies / name, "# of the template")
    (lies / "configs" / "exp003.yaml").write_text("base: base  # of the template\n")
    (lies / "configs" / "exp900.yaml").write_text("base: base  # of the template\n")
    (lies / "comp" / "metrics.py").write_text(
        "# new first line\n" + (lies / "comp" / "metrics.py").read_text()
    )
    (lies / "comp" / "new_module.py").write_text("NEW = True\n")
    (lies / "scripts" / "submit.sh").unlink()
    append(lies / "README.md", "Of {{ cookiecutter.author }}.")
    commit(upstream, "second")
    kept = {name: (project / name).read_bytes() for name in [*mine, "configs/exp003.yaml"]}

    said = cruft("update", "--skip-apply-ask", cwd=project)

    assert "Good work" in said
    assert {name: (project / name).read_bytes() for name in kept} == kept
    assert not (project / "configs" / "exp900.yaml").exists()
    merged = (project / "comp" / "metrics.py").read_text().splitlines()
    assert (merged[0], merged[-1]) == ("# new first line", "# my own last line")
    assert (project / "comp" / "new_module.py").read_text() == "NEW = True\n"
    assert not (project / "scripts" / "submit.sh").exists()
    assert (project / "README.md").read_text().endswith("Of Kaggler.\n")
    assert not list(project.rglob("*.rej"))
    assert (
        json.loads((project / ".cruft.json").read_text())["commit"]
        == run("git", "rev-parse", "HEAD", cwd=upstream).strip()
    )
    assert "first" not in run("git", "log", "--format=%s", cwd=project), (
        "the project's own history was replaced"
    )
    assert cruft("check", cwd=project)


def test_a_conflict_leaves_marks_for_a_person(upstream, tmp_path):
    project = made(upstream, tmp_path)
    for folder, line in ((project, "# mine"), (upstream / PROJECT, "# theirs")):
        append(folder / "scripts" / "submit.sh", line)
    commit(project, "mine")
    commit(upstream, "second")
    cruft("update", "--skip-apply-ask", cwd=project)
    text = (project / "scripts" / "submit.sh").read_text()
    assert "<<<<<<<" in text
    assert "# mine" in text
    assert "# theirs" in text


def test_cruft_refuses_like_cookiecutter(upstream, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    for answers in ({"project_slug": "../x"}, {"author": CODE[0] + "\n"}):
        done = subprocess.run(
            [sys.executable, "-m", "cruft", "create", upstream, "--output-dir", target, "--no-input"]  # noqa: RUF005
            + ["--extra-context", json.dumps(answers)],
            cwd=tmp_path,
            env=os.environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert f"{next(iter(answers))} = " in done.stderr.splitlines()[-1]
        assert list(target.iterdir()) == []
    assert not (tmp_path / "x").exists()
