"""Answers are data: every one gives a project that parses, or one sentence, exit code 1 and an empty
folder."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import tomllib
import unicodedata
from pathlib import Path

import pytest
import yaml
from hostile import NAMES, Answer, answers

from bake import bake, settings

ANSWERS = answers()
JINJA = ("{{", "{%", "{#")
RENDERED = 9  # of the 200, as key=value, by cookiecutter itself


def allowed(name: str, text: str) -> bool:
    """The rules of cookiecutter.json once more, said in another language."""
    if name == "project_slug":
        shaped = re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,48}[A-Za-z0-9])?", text)
        return bool(shaped) and not re.fullmatch(r"con|prn|aux|nul|com\d|lpt\d", text, re.IGNORECASE)
    if name == "competition":
        return bool(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,98}[A-Za-z0-9])?", text))
    printable = all(letter == " " or unicodedata.category(letter)[0] not in "CZ" for letter in text)
    return printable and text.strip() != "" and len(text) <= 100 and not any(mark in text for mark in JINJA)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_made(folder: Path, answer: Answer | None, as_template: list[str]) -> None:
    """It parses, holds the answer to the letter, and nothing of it is missing."""
    about = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    declared = yaml.safe_load((folder / "configs" / "competition.yaml").read_text("utf-8"))
    assert (folder / "README.md").read_text("utf-8").startswith(f"# {declared['title']}\n")
    assert about["name"] == f"comp-{folder.name}"
    got = {
        "project_name": declared["title"],
        "project_slug": folder.name,
        "competition": declared["slug"],
        "author": about["authors"][0]["name"],
    }
    assert about["description"] == f"{got['project_name']}: the Kaggle competition {got['competition']}"
    if answer:
        assert got[answer.name] == answer.text
    assert tree(folder) == as_template


def tree(folder: Path) -> list[str]:
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in inside if path.parts[0] != ".git")


@pytest.fixture(scope="module")
def as_template(template: Path) -> list[str]:
    return tree(template / "{{cookiecutter.project_slug}}")


def test_two_hundred_answers_of_both_kinds():
    assert len(ANSWERS) == 200
    assert 60 < sum(answer.typed for answer in ANSWERS) < 140
    assert 40 < sum(allowed(answer.name, answer.text) for answer in ANSWERS) < 160
    # As key=value to plain cookiecutter these alone would be rendered, and some run: bake.py refuses them
    # before it.
    assert (
        sum(not answer.typed and any(mark in answer.text for mark in JINJA) for answer in ANSWERS) == RENDERED
    )


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_hostile_answer(answer, template, as_template, tmp_path, monkeypatch, capfd):
    here, target = tmp_path / "here", tmp_path / "target"
    here.mkdir()
    target.mkdir()
    monkeypatch.chdir(here)
    if answer.typed:
        lines = [answer.text if name == answer.name else "" for name in NAMES]
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        text = answer.text.strip()  # the prompt strips, and takes an empty line for the default
        given = {}
    else:
        text, given = answer.text, {answer.name: answer.text}

    sentence, crash = "", None
    try:
        bake(template, target, given, ask=answer.typed)
    except SystemExit as stop:
        sentence = str(stop.code)
    except Exception as error:
        crash = error

    assert entries(tmp_path) == ["here", "target"], "written outside the target folder"
    assert crash is None
    assert not list(tmp_path.rglob("CANARY")), "the answer was run as code"
    if answer.typed and answer.text == "":
        check_made(target / "digits-practice", None, as_template)
    elif allowed(answer.name, text):
        assert len(entries(target)) == 1
        check_made(target / entries(target)[0], answer._replace(text=text), as_template)
    else:
        assert entries(target) == []
        assert re.fullmatch(rf"{answer.name} = .* is refused; allowed: [^\n]+\.", sentence)


def cookiecutter(template: Path, tmp_path: Path, *given: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "target").mkdir()
    return subprocess.run(
        [sys.executable, "-m", "cookiecutter", str(template), "-o", str(tmp_path / "target"), *given],
        env={**os.environ, "COOKIECUTTER_CONFIG": str(settings(tmp_path))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("project_slug", "../x"),
        ("project_slug", "a/b"),
        ("project_slug", "x" * 300),
        ("competition", "https://kaggle.com/x"),
        ("author", "two\nlines"),
    ],
)
def test_real_process_refuses_in_one_sentence(name, text, template, tmp_path):
    done = cookiecutter(template, tmp_path, "--no-input", f"{name}={text}")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{name} = ")
    assert entries(tmp_path / "target") == []


def test_real_process_makes_a_project(template, as_template, tmp_path):
    text = 'O\'Neill "the 🎉" \\ {brace} </script> ${HOME} %s'
    done = cookiecutter(template, tmp_path, "--no-input", f"author={text}", f"project_name={text}")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "target").iterdir()
    check_made(folder, Answer("author", text, False), as_template)
    check_made(folder, Answer("project_name", text, False), as_template)
    assert f"cd {folder.name}" in done.stdout


@pytest.mark.parametrize(
    ("slug", "made"),
    [("$(touch CANARY)", []), ("../x", []), ("", ["digits-practice"]), ("Good_one", ["Good_one"])],
)
def test_typed_at_a_real_terminal(slug, made, template, tmp_path):
    """A pseudo terminal: the answers travel as keystrokes do."""
    (tmp_path / "target").mkdir()
    ours, theirs = pty.openpty()
    started = subprocess.Popen(
        [sys.executable, "-m", "cookiecutter", str(template), "-o", "target"],
        env={**os.environ, "COOKIECUTTER_CONFIG": str(settings(tmp_path))},
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, f"\n{slug}\n\nsay \"'{{}}\\\n".encode())
    said = b""
    try:
        while piece := os.read(ours, 4096):
            said += piece
    except OSError:  # the other side closed the terminal
        pass
    os.close(ours)
    assert started.wait() == (0 if made else 1), said.decode()
    assert entries(tmp_path / "target") == made
    assert not list(tmp_path.rglob("CANARY"))
    if made:
        about = tomllib.loads((tmp_path / "target" / made[0] / "pyproject.toml").read_text())["project"]
        assert about["authors"] == [{"name": "say \"'{}\\"}]
    else:
        assert b"project_slug = " in said.splitlines()[-1]
        assert b"Traceback" not in said


def test_a_typed_answer_is_not_run_by_the_next_update(template):
    """cruft keeps the answers and gives them to cookiecutter as key=value, which renders them."""
    rules = json.loads((template / "cookiecutter.json").read_text())["__good"]
    for name in ("project_name", "author"):
        assert all(f"'{mark}' in a" in rules[name] for mark in JINJA)


def test_an_existing_folder_is_left_alone(template, tmp_path):
    (tmp_path / "target" / "digits-practice").mkdir(parents=True)
    (tmp_path / "target" / "digits-practice" / "mine.txt").write_text("mine")
    with pytest.raises(Exception, match="already exists"):
        bake(template, tmp_path / "target", {})
    assert entries(tmp_path / "target" / "digits-practice") == ["mine.txt"]
