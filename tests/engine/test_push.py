"""comp kernel --push: from the bundle to the score with the real client, whatever fails or is killed in
between."""

from __future__ import annotations

import io
import json
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from forked import forked
from kaggle_server import KEY, USER, Server
from test_download import at_kaggle

from comp.engine import cli
from comp.engine.deliver import kaggle, kaggle_datasets, kernel, ledger, push


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    yield from at_kaggle(monkeypatch, tmp_path)


def pushes(name: str = "exp001") -> int:
    return cli.main(["kernel", name, "--push", "-m", "first"])


def test_from_push_to_score(server: Server, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.scores = [0.9]
    assert pushes() == 0
    slug = f"{USER}/comp-practice-exp001"
    (files,) = server.datasets[slug]["files"]
    names = [
        name for data in files if data[:2] == b"PK" for name in zipfile.ZipFile(io.BytesIO(data)).namelist()
    ]
    assert any(name.endswith("weights.safetensors") for name in names) and any(
        name.endswith("kernel_predict.py") for name in names
    )
    (version,) = server.kernels[slug]["versions"]
    assert (
        version["enableInternet"] is False
        and version["datasetDataSources"] == [slug]
        and version["competitionDataSources"] == ["practice"]
    )
    (sent,) = server.submissions
    assert (sent["kernel"], sent["version"]) == (slug, 1)
    entry = ledger.submissions("practice")[0]
    assert entry["public"] == 0.9 and entry["kind"] == "kernel" and entry["version"] == 1
    assert "public 0.9" in capsys.readouterr().out and KEY not in ledger.file().read_text()
    assert pushes() == 0 and len(server.submissions) == 1, "typed again it tells"
    assert len(server.kernels[slug]["versions"]) == 1 and len(server.datasets[slug]["notes"]) == 1


WORDS = {401: "credentials", 403: "403", 404: "404", 429: "too many requests", 500: "server error", "drop": "no answer"}  # fmt: skip
# Each step with every failure in a row. A dataset that is not there is no failure; a failed upload the client
# itself tries again.
STEPS = {
    "GetSubmissionLimits": (403,),
    "GetDataset": (401, 429, 500, "drop"),
    "StartBlobUpload": WORDS,
    "CreateDataset": WORDS,
    "GetDatasetStatus": WORDS,
    "SaveKernel": WORDS,
    "GetKernelSessionStatus": WORDS,
    "CreateCodeSubmission": WORDS,
}
SENDING = ("CreateDataset", "SaveKernel", "CreateCodeSubmission")


@pytest.fixture
def built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second build gives the same bytes, which is tested elsewhere and takes a second."""
    monkeypatch.setattr(kernel, "build", cache(kernel.build))


def once(server: Server) -> bool:
    slug = f"{USER}/comp-practice-exp001"
    versions, notes = server.kernels[slug]["versions"], server.datasets[slug]["notes"]
    return (len(server.submissions), len(versions), len(notes)) == (1, 1, 1)


@pytest.mark.usefixtures("built_once")
@pytest.mark.parametrize("method", STEPS)
def test_every_failed_step_is_one_line_and_the_same_command_continues(
    server: Server, trained: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    for failure in STEPS[method]:
        server.fail[method] = [failure] * (1 if method in SENDING else 20)
        assert pushes() == 2, failure
        printed = capsys.readouterr().err.strip()
        assert WORDS[failure] in printed and len(printed.splitlines()) == 1 and KEY not in printed, (
            failure,
            printed,
        )
    server.fail.clear()
    assert pushes() == 0 and once(server)


@pytest.mark.usefixtures("built_once")
@pytest.mark.parametrize("failure", [403, 500, "drop"])
def test_a_failed_upload_creates_no_dataset(
    server: Server, trained: Path, capsys: pytest.CaptureFixture[str], failure: Any
) -> None:
    server.fail["upload"] = [failure] * 200
    assert pushes() == 2
    printed = capsys.readouterr().err.strip()
    assert len(printed.splitlines()) == 1 and KEY not in printed and not server.datasets, printed
    server.fail.clear()
    assert pushes() == 0 and once(server)


@pytest.mark.usefixtures("built_once")
def test_limits_pending_states_and_failures_of_kaggle(
    server: Server, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which a push can meet them; after each the same command continues and sends nothing
    twice."""
    monkeypatch.setattr(push, "TIMEOUT", 60.0)
    monkeypatch.setattr(push.submit, "TIMEOUT", 30.0)

    def refused(word: str) -> None:
        assert pushes() == 2
        printed = capsys.readouterr().err.strip()
        assert word in printed and len(printed.splitlines()) == 1, printed

    server.allowed = 0
    refused("daily limit is reached; the next submission is possible at 00:00 UTC")
    assert not server.datasets and not server.uploads
    server.allowed, server.dataset_states = 5, ["BLOBS_RECEIVED"]
    refused("still blobs_received after")
    server.dataset_states, server.kernel_runs = ["REPROCESSING", "READY"], ["QUEUED"]
    refused("still QUEUED after")
    (kernel_of,) = server.kernels.values()
    kernel_of["runs"], server.taken_meanwhile = ["RUNNING", "COMPLETE"], True
    refused("daily limit is reached")
    server.allowed, server.scores = 5, [None]
    refused("still pending after")
    server.submissions[0]["score"] = "ERROR"
    for _ in "twice":
        refused(
            "submission 1000 already, which Kaggle could not score (Evaluation raised: row ids do not match)"
        )
    assert once(server)
    assert cli.main(["kernel", "exp001", "--push", "-m", "first", "--anyway", "they mended it"]) == 0
    assert [each["version"] for each in server.submissions] == [1, 1]
    assert [len(each["notes"]) for each in server.datasets.values()] == [1]


@pytest.mark.usefixtures("built_once")
def test_a_failed_dataset_is_uploaded_again(
    server: Server, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.dataset_states = ["FAILED", "READY"]
    assert pushes() == 2
    assert "could not process it (failed)" in capsys.readouterr().err
    server.fail["CreateDatasetVersion"] = ["after"]
    assert pushes() == 2, "an answer that is lost"
    assert pushes() == 0
    (found,) = server.datasets.values()
    assert [each["number"] for each in ledger.entries(("dataset",), "practice")] == [1, 2]
    assert len(found["notes"]) == 2 and found["files"][0] == found["files"][1]


def arrived(server: Server) -> tuple[int, int, int]:
    """Submissions, versions of the notebook, versions of the dataset."""
    slug = f"{USER}/comp-practice-exp001"
    return (
        len(server.submissions),
        len(server.kernels[slug]["versions"]),
        len(server.datasets[slug]["notes"]),
    )


@pytest.mark.parametrize("method", ["CreateDataset", "SaveKernel", "CreateCodeSubmission"])
def test_a_lost_answer_sends_nothing_twice(server: Server, trained: Path, method: str) -> None:
    server.fail[method] = ["after"]
    pushes()
    assert pushes() == 0
    assert arrived(server) == (1, 1, 1)


def test_invalid_sources_and_a_cut_upload_are_errors(
    server: Server, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.short = [5]
    assert pushes() == 2
    assert "files and folders arrived" in capsys.readouterr().err and not server.datasets
    server.invalid = {"invalidDatasetSources": [f"{USER}/comp-practice-exp001"]}
    assert pushes() == 2
    assert f"not accessible: dataset {USER}/comp-practice-exp001" in capsys.readouterr().err
    server.invalid = {}
    assert pushes() == 0 and len(server.submissions) == 1


def test_a_failed_run_shows_its_log(
    server: Server, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.kernel_runs = ["RUNNING", "ERROR"]
    server.kernel_log = json.dumps(
        [{"stream_name": "stderr", "time": 1.0, "data": f"CUDA out of memory\nkey {KEY}\n"}]
    )
    assert pushes() == 2
    printed = capsys.readouterr().err
    assert "threw an exception" in printed and "CUDA out of memory" in printed and KEY not in printed
    assert not server.submissions and list((trained / "kernels").glob("*.log"))
    server.kernel_runs = ["COMPLETE"]
    assert pushes() == 0 and server.submissions[0]["version"] == 2


def killed(where: str) -> Callable[[], object]:
    def die(*_: object, **__: object) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def after(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: (function(*given, **named), die())

    def run() -> int:
        places = {
            "before the dataset": (kaggle_datasets, "send_dataset", die),
            "dataset sent": (kaggle_datasets, "send_dataset", after(kaggle_datasets.send_dataset)),
            "dataset is being made": (kaggle_datasets, "dataset_status", die),
            "before the notebook": (kaggle_datasets, "send_kernel", die),
            "notebook sent": (kaggle_datasets, "send_kernel", after(kaggle_datasets.send_kernel)),
            "it runs": (kaggle_datasets, "kernel_status", die),
            "before the submission": (kaggle, "submit_kernel", die),
            "submitted": (kaggle, "submit_kernel", after(kaggle.submit_kernel)),
            "waiting for the score": (push.submit, "wait_for_score", die),
        }
        module, name, function = places[where]
        setattr(module, name, function)
        return pushes()

    return run


@pytest.mark.parametrize(
    "where",
    [
        "before the dataset",
        "dataset sent",
        "dataset is being made",
        "before the notebook",
        "notebook sent",
        "it runs",
        "before the submission",
        "submitted",
        "waiting for the score",
    ],
)
def test_killed_at_every_step_nothing_is_sent_twice(server: Server, trained: Path, where: str) -> None:
    assert os.WIFSIGNALED(forked(killed(where)))
    assert pushes() == 0
    assert arrived(server) == (1, 1, 1)
    assert ledger.submissions("practice")[0]["public"] == 0.5


def test_a_changed_bundle_is_a_new_version(server: Server, trained: Path) -> None:
    assert pushes() == 0
    assert (
        cli.main(["kernel", "exp001:tta-identity-hflip", "--push", "-m", "views", "--anyway", "to compare"])
        == 0
    )
    file = trained / "configs" / "competition.yaml"
    file.write_text(file.read_text() + "kernel: {ram: 12.5}\n")
    assert cli.main(["kernel", "exp001", "--push", "-m", "again", "--anyway", "less memory"]) == 0
    slug = f"{USER}/comp-practice-exp001"
    assert len(server.datasets[slug]["notes"]) == 2 and [s["version"] for s in server.submissions] == [
        1,
        1,
        2,
    ]
