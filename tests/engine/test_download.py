"""comp download with the real client against a local server: failures, kills and damaged archives."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import forked
from kaggle_server import KEY, Server

from comp.engine import cli
from comp.engine.deliver import kaggle


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    yield from at_kaggle(monkeypatch, tmp_path)


def at_kaggle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    served = Server()
    for name, value in (
        served.environment() | {"HOME": str(tmp_path / "home"), "KAGGLE_CONFIG_DIR": str(tmp_path / "home")}
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KAGGLE_API_TOKEN", raising=False)
    monkeypatch.setattr(kaggle, "RETRY_PAUSES", [0.0, 0.0, 0.0])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    kaggle.client.cache_clear()
    yield served
    kaggle.client.cache_clear()
    served.close()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


CONTENT = {"train.csv": b"id,label\n1,2\n", "test/a/1.png": os.urandom(3000), "train.zip": zipped({"1.png": b"one", "train/../2.png".replace("train/../", ""): b"two"}), "big.csv.zip": zipped({"big.csv": b"x\n1\n"})}  # fmt: skip
UNPACKED = {"train.csv", "test/a/1.png", "train/1.png", "train/2.png", "big.csv"}


def raw(root: Path) -> set[str]:
    return {
        file.relative_to(root / "data/raw").as_posix()
        for file in (root / "data/raw").rglob("*")
        if file.is_file()
    }


def download() -> int:
    return cli.main(["download"])


def test_files_are_downloaded_once(server: Server, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.archive = zipped(CONTENT)
    assert download() == 0
    assert raw(empty) == UNPACKED
    assert (empty / "data/raw/test/a/1.png").read_bytes() == CONTENT["test/a/1.png"]
    assert "next: " in capsys.readouterr().out
    before = server.count("DownloadDataFiles")
    assert download() == 0
    assert "never changed" in capsys.readouterr().out
    assert server.count("DownloadDataFiles") == before


@pytest.mark.parametrize(
    ("failure", "word"),
    [
        (401, "credentials"),
        (403, "practice/rules"),
        (404, "no competition 'practice'"),
        (429, "too many requests"),
        (500, "server error"),
        ("drop", "no answer"),
    ],
)
def test_every_error_is_one_line(
    server: Server, empty: Path, capsys: pytest.CaptureFixture[str], failure: object, word: str
) -> None:
    server.archive = zipped(CONTENT)
    server.fail["DownloadDataFiles"] = [failure] * 9
    assert download() == 2
    printed = capsys.readouterr().err.strip()
    assert word in printed and len(printed.splitlines()) == 1 and KEY not in printed
    assert not (empty / "data/raw").exists()
    server.fail.clear()
    assert download() == 0 and raw(empty) == UNPACKED


@pytest.mark.parametrize("failure", [403, 404, 500, "drop", "short"])
def test_errors_of_the_storage_server(
    server: Server, empty: Path, capsys: pytest.CaptureFixture[str], failure: object
) -> None:
    """Kaggle accepts and returns a storage address; that fails, or sends fewer bytes than announced."""
    server.archive = zipped(CONTENT | {"large.bin": os.urandom(3 << 20)})
    if failure == "short":
        server.cut = [2 << 20] + [0] * 40
    else:
        server.fail["storage"] = [failure] * 40
    assert download() == 2
    printed = capsys.readouterr().err.strip()
    assert len(printed.splitlines()) == 1 and KEY not in printed and "Traceback" not in printed
    assert failure not in (403, 404) or ("storage" in printed and "rules" not in printed)
    assert not (empty / "data/raw").exists()
    server.fail.clear()
    server.cut.clear()
    assert download() == 0 and raw(empty) == UNPACKED | {"large.bin"}


def test_no_credentials(
    server: Server, empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    assert download() == 2
    out = capsys.readouterr()
    assert "no Kaggle credentials" in out.err and "KAGGLE_API_TOKEN" in out.err and "settings" in out.err
    assert len((out.err + out.out).strip().splitlines()) == 1


def test_an_access_token_is_accepted(server: Server, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_API_TOKEN", KEY)
    server.archive = zipped(CONTENT)
    assert download() == 0


def test_a_broken_connection_is_resumed(server: Server, empty: Path) -> None:
    server.archive = zipped(CONTENT | {"large.bin": os.urandom(3 << 20)})
    server.cut = [2 << 20]
    assert download() == 0
    assert server.ranges == [f"bytes={2 << 20}-"] and raw(empty) == UNPACKED | {"large.bin"}


def test_a_killed_download_is_resumed(server: Server, empty: Path) -> None:
    server.archive = zipped(CONTENT | {"large.bin": os.urandom(3 << 20)})
    server.cut = [2 << 20]

    def work() -> None:  # the client pauses before it asks for the rest
        time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGKILL)
        download()

    assert os.WIFSIGNALED(forked(work)) and not server.ranges
    assert download() == 0
    assert server.ranges == [f"bytes={2 << 20}-"] and raw(empty) == UNPACKED | {"large.bin"}


def test_sigterm_is_one_line_and_the_download_is_resumed(
    server: Server, empty: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.archive = zipped(CONTENT | {"large.bin": os.urandom(3 << 20)})
    server.cut = [2 << 20]

    def work() -> None:
        time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGTERM)
        os._exit(download())

    assert os.waitstatus_to_exitcode(forked(work)) == 143 and not server.ranges
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("stopped by SIGTERM: ")]
    assert not list(empty.rglob("*.part")) and not list(empty.rglob(".lock"))
    assert download() == 0
    assert server.ranges == [f"bytes={2 << 20}-"] and raw(empty) == UNPACKED | {"large.bin"}


def test_a_full_disk_is_a_one_line_error(
    server: Server, empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kaggle.api.kaggle_api_extended import KaggleApi

    server.archive = zipped(CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
        assert download() == 2
        assert "downloading practice will write" in capsys.readouterr().err
        assert not list((empty / "data/.download").glob("*.zip*"))
    with monkeypatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(KaggleApi, "download_file", full)
        assert download() == 2
        printed = capsys.readouterr().err.strip()
        assert "No space left" in printed and len(printed.splitlines()) == 1
    assert download() == 0


def test_a_damaged_archive_is_downloaded_again(
    server: Server, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.archive = zipped(CONTENT)
    bent = bytearray(server.archive)
    bent[200] ^= 255
    server.archives = [bytes(bent)]
    assert download() == 0
    assert "once more" in capsys.readouterr().out and raw(empty) == UNPACKED
    (empty / "data/raw").rename(empty / "old")
    server.archives = [bytes(bent), bytes(bent)]
    assert download() == 2
    assert "after two downloads" in capsys.readouterr().err and not (empty / "data/raw").exists()


def test_a_size_over_the_ceiling_needs_confirmation(
    server: Server, empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from comp.engine.deliver import download as module

    server.archive = zipped(CONTENT)
    monkeypatch.setattr(module, "MAX_GB", 1e-6)
    assert download() == 2
    assert "--ceiling 1" in capsys.readouterr().err and not (empty / "data/raw").exists()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []
    answers = ["", "n", "y"]

    def question(text: str) -> str:
        asked.append(text)
        return answers.pop(0)

    monkeypatch.setattr("builtins.input", question)
    assert [download(), download(), download()] == [2, 2, 0]
    assert len(asked) == 3 and "unpacked it has 3.3 KB; continue?" in asked[0], asked
    assert raw(empty) == UNPACKED
    (empty / "data/raw").rename(empty / "old")
    assert cli.main(["download", "--ceiling", "1"]) == 0


@pytest.mark.parametrize("event", range(1, 5))
def test_killed_and_run_again(server: Server, empty: Path, event: int) -> None:
    server.archive = zipped(CONTENT)
    status = forked(killed(event, download))
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert download() == 0 and raw(empty) == UNPACKED
    assert server.count("DownloadDataFiles") <= 2


def killed(event: int, work: Callable[[], object]) -> Callable[[], None]:
    """Kill this process: 1 at the first bytes, 2 with the complete archive, 3 while unpacking, 4 before the
    rename."""
    from comp.engine.readers import unpack

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        from kaggle.api.kaggle_api_extended import KaggleApi

        if event == 1:
            KaggleApi._clear_resume_marker = die
        elif event == 2:
            unpack.unpack = die  # type: ignore[assignment]
        elif event == 3:
            original, count = unpack._write, [0]

            def third(*given: object) -> None:
                count[0] += 1
                original(*given) if count[0] < 3 else die()  # type: ignore[arg-type]

            unpack._write = third  # type: ignore[assignment]
        else:
            os.replace = die
        work()

    return run
