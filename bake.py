"""Bakes a project out of this checkout, uncommitted changes included: python bake.py FOLDER [key=value …].

`cookiecutter .` would do it too, with every cache and data file that happens to lie in the project's folder, and
would leave the answers in your home for the next --replay.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cookiecutter.main import cookiecutter

CHECKOUT = Path(__file__).resolve().parent
PROJECT = "{{cookiecutter.project_slug}}"


def copy_template(target: Path) -> Path:
    """What a clone of this checkout would hold if everything were committed now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in sorted(set(listed.split("\0")) - {""}):
        if (CHECKOUT / name).is_file():  # a deleted file is listed until the deletion is committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, target / name)
    return target


def settings(folder: Path) -> Path:
    """A cookiecutter config of our own: nobody's defaults come in, nothing of ours goes into their home."""
    file = folder / "cookiecutter.yaml"  # JSON is YAML
    file.write_text(json.dumps({name: str(folder / name) for name in ("replay_dir", "cookiecutters_dir")}))
    return file


def refuse(template: Path, answers: dict[str, str]) -> None:
    """What cookiecutter would get wrong: it renders answers given as key=value, code in braces included, before it looks into
    the template, and it passes over names that it does not know."""
    known = json.loads((template / "cookiecutter.json").read_text("utf-8"))
    for name, text in answers.items():
        if name not in known["__allowed"]:
            sys.exit(f"{name} = {text!r} is refused; allowed: an answer to {', '.join(known['__allowed'])}.")
        if any(mark in text for mark in ("{{", "{%", "{#")):
            shown = repr(text) if len(text) <= 80 else f"{text[:77]!r}..."
            sys.exit(f"{name} = {shown} is refused; allowed: {known['__allowed'][name]}.")


def bake(template: Path, folder: Path, answers: dict[str, str], ask: bool = False) -> Path:
    """The new project's folder. Answers not given are the defaults of cookiecutter.json."""
    refuse(template, answers)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        made = cookiecutter(
            str(template),
            no_input=not ask,
            config_file=str(settings(Path(scratch))),
            output_dir=str(folder),
            extra_context=answers,
        )
    return Path(made)


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    bake(copy_template(target / "template"), target, dict(pair.split("=", 1) for pair in sys.argv[2:]))
