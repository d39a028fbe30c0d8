"""log.jsonl is the record; W&B gets the same lines, and no failure of W&B affects the run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tracked_run
import wandb_reader
from PIL import Image
from wandb_server import Server

from comp.engine.config.schema import Track as Settings
from comp.engine.run import tracking
from comp.engine.store import artifacts, paths
from comp.engine.store.secrets import REDACTED

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1] / "{{cookiecutter.project_slug}}"
# Put together here, so that the repository holds nothing that looks like a key.
KEY = hashlib.sha1(b"planted").hexdigest()
SERVICE, LITERAL = "hunter2" + "secret", "literal-" + "secret-4711"
SECRETS = (
    KEY,
    tracked_run.CONFIG_KEY,
    tracked_run.NOTE_KEY,
    "argument-secret-4711",
    LITERAL,
    SERVICE,
)
PATIENT = 120  # seconds after which a run that should have ended counts as hung


@dataclass
class Project:
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "runs" / "exp001" / "seed0" / "fold1"

    def run(self, mode: str, *words: str, url: str = "", key: str = KEY) -> subprocess.CompletedProcess[str]:
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith("WANDB") and "_proxy" not in k.lower()
        }
        home = self.root.parent / "home"
        home.mkdir(exist_ok=True)
        more = {
            "COMP_ROOT": str(self.root),
            "HOME": str(home),
            "PYTHONPATH": str(PROJECT),
            "SERVICE_PASSWORD": SERVICE,
        }
        more["MPLCONFIGDIR"] = str(
            self.root.parent.parent / "matplotlib"
        )  # its font cache takes seconds to make
        more |= {"WANDB_BASE_URL": url} if url else {}
        more |= {"WANDB_API_KEY": key} if key else {}
        return subprocess.run(
            [sys.executable, str(HERE / "tracked_run.py"), mode, *words],
            check=False, cwd=self.root, env=kept | more, capture_output=True, text=True, timeout=PATIENT,
        )  # fmt: skip

    def lines(self) -> list[dict[str, object]]:
        """The log without what differs between any two runs."""
        return [
            {k: v for k, v in line.items() if k not in ("clock", "sha256")}
            for line in tracking.read(self.folder / "log.jsonl")
        ]

    def parts(self, kind: str = "offline-run") -> list[wandb_reader.Part]:
        return [wandb_reader.read(part) for part in sorted((self.root / "wandb").glob(f"{kind}-*"))]


def new_project(folder: Path) -> Project:
    """A repository with a commit, a change since, and a new file; a secret in each."""
    root = folder / "project"
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "base.yaml").write_text("{}\n")
    (root / "train.sh").write_text("before\n")
    (root / ".gitignore").write_text("wandb\nruns\n")
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "begin"], check=True)
    (root / "train.sh").write_text(f"after\nexport KAGGLE_KEY={LITERAL}\n")
    (root / "configs" / "exp009.yaml").write_text(f"base: exp001\npassword: '{LITERAL}'\nnote: {SERVICE}\n")
    return Project(root)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Never killed, no W&B: every other run must have the same log."""
    project = new_project(tmp_path_factory.mktemp("plain"))
    done = project.run("none")
    assert done.returncode == 0, done.stderr
    return project


