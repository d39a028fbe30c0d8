"""One clean copy of the template for all tests, and one project baked from it with the default answers."""

from pathlib import Path

import pytest

from bake import bake, copy_template


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_template(tmp_path_factory.mktemp("clone") / "template")


@pytest.fixture(scope="session")
def project(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bake(template, tmp_path_factory.mktemp("baked"), {})
