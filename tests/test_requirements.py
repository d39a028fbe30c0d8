"""Pinned, hashed, and silent about where to get them."""

import re
import tomllib

import pytest

from bake import CHECKOUT, PROJECT

FILES = ["requirements.txt", f"{PROJECT}/requirements.txt"]
EXTRAS = f"{PROJECT}/requirements-extras.txt"


def pins(file: str) -> dict[str, str]:
    """Name to version, after a look at every line."""
    found = {}
    entries = re.split(r"\n(?! )", (CHECKOUT / file).read_text())
    for entry in (entry for entry in entries if entry and not entry.startswith("#")):
        head, *hashes = [line.rstrip("\\").strip() for line in entry.splitlines()]
        match = re.fullmatch(r"([a-z0-9._-]+)==([^ ;]+)( ; .+)?", head)
        assert match, f"not one exact version: {head}"
        assert hashes, f"no hash: {head}"
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashes), head
        assert match[1] not in found, f"two versions of {match[1]}"
        found[match[1]] = match[2]
    return found


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_-]", text)[0].lower().replace("_", "-") for text in requirements}


@pytest.mark.parametrize(
    ("file", "least"), [*((file, 100) for file in FILES), (EXTRAS, 5), ("benchmarks/requirements.txt", 2)]
)
def test_every_line_is_pinned_and_hashed_and_names_no_address(file, least):
    assert len(pins(file)) > least
    text = (CHECKOUT / file).read_text()
    assert "://" not in text
    assert not re.search(r"^\s*(-i|-f|--index|--extra-index|--find-links|--trusted)", text, re.MULTILINE)


def test_what_pyproject_asks_for_is_pinned():
    about = tomllib.loads((CHECKOUT / PROJECT / "pyproject.toml").read_text())
    asked = names(about["project"]["dependencies"]) | names(about["dependency-groups"]["dev"])
    assert asked - set(pins(FILES[1])) == set()
    for extra in about["project"]["optional-dependencies"].values():
        assert names(extra) - set(pins(EXTRAS)) == set()
    assert not set(pins(EXTRAS)) & set(pins(FILES[1])), "an extra has what everybody has"


def test_the_template_has_the_projects_pins_and_its_own():
    mine, projects = pins(FILES[0]), pins(FILES[1])
    assert {name: mine.get(name) for name in projects} == projects
    own = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
    assert names(own) - set(mine) == set()


def test_known_traps_stay_closed():
    projects = pins(FILES[1])
    assert projects["albumentations"] == "2.0.8"  # the last under MIT
    assert projects["kaggle"] == "2.2.4"
    assert "six" in projects  # kaggle imports it undeclared
    assert any(name.startswith("nvidia-") for name in projects), "locked with a CPU-only torch"
    assert "+" not in projects["torch"]