@pytest.fixture(scope="session")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Killed between two checkpoints in the middle of a line, and run again."""
    project = new_project(tmp_path_factory.mktemp("resumed"))
    killed = project.run("offline", "torn", "--token=argument-secret-4711")
    assert killed.returncode == -9, killed.stderr
    assert (project.folder / "log.jsonl").read_bytes().endswith(b'"lo')
    done = project.run("offline", "--token=argument-secret-4711")
    assert done.returncode == 0, done.stderr
    assert "W&B" not in done.stderr
    return project


@pytest.fixture
def server() -> Iterator[Callable[[str], Server]]:
    started: list[Server] = []

    def start(habit: str) -> Server:
        started.append(Server(habit))
        return started[-1]

    yield start
    for one in started:
        one.close()


# --- the record -----------------------------------------------------------------------------------


def test_a_resumed_log_equals_one_that_was_never_killed(plain: Project, resumed: Project) -> None:
    assert differing(resumed.lines(), plain.lines()) == []
    assert [line["step"] for line in plain.lines() if "loss" in line] == list(range(1, 41))
    assert tracking.finished(plain.folder)


def differing(a: list[dict[str, object]], b: list[dict[str, object]]) -> list[tuple[object, object]]:
    """nan is not equal to itself, so the text is compared."""
    return [(x, y) for x, y in zip(map(repr, a), map(repr, b), strict=True) if x != y]


def test_every_line_is_valid_json_and_numbers_come_back(plain: Project) -> None:
    for line in (plain.folder / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    raw = [json.loads(line) for line in (plain.folder / "log.jsonl").read_text().splitlines()]
    (marked,) = [line for line in raw if "nonfinite" in line and line.get("step")]
    assert marked["loss"] is None and marked["nonfinite"] == {"loss": "nan"}
    back = {line.get("step"): line for line in tracking.read(plain.folder / "log.jsonl") if "loss" in line}
    assert math.isnan(back[7]["loss"]) and back[8]["lr"] == 0.5
    (summary,) = [
        line for line in tracking.read(plain.folder / "log.jsonl") if line.get("event") == "summary"
    ]
    assert summary["values"]["broken"] == math.inf


def test_mode_none_starts_no_wandb(plain: Project) -> None:
    assert not (plain.root / "wandb").exists()
    code = (
        "import sys; from comp.engine.report import plots; from comp.engine.run import tracking; "
        "sys.exit(str({'wandb', 'torch', 'pandas', 'matplotlib'} & set(sys.modules)).replace('set()', '') "
        "or 0)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, cwd=PROJECT, timeout=PATIENT).returncode
        == 0
    )


# --- W&B, offline ---------------------------------------------------------------------------------


def test_after_a_kill_there_is_one_offline_history_without_repeated_steps(resumed: Project) -> None:
    (part,) = resumed.parts()
    assert part.column("step") == list(range(1, 41))
    logged = [line for line in resumed.lines() if "loss" in line]
    assert part.column("lr") == [line["lr"] for line in logged]
    # nan is not equal to itself
    assert list(map(repr, part.column("loss"))) == [repr(line["loss"]) for line in logged]
    assert part.column("epoch") == [1, 2, 3, 4]
    assert part.column("_step") == sorted(set(part.column("_step")))
    assert part.exit_code == 0
    # The offline run of the killed process was moved to the trash.
    (old,) = (resumed.root / "runs" / ".trash").glob("offline-run-*")
    assert "-exp001-seed0-fold1-" in old.name


def test_the_offline_run_has_images_tables_summary_and_files(resumed: Project) -> None:
    (part,) = resumed.parts()
    assert (part.run.run_id, part.run.run_group, part.run.job_type) == (
        "exp001-seed0-fold1",
        "exp001",
        "fold",
    )
    assert (part.run.display_name, part.run.project) == ("exp001/seed0/fold1", "practice")
    assert part.config["optim"] == {"lr": 1e-3}
    # code version and difference
    commit = subprocess.run(
        ["git", "-C", str(resumed.root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert part.config["code"]["commit"] == part.run.git.commit == commit and part.config["code"]["changed"]
    assert "code.diff" in part.files
    difference = (part.folder / "files" / "code.diff").read_text()
    assert "-before\n+after\n" in difference and "+base: exp001\n" in difference
    # hardware
    assert part.config["hardware"]["cores"] >= 1 and part.machine["cpu_count"] >= 1
    # numbers, each over its own axis
    assert (part.axes["loss"], part.axes["lr"], part.axes["valid_loss"]) == ("step", "step", "epoch")
    assert len(part.column("valid_loss")) == 4
    assert part.summary["score"] == 0.75
    # pictures and tables
    assert Image.open(part.media("augment")).size == Image.open(resumed.folder / "sheet.png").size
    assert Image.open(part.media("confusion")).size == Image.open(resumed.folder / "confusion.png").size
    assert part.column("folds")[0]["nrows"] == 2 and table_of(part, "folds")["data"][0] == [0, 50, 0.1]
    worst = table_of(part, "worst")
    assert worst["columns"] == ["id", "true", "predicted", "error", "position", "image"]
    assert worst["data"][0][:3] == ["00d", "bee", "cat (1.000)"] and worst["data"][0][5]["width"] == 192


def table_of(part: wandb_reader.Part, name: str) -> dict[str, Any]:
    """A table goes as an artifact of its own, with its pictures in it."""
    contents = part.artifacts[f"run-{part.run.run_id}-{name}"].manifest.contents
    files = {entry.path: Path(entry.local_path) for entry in contents}
    content: dict[str, Any] = json.loads(files[f"{name}.table.json"].read_text())
    if "image" in content["columns"]:
        images = [path for path in files if path.endswith(".png")]
        assert len(images) == len(content["data"]) and all(
            Image.open(files[path]).format == "PNG" for path in images
        )
    return content


def test_predictions_and_weights_are_references_without_a_copy(resumed: Project) -> None:
    (part,) = resumed.parts()
    for name, type_, file in (("oof", "oof", "oof.arrow"), ("weights", "model", "weights.safetensors")):
        artifact = part.artifacts[f"exp001-seed0-fold1-{name}"]
        (entry,) = artifact.manifest.contents
        assert artifact.type == type_
        assert (
            Path(entry.local_path) == resumed.folder / file
            and entry.size == (resumed.folder / file).stat().st_size
        )
    sizes = {
        file.stat().st_size
        for file in (resumed.root / "wandb").rglob("*")
        if file.is_file() and not file.is_symlink()
    }
    assert not sizes & {
        (resumed.folder / file).stat().st_size for file in ("oof.arrow", "weights.safetensors")
    }  # no copy


def test_no_secret_is_written_and_nothing_outside_the_project(resumed: Project) -> None:
    files = [
        file for file in (*resumed.root.glob("wandb/**/*"), *resumed.root.glob("runs/**/*")) if file.is_file()
    ]
    assert len(files) > 20
    for file in files:
        for secret in SECRETS:
            assert secret.encode() not in file.read_bytes(), f"{secret} in {file}"
    (part,) = resumed.parts()
    assert part.config["api_key"] == REDACTED
    assert "--token=" + REDACTED in part.config["command"]
    assert list((resumed.root.parent / "home").rglob("*")) == []


# --- W&B, in trouble ------------------------------------------------------------------------------


def falls_back(project: Project, plain: Project, done: subprocess.CompletedProcess[str]) -> None:
    """The same result and record, one line about it, and the whole history offline."""
    same_result(project, plain, done)
    (line,) = [line for line in done.stderr.splitlines() if "W&B" in line]
    assert "online failed" in line and "offline" in line
    (part,) = project.parts()
    assert part.column("step") == list(range(1, 41)) and part.column("epoch") == [1, 2, 3, 4]


def same_result(project: Project, plain: Project, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert (project.folder / "result.txt").read_text() == (plain.folder / "result.txt").read_text()
    numbers, wanted = ([line for line in one.lines() if "event" not in line] for one in (project, plain))
    assert differing(numbers, wanted) == []


def test_a_wrong_key_changes_nothing(tmp_path: Path, plain: Project, server: Callable[[str], Server]) -> None:
    project = new_project(tmp_path)
    falls_back(project, plain, project.run("online", "numbers", url=server("refuses").url))


def test_a_server_that_never_responds_changes_nothing(
    tmp_path: Path, plain: Project, server: Callable[[str], Server]
) -> None:
    project = new_project(tmp_path)
    falls_back(project, plain, project.run("online", "numbers", "hasty", url=server("silent").url))


@pytest.mark.slow
def test_no_key_changes_nothing(tmp_path: Path, plain: Project, server: Callable[[str], Server]) -> None:
    project = new_project(tmp_path)
    falls_back(project, plain, project.run("online", "numbers", url=server("works").url, key=""))


@pytest.mark.slow
def test_a_server_that_dies_in_the_run_changes_nothing(
    tmp_path: Path, plain: Project, server: Callable[[str], Server]
) -> None:
    project = new_project(tmp_path)
    done = project.run("online", "numbers", url=server("dies").url)
    same_result(project, plain, done)
    assert "wandb sync wandb/run-" in done.stderr
    (part,) = project.parts("run")  # what was not sent is on disk
    assert part.column("step") == list(range(1, 41))


@pytest.mark.slow
def test_a_server_gets_every_line_once_across_a_kill(tmp_path: Path, server: Callable[[str], Server]) -> None:
    project, one = new_project(tmp_path), server("works")
    assert project.run("online", "kill", "numbers", url=one.url).returncode == -9
    done = project.run("online", "numbers", url=one.url)
    assert done.returncode == 0 and "W&B" not in done.stderr, done.stderr
    rows = [one.history[number] for number in sorted(one.history)]
    assert [row["step"] for row in rows if "step" in row] == list(range(1, 41))
    assert one.repeated == []
    assert not any(secret.encode() in one.received for secret in SECRETS)


@pytest.mark.slow
def test_a_killed_wandb_process_is_replaced_and_sends_everything_again(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(mode="offline", project=None, entity=None, log_model=False)
    run = tracking.open_log(
        empty / "run", run_id="r", name="r", group="r", job_type="fold", config={}, settings=settings
    )
    assert isinstance(run._wandb, tracking.WandbProcess) and run._wandb._process is not None
    run.log({"step": 1, "loss": 0.5})
    run._wandb._process.kill()
    run._wandb._process.wait()
    run._wandb.report()
    run.log({"step": 2, "loss": 0.25})
    run.finish()
    assert "sent again offline" in capsys.readouterr().err
    (part,) = Project(empty).parts()
    assert part.column("loss") == [0.5, 0.25]


def test_the_time_to_wait_for_a_server_is_limited(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All runs of a process share the limit, so that ten folds do not wait ten times for a dead server."""
    monkeypatch.setattr(tracking, "WAIT_ONLINE", 0.01)
    monkeypatch.setattr(tracking.WandbProcess, "_waited", 0.0)
    feed = tracking.WandbProcess({"mode": "online", "run": {"id": "r"}})
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as endless:
        feed._process = endless
        feed.wait()
        assert endless.poll() is None
        assert "continues in the background" in capsys.readouterr().err and tracking.WandbProcess._waited > 0
        asked: list[float] = []
        monkeypatch.setattr(endless, "wait", asked.append)
        feed.wait()
        assert asked == [0.0], "the folds that follow wait no more"
        monkeypatch.undo()
        endless.kill()


def test_after_one_dead_server_later_runs_are_offline(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking.WandbProcess, "_online_failed", False)
    feed = tracking.WandbProcess({"mode": "online", "run": {"id": "r"}})
    artifacts.write_json(feed._state, {"mode": "offline", "note": "online failed"})
    feed.report()
    feed.report()
    assert capsys.readouterr().err == "W&B: online failed\n"
    tracking.WandbProcess({"mode": "online", "run": {"id": "s"}})
    assert artifacts.read_json(paths.path("wandb", "feed", "s", "job.json"))["mode"] == "offline"
