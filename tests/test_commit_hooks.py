"""The checks before each commit of a generated project: as `make setup` enables them, without a network."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import link_environment

from bake import bake

# Put together here, so that the repository holds nothing that looks like a key.
KEY = "KGAT_" + "0123456789" + "abcdefghijXYZ"
OUTPUT = {"output_type": "stream", "name": "stdout", "text": ["0.97\n"]}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """No settings of git, an empty cache, no activated environment, a proxy that does not answer."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    git = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "x"), ("EMAIL", "x@y"))
    }
    return kept | proxies | git | {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin"}


def run(folder: Path, environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def repository(template, tmp_path_factory, environment) -> Path:
    made = link_environment(bake(template, tmp_path_factory.mktemp("hooks"), {}))
    done = run(made, environment, "make", "setup")
    assert done.returncode == 0, done.stdout
    assert (made / ".git" / "hooks" / "pre-commit").exists()
    return made


@pytest.fixture
def git(repository, environment):
    """git in a repository whose first commit has every file of the project, and nothing changed since."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run(repository, environment, "git", *arguments)

    if call("rev-parse", "--verify", "HEAD").returncode:
        call("add", "-A")
        done = call("commit", "-m", "From the template")
        assert done.returncode == 0, done.stdout
        for hook in ("syntax errors", "outputs in notebooks", "API keys"):
            assert hook in done.stdout
        assert "Skipped" not in done.stdout, "a hook found no file to check"
    yield call
    call("reset", "--hard", "-q", "HEAD")
    call("clean", "-fdq")


def commit(git, *arguments: str) -> tuple[bool, str]:
    """Whether there is a new commit, and what was printed."""
    before = git("rev-parse", "HEAD").stdout
    done = git("commit", "-m", "a change", *arguments)
    assert (done.returncode == 0) == (git("rev-parse", "HEAD").stdout != before)
    return done.returncode == 0, done.stdout


def edit(repository: Path, name: str, text: str) -> int:
    """Appends lines; the number of the last one."""
    file = repository / name
    lines = (file.read_text("utf-8") if file.exists() else "") + text
    file.write_text(lines, "utf-8")
    return lines.count("\n")


def test_a_clean_commit_of_hasty_code_goes_through(repository, git):
    edit(repository, "comp/losses.py", "\ndef my_loss( output,target ) :\n  return ( output-target )**2\n")
    edit(repository, "configs/exp003.yaml", "base: exp001\noptim: {lr: 1e-3}\n")
    git("add", "-A")
    passed, printed = commit(git)
    assert passed, printed


@pytest.mark.parametrize("way", ["add", "-a", "by name"])
def test_a_key_is_refused_with_file_and_line_and_is_not_printed(repository, git, way):
    """Below an undefined name in the same line, which another hook reports."""
    last = edit(repository, "comp/competition.py", f'\n\ntoken = offzet("{KEY}")\n')
    if way == "add":
        git("add", "comp/competition.py")
    passed, printed = commit(git, *{"add": [], "-a": ["-a"], "by name": ["comp/competition.py"]}[way])
    assert not passed
    assert f"comp/competition.py:{last}: looks like a key" in printed
    assert f"comp/competition.py:{last}:9: F821" in printed
    assert KEY[5:] not in printed


def test_a_file_that_holds_keys_is_refused(repository, git):
    (repository / "kaggle.json").write_text(json.dumps({"username": "me", "key": KEY}))
    git("add", "-f", "kaggle.json")
    passed, printed = commit(git)
    assert not passed
    assert "kaggle.json: a file of this name holds keys" in printed
    assert KEY not in printed


def test_outputs_of_a_notebook_are_removed(repository, git):
    """The first commit is refused, since the file has changed; the second one takes what is left."""
    file = repository / "notebooks" / "explore.ipynb"
    before = file.read_text("utf-8")
    book = json.loads(before)
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(cells, 1):
        cell["outputs"], cell["execution_count"] = [OUTPUT], count
    file.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", "utf-8")
    git("add", "-A")
    passed, printed = commit(git)
    assert not passed
    assert "files were modified by this hook" in printed
    assert json.loads(file.read_text("utf-8")) == json.loads(before)
    edit(repository, "configs/exp004.yaml", "base: exp001\n")
    git("add", "-A")
    passed, printed = commit(git)
    assert passed, printed
    assert OUTPUT["text"][0].strip() not in git("show", "HEAD:notebooks/explore.ipynb").stdout


def test_an_undefined_name_in_a_page_is_refused(repository, git):
    last = edit(repository, "comp/losses.py", "\n\ndef shifted(x):\n    return x + offzet\n")
    passed, printed = commit(git, "-a")
    assert not passed
    assert f"comp/losses.py:{last}:16: F821" in printed


def test_the_engine_is_left_out_when_it_is_named(repository, git):
    edit(repository, "comp/engine/cli.py", "\n\nimport colorsys\n")
    passed, printed = commit(git, "-a")
    assert passed, printed


def test_hooks_are_local_and_use_the_projects_environment(repository):
    hooks = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert [part["repo"] for part in hooks] == ["local"]
    assert [hook["id"] for hook in hooks[0]["hooks"]] == ["ruff", "nbstripout", "keys"]
    for hook in hooks[0]["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")
    assert not (repository / ".githooks").exists()
    assert "hooksPath" not in (repository / "Makefile").read_text()


def test_setup_without_a_repository_or_with_hooks_elsewhere_does_not_fail(template, tmp_path, environment):
    made = link_environment(bake(template, tmp_path, {}))
    run(made, environment, "git", "config", "core.hooksPath", "elsewhere")
    done = run(made, environment, "make", "setup")
    assert done.returncode == 0, done.stdout
    assert "core.hooksPath" in done.stdout
    assert not (made / "elsewhere").exists()
    shutil.rmtree(made / ".git")
    run(tmp_path, environment, "git", "init", "-q")  # a repository around it is not the project's
    done = run(made, environment, "make", "setup")
    assert done.returncode == 0, done.stdout
    assert not (tmp_path / ".git" / "hooks" / "pre-commit").exists()
