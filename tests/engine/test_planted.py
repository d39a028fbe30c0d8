"""25 planted credentials, then everything from training to a pushed notebook: none is in a file that was
written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kaggle_server import USER, Server
from test_download import at_kaggle

from comp.engine import cli
from comp.engine.store import paths

HERE = Path(__file__).resolve().parents[2] / "{{cookiecutter.project_slug}}"
PLANTED = [f"planted-{i:02d}-0123456789" for i in range(25)]
# Where each one stands. The server takes any key, so the client really works with the planted ones.
VARIABLES = dict(
    zip(
        ("KAGGLE_KEY", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "GITHUB_TOKEN", "OPENAI_API_KEY",
         "SLACK_TOKEN", "MY_SECRET", "NEPTUNE_API_TOKEN", "COMET_API_KEY"), PLANTED, strict=False,
    )
)  # fmt: skip
ARGV, CONFIG, FILES, STDOUT, CODE, ANSWERS = PLANTED[11:15], PLANTED[15:18], PLANTED[18:20], PLANTED[20:21], PLANTED[21:23], PLANTED[23:25]  # fmt: skip
TRAIN = """
import sys
from comp import train
from comp.engine import cli, hardware
hardware.set_threads(1)
evaluate = train.evaluate
def loud(*given):
    print({printed!r}, flush=True)
    return evaluate(*given)
train.evaluate = loud
sys.exit(cli.main(["train", "exp001", "--as", "tiny", "train.epochs=1", "schedule.warmup=0"]))
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    yield from at_kaggle(monkeypatch, tmp_path)


def hits(folder: Path, apart: set[Path]) -> list[str]:
    return [
        f"{file.relative_to(folder)}: {key}"
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file not in apart
        for data in [file.read_bytes()]
        for key in PLANTED
        if key.encode() in data
    ]


@pytest.mark.slow
def test_no_planted_key_is_in_anything_written(
    server: Server,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["git", "-C", str(project), *arguments], capture_output=True, check=False)

    declared = project / "configs" / "competition.yaml"
    declared.write_text(declared.read_text().replace("k: 5", "k: 2"))
    assert cli.main(["folds", "--remake"]) == 0
    for name, key in VARIABLES.items():
        monkeypatch.setenv(name, key)
    shutil.copy(HERE / ".gitignore", project)
    shutil.copy(HERE / ".pre-commit-config.yaml", project)
    git("init", "-q")
    mine = {  # what a careless person has lying about, in the project's folder itself
        project / "kaggle.json": json.dumps({"username": USER, "key": FILES[0]}),
        project / ".netrc": f"machine api.wandb.ai login user password {FILES[1]}\n",
        project / "notes.py": f'api_key = "{CODE[0]}"\n',
        project / "go.sh": f"export SERVICE_TOKEN={CODE[1]}\n",
    }
    for file, text in mine.items():
        file.write_text(text)

    for key, arguments in zip(ARGV, (["--api-key", ARGV[0]], [f"--token={ARGV[1]}"], [f"track.token={ARGV[2]}"], ["--password", ARGV[3]]), strict=True):  # fmt: skip
        assert cli.main(["train", "exp001", *arguments]) == 2, key
    for i, key in enumerate(CONFIG):
        file = project / "configs" / "exp009.yaml"
        file.write_text(
            f"base: exp001\n{('track: {api_key: ', 'model: {token: ', 'optim: {secret: ')[i]}'{key}'}}\n"
        )
        assert cli.main(["train", "exp009"]) == 2, key
        file.unlink()

    done = subprocess.run(
        [sys.executable, "-c", TRAIN.format(printed=" ".join([*STDOUT, VARIABLES["WANDB_API_KEY"]]))],
        cwd=project, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    diff = next((project / "runs").rglob("code.diff")).read_text()
    assert "notes.py" in diff and "go.sh" in diff and "(removed)" in diff
    assert list((project / "wandb").glob("offline-run-*/*.wandb")), "W&B really wrote"

    server.fail["ListSubmissions"] = [403]
    server.messages = {403: f"no {ANSWERS[0]} {VARIABLES['KAGGLE_KEY']}"}
    monkeypatch.setenv("ANSWERED_TOKEN", ANSWERS[0])
    assert cli.main(["submit", "tiny", "-m", "first"]) == 2
    assert cli.main(["submit", "tiny", "-m", "first"]) == 0
    server.kernel_runs, server.kernel_log = ["ERROR"], f"it was {ANSWERS[1]} {VARIABLES['KAGGLE_KEY']}"
    monkeypatch.setenv("LOGGED_TOKEN", ANSWERS[1])
    push = ["kernel", "tiny", "--push", "-m", "second", "--anyway", "to look"]
    assert cli.main(push) == 2
    server.kernel_runs = ["COMPLETE"]
    assert cli.main(push) == 0 and cli.main(["ledger"]) == 0
    assert len(server.submissions) == 2 and paths.path("submissions", "ledger.jsonl").exists()

    printed = capfd.readouterr()
    shown = [key for key in PLANTED if key in printed.out + printed.err]
    assert not shown, "on the terminal"
    (project / "notes.py").unlink()
    (project / "go.sh").unlink()
    git("add", "-A")
    index = git("ls-files").stdout + git("cat-file", "--batch-all-objects", "--batch", "--unordered").stdout
    assert b"configs/base.yaml" in index and not [key for key in PLANTED if key.encode() in index]
    assert not hits(project, set(mine))
    sent = [str(server.calls).encode(), *server.uploads.values()]
    assert not [key for key in PLANTED for data in sent if key.encode() in data], "nor sent"
    git("add", "-f", "kaggle.json")
    (project / ".venv").symlink_to(sys.prefix)
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "pre-commit"))
    subprocess.run(
        [sys.executable, "-m", "pre_commit", "install"], cwd=project, capture_output=True, check=True
    )
    refused = git("-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "all of it")
    refusal = refused.stdout + refused.stderr
    assert refused.returncode and b"kaggle.json: a file of this name holds keys" in refusal
    assert FILES[0].encode() not in refusal
