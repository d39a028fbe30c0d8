"""Planted keys: refused before anything is written, found in nothing that is, and kept out of commits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from comp import cli, provenance, secret
from comp.deliver import ledger

KEYS = [
    "wandb_v1_0123456789abcdefghijXYZ", "KGAT_0123456789abcdef0123", "hf_0123456789abcdefghij", "ghp_0123456789abcdefghij",
    "github_pat_0123456789abcdefghij", "sk-0123456789abcdefghij", "AKIA0123456789ABCDEF", "xoxb-0123456789ab",
    "0123456789abcdef0123456789abcdef", "0123456789abcdef0123456789abcdef01234567", "https://me:0123456789pass@host.example/x",
    "https://0123456789abcdefghij@host.example/x", "postgresql://me:0123456789@host.example/base",
]  # fmt: skip
ARGUMENTS = [[key] for key in KEYS] + [
    ["--api-key", "0123456789x"],
    ["--token=0123456789x"],
    ["track.token=0123456789x"],
    ["-m", "PLANTED"],
]


def everything(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda given: given[-1][:12])
def test_a_key_in_the_arguments(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "planted-0123456789")
    arguments = [each.replace("PLANTED", "planted-0123456789") for each in arguments]
    before = everything(empty)
    assert cli.main(["train", "exp001", *arguments]) == 2
    out = capsys.readouterr()
    assert "looks like a key" in out.err and "0123456789" not in out.err + out.out
    assert everything(empty) == before


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key[:12])
def test_a_key_in_a_config(empty: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    (empty / "configs" / "exp009.yaml").write_text(f"base: exp001\ntrack: {{project: '{key}'}}\n")
    before = everything(empty)
    assert cli.main(["train", "exp009"]) == 2
    out = capsys.readouterr()
    assert (
        "configs/exp009.yaml:2: track.project: looks like a key" in out.err
        and "0123456789" not in out.err + out.out
    )
    assert everything(empty) == before


def test_what_is_no_key_passes() -> None:
    for text in (
        "optim.rate=3e-4",
        "data.size=224",
        "exp001",
        "larger images",
        "model.name=convnext_tiny.fb_in22k",
        "9h",
        "score>0.9",
        "postgresql://comp@/postgres?host=/nowhere",
    ):
        secret.refuse([text])


def test_keys_of_the_environment_are_in_nothing_that_is_written(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, name in enumerate(
        ("KAGGLE_KEY", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD")
    ):
        monkeypatch.setenv(name, f"planted-{i}-0123456789")
    ledger.intend(
        "file",
        competition="practice",
        name="a",
        message="see planted-0-0123456789",
        members=["planted-1-0123456789"],
    )
    assert b"planted-" not in ledger.file().read_bytes()
    assert "planted-" not in str(
        provenance.without_secrets({"a": ["planted-2-0123456789", {"b": "planted-3-0123456789"}]})
    )


def test_no_key_gets_into_a_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(tmp_path), *arguments], capture_output=True, text=True, check=False
        )

    def look() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "comp.secret"], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    git("init", "-q")
    digits = "987654321098765432"
    planted = {
        "kaggle.json": "{}", ".netrc": "x", "sub/.env": "A=1", "deep/access_token": "x", "a.py": f'api_key = "abc{digits}"\n', "b.sh": f"export WANDB_API_KEY=abc{digits}\n",
        "c.ipynb": f'{{"outputs": ["KGAT_abc{digits}"]}}', "d.yaml": f"url: https://me:{digits}@host.example\n", "e.txt": f"machine x login y password {digits}\n",
    }  # fmt: skip
    for name, text in planted.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        git("add", "-f", name)
        done = look()
        assert done.returncode == 1 and name in done.stderr and digits not in done.stderr + done.stdout, name
        git("rm", "-q", "--cached", name)
    (tmp_path / "fine.py").write_text("token = read()\nkey = 'a'\n")
    git("add", "fine.py")
    assert look().returncode == 0


def test_the_hook_is_there_and_runs(tmp_path: Path) -> None:
    here = Path(secret.__file__).resolve().parents[1]
    hook = here / ".githooks" / "pre-commit"
    assert os.access(hook, os.X_OK)
    assert "core.hooksPath .githooks" in (here / "Makefile").read_text()
    shutil.copy(hook, tmp_path / "hook")
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    (tmp_path / "kaggle.json").write_text("{}")
    subprocess.run(["git", "-C", str(tmp_path), "add", "-f", "kaggle.json"], check=True)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    done = subprocess.run(
        [str(tmp_path / "hook")], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "kaggle.json" in done.stderr
