"""One clean copy of the template for all tests, and one project baked from it with the default answers."""

import sys
from pathlib import Path

import pytest

from bake import bake, copy_template


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_template(tmp_path_factory.mktemp("clone") / "template")


@pytest.fixture(scope="session")
def project(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bake(template, tmp_path_factory.mktemp("baked"), {})


def link_environment(project: Path) -> Path:
    """This environment as the project's .venv, newer than its pins, so that its Makefile installs nothing."""
    (project / ".venv").mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (project / ".venv" / part).symlink_to(Path(sys.prefix) / part)
    (project / ".venv" / "installed").touch()
    return project
