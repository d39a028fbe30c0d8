"""comp submit and comp ledger with the real client against a local server: sent once, whatever fails or is
killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb_reader
from banked import Project, declare, lay_out, member
from forked import forked
from kaggle_server import KEY, Server
from test_download import at_kaggle

from comp.engine import cli
from comp.engine.deliver import kaggle, ledger, recheck
from comp.engine.deliver import submit as send
from comp.engine.ensemble.blend import blend
from comp.engine.store import artifacts, paths


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    yield from at_kaggle(monkeypatch, tmp_path)


@pytest.fixture
def sendable(empty: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Predictions with their sample submission, W&B off. The recheck of checkpoints is tested elsewhere."""
    base = empty / "configs" / "base.yaml"
    base.write_text(base.read_text().replace("mode: offline", "mode: none"))
    raw = empty / "data" / "raw"
    raw.mkdir(parents=True)
    project = lay_out(empty)
    tests = project.samples.frame["id"].to_numpy()[project.samples.positions("test")]
    (raw / "sample_submission.csv").write_text("id,label\n" + "".join(f"{each},ant\n" for each in tests))
    entry = artifacts.read_json(paths.samples_file().parent / "manifest.json")
    entry["samples.parquet"]["sample"] = artifacts.sha256(raw / "sample_submission.csv")
    artifacts.write_json(paths.samples_file().parent / "manifest.json", entry)
    monkeypatch.setattr(recheck, "recheck", lambda name: None)
    member(project, "exp001", noise=1.5, seed=1)
    member(project, "exp002", noise=1.2, seed=2)
    return project


def submit(name: str = "exp001", *more: str) -> int:
    return cli.main(["submit", name, "-m", "first try", *more])


def events() -> list[str]:
    return [line["event"] for line in ledger.lines()]


def test_send_wait_and_write_the_ledger(
    server: Server, sendable: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    server.scores = [0.75]
    assert submit() == 0
    (sent,) = server.submissions
    file = paths.submission_file("exp001")
    assert sent["data"] == file.read_bytes()
    (entry,) = ledger.submissions("practice")
    assert sent["description"] == f"first try {entry['token']}" and len(entry["token"]) == 8
    assert (
        entry["file"] == artifacts.sha256(file) and entry["public"] == 0.75 and entry["number"] == sent["ref"]
    )
    assert entry["cv"]["oof"] == artifacts.read_json(paths.run_folder("exp001") / "score.json")["oof"]
    assert entry["members"] == ["exp001"]
    assert "public 0.75" in capsys.readouterr().out
    assert KEY not in ledger.file().read_text()


def test_the_same_bytes_and_a_worse_score_need_an_option(
    server: Server, sendable: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("exp002") == 0
    assert cli.main(["submit", "exp002", "-m", "other words"]) == 2
    assert "submission 1000 already" in capsys.readouterr().err
    assert submit("exp001") == 2
    printed = capsys.readouterr().err
    assert "CV score" in printed and "submission 1000" in printed and "--anyway" in printed
    assert len(server.submissions) == 1
    assert submit("exp001", "--anyway", "another seed") == 0
    assert submit("exp002", "--force") == 0
    assert len(server.submissions) == 3
    assert ledger.submissions("practice")[1]["anyway"] == "another seed"


def test_limits(server: Server, sendable: Project, capsys: pytest.CaptureFixture[str]) -> None:
    server.allowed = 0
    assert submit() == 2
    assert "daily limit" in (printed := capsys.readouterr().err) and "00:00 UTC" in printed
    server.total = True
    assert submit() == 2
    assert "allows no more" in capsys.readouterr().err
    assert not server.submissions and "intent" not in events()
    server.total, server.allowed, server.taken_meanwhile = False, 5, True
    assert submit() == 2
    assert "daily limit" in capsys.readouterr().err and not server.submissions


WORDS = {401: "credentials", 403: "practice/rules", 404: "no competition", 429: "too many requests", 500: "server error", "drop": "no answer"}  # fmt: skip
READING = ("ListSubmissions", "GetSubmissionLimits")
ONCE = ("StartSubmissionUpload", "CreateSubmission")
# Quick: every failure at the first call, and one of a kind at the others. Slow: all of them everywhere.
QUICK = {(READING[0], each) for each in WORDS} | {(ONCE[0], "drop"), (ONCE[1], 500), (ONCE[1], "drop"), (READING[1], 403)}  # fmt: skip
FAILURES = [
    pytest.param(method, failure, marks=() if (method, failure) in QUICK else pytest.mark.slow)
    for method in (*READING, *ONCE)
    for failure in WORDS
]


@pytest.mark.parametrize(("method", "failure"), FAILURES)
def test_every_failure_is_one_line_and_the_same_command_continues(
    server: Server,
    sendable: Project,
    capsys: pytest.CaptureFixture[str],
    method: str,
    failure: Any,
) -> None:
    server.fail[method] = [failure] * (1 if method in ONCE else 9)
    assert submit() == 2
    printed = capsys.readouterr().err.strip()
    assert WORDS[failure] in printed and len(printed.splitlines()) == 1 and KEY not in printed
    assert not server.submissions
    server.fail.clear()
    assert submit() == 0
    assert len(server.submissions) == 1


@pytest.mark.parametrize(
    "failure",
    [pytest.param(each, marks=() if each in (403, "drop") else pytest.mark.slow) for each in WORDS],
)
def test_a_failure_while_waiting_loses_nothing(
    server: Server, sendable: Project, capsys: pytest.CaptureFixture[str], failure: Any
) -> None:
    """The list is available before sending and fails after it; then comp ledger fails, and then it
    succeeds."""
    server.fail["ListSubmissions"] = [None] + [failure] * 9
    assert submit() == 2
    printed = capsys.readouterr().err.strip()
    assert WORDS[failure] in printed and len(printed.splitlines()) == 1 and len(server.submissions) == 1
    server.fail["ListSubmissions"] = [failure] * 9
    assert cli.main(["ledger"]) == 2
    printed = capsys.readouterr().out
    assert WORDS[failure] in printed and "first try" in printed
    server.fail.clear()
    assert submit() == 0 and len(server.submissions) == 1
    assert ledger.submissions("practice")[0]["public"] == 0.5


@pytest.mark.parametrize(
    "failure", ["drop", pytest.param(500, marks=pytest.mark.slow), pytest.param(403, marks=pytest.mark.slow)]
)
def test_a_failed_upload_is_no_submission(
    server: Server, sendable: Project, capsys: pytest.CaptureFixture[str], failure: Any
) -> None:
    server.fail["upload"] = [failure] * 40
    assert submit() == 2
    printed = capsys.readouterr().err.strip()
    assert len(printed.splitlines()) == 1 and KEY not in printed and not server.submissions
    server.fail.clear()
    assert submit() == 0 and len(server.submissions) == 1


def test_transient_failures_of_reading_are_retried(server: Server, sendable: Project) -> None:
    server.fail["ListSubmissions"] = [429, 500]
    assert submit() == 0


def test_a_cut_upload_is_no_submission(
    server: Server, sendable: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    server.short = [10]
    assert submit() == 2
    assert "no ref" in capsys.readouterr().err and not server.submissions
    assert submit() == 0 and server.submissions[0]["data"] == paths.submission_file("exp001").read_bytes()


def test_a_lost_answer_is_looked_up(server: Server, sendable: Project) -> None:
    server.fail["CreateSubmission"] = ["after"]
    assert submit() == 0
    assert len(server.submissions) == 1 and ledger.submissions("practice")[0]["number"] == 1000


@pytest.mark.parametrize(("score", "word"), [("ERROR", "row ids do not match"), (None, "still pending")])
def test_failed_and_pending_scores(
    server: Server, sendable: Project, capsys: pytest.CaptureFixture[str], score: Any, word: str
) -> None:
    server.scores = [score]
    assert submit() == 2
    assert word in capsys.readouterr().err
    if score is None:  # typed again it does not send again
        server.submissions[0]["score"] = 0.25
        assert submit() == 0 and "public 0.25" in capsys.readouterr().out
    else:  # its bytes are not sent again in silence
        assert submit() == 2
        assert "1000 already, which Kaggle could not score" in capsys.readouterr().err
    assert len(server.submissions) == 1
    assert score is None or (submit("exp001", "--anyway", "mended") == 0 and len(server.submissions) == 2)


def test_ctrl_c_while_waiting_names_comp_ledger(
    server: Server, sendable: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", pressed)
        assert submit() == 130
    assert "submission 1000 is sent; comp ledger fetches its score later" in capsys.readouterr().err
    assert cli.main(["ledger"]) == 0 and ledger.submissions("practice")[0]["public"] == 0.5


# --- kills --------------------------------------------------------------------------------------------------


def killed(where: str) -> Callable[[], object]:
    def die(*_: object, **__: object) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> int:
        from kaggle.api.kaggle_api_extended import KaggleApi

        original, add = kaggle.submit_file, ledger.add
        if where == "intent written":
            kaggle.submit_file = die
        elif where == "uploading":
            KaggleApi.upload_complete = die
        elif where == "sent, not in the ledger":

            def sent(file: Path, message: str, competition: str) -> int:
                original(file, message, competition)
                return die()

            kaggle.submit_file = sent
        elif where == "in the ledger":

            def booked(event: str, **facts: Any) -> Any:
                return add(event, **facts) if event != "sent" else (add(event, **facts), die())

            ledger.add = booked
        elif where == "waiting":
            send.wait_for_score = die
        return submit()

    return run


WHERE = {"intent written": 0, "uploading": 0, "sent, not in the ledger": 1, "in the ledger": 1, "waiting": 1}


@pytest.mark.parametrize("where", WHERE)
def test_killed_and_typed_again_sends_once(server: Server, sendable: Project, where: str) -> None:
    server.scores = [0.75]
    status = forked(killed(where))
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert len(server.submissions) == WHERE[where]
    assert submit() == 0
    assert len(server.submissions) == 1
    (entry,) = ledger.submissions("practice")
    assert entry["public"] == 0.75


def test_comp_ledger_finds_what_a_killed_process_sent(
    server: Server, sendable: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert os.WIFSIGNALED(forked(killed("sent, not in the ledger")))
    assert cli.main(["ledger"]) == 0 and cli.main(["ledger"]) == 0
    (entry,) = ledger.submissions("practice")
    assert entry["kind"] == "file" and entry["public"] == 0.5 and entry["name"] == "exp001"


@pytest.mark.parametrize("line", [0, 1])
def test_comp_ledger_killed_at_a_line(server: Server, sendable: Project, line: int) -> None:
    assert submit("exp001", "--no-wait") == 0
    server.submissions.append(
        {"ref": 77, "description": "by hand", "score": 0.6, "looks": 0, "date": "2026-11-01T00:00:00Z"}
    )

    def work() -> None:
        add, count = ledger.add, [0]

        def counted(event: str, **facts: Any) -> Any:
            if count[0] == line:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return add(event, **facts)

        ledger.add = counted
        cli.main(["ledger"])

    assert os.WIFSIGNALED(forked(work))
    assert cli.main(["ledger"]) == 0 and cli.main(["ledger"]) == 0
    assert [(each["number"], each["public"]) for each in ledger.submissions("practice")] == [
        (77, 0.6),
        (1000, 0.5),
    ]


def test_an_incomplete_last_line_is_removed(sendable: Project) -> None:
    ledger.intend("file", competition="practice", name="a")
    whole = ledger.file().read_bytes()
    ledger.file().write_bytes(whole + b'{"event": "se')
    ledger.intend("file", competition="practice", name="b")
    assert [line["name"] for line in ledger.lines()] == ["a", "b"]


# --- the ledger ---------------------------------------------------------------------------------------------


def test_comp_ledger_prints_table_agreement_shake_up_and_final_two(
    server: Server, sendable: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    server.scores = [0.70, 0.80, 0.78]
    declare(sendable, "blend001", "members: [exp001, exp002]\nmethod: mean")
    blend("blend001")
    for name in ("exp001", "exp002", "blend001"):
        assert submit(name, "--anyway", "all of them") == 0
    server.submissions.append(
        {"ref": 77, "description": "by hand", "score": 0.6, "looks": 0, "date": "2026-11-01T00:00:00Z"}
    )
    assert cli.main(["ledger"]) == 0 and cli.main(["ledger"]) == 0
    capsys.readouterr()
    server.submissions[0]["private"] = 0.69
    assert cli.main(["ledger"]) == 0
    out = capsys.readouterr().out
    assert "(elsewhere)" in out and "by hand" in out and "0.69" in out
    assert "rank correlation of CV and public score over 3 submissions: " in out
    assert "consecutive changes of the same sign: " in out and "shake-up: at a public share of 30%" in out
    assert "final two: " in out and "correlation" in out
    assert (sendable.root / "submissions/scores.png").read_bytes().startswith(b"\x89PNG")
    before = ledger.file().read_bytes()
    assert cli.main(["ledger"]) == 0
    assert ledger.file().read_bytes() == before, "nothing changed, so nothing is written"


def test_many_pages_of_submissions(
    server: Server, sendable: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kaggle, "PAGE", 2)
    for i in range(5):
        server.submissions.append(
            {"ref": i + 1, "description": "old", "score": 0.1, "looks": 0, "date": "2026-11-01T00:00:00Z"}
        )
    assert cli.main(["ledger"]) == 0
    assert [each["number"] for each in ledger.submissions("practice")] == [1, 2, 3, 4, 5]


def test_without_kaggle_the_ledger_is_printed_as_it_is(
    server: Server, sendable: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit() == 0
    server.fail["ListSubmissions"] = [500] * 9
    assert cli.main(["ledger"]) == 2
    out = capsys.readouterr().out
    assert "server error" in out and "first try" in out


def test_submissions_are_logged_to_wandb(server: Server, sendable: Project) -> None:
    base = sendable.root / "configs" / "base.yaml"
    base.write_text(
        base.read_text().replace("mode: none  ", "mode: offline").replace("mode: none", "mode: offline", 1)
    )
    assert submit() == 0
    (log,) = (sendable.root / "submissions" / "tracked").glob("*/log.jsonl")
    summary = next(json.loads(line) for line in log.read_text().splitlines() if '"summary"' in line)
    assert summary["values"]["public"] == 0.5
    assert list((sendable.root / "wandb").glob("offline-run-*"))
    assert submit("exp002") == 0 and cli.main(["ledger"]) == 0
    parts = [wandb_reader.read(folder) for folder in (sendable.root / "wandb").glob("offline-run-*")]
    (book,) = [part for part in parts if part.run.run_id == "submissions-practice"]
    assert book.run.job_type == "submit" and book.media("cv_against_leaderboard").exists()
    assert book.summary["submissions"] == 2 and "final two: " in book.summary["summary"]
    assert "rank_correlation" in book.summary
    each = {part.run.display_name: part.summary["public"] for part in parts if part is not book}
    assert each == {"submit/exp001": 0.5, "submit/exp002": 0.5}


def test_rank_correlation_is_spearmans() -> None:
    from scipy.stats import spearmanr

    from comp.engine.deliver.leaderboard import rank_correlation

    a, b = np.array([1.0, 2, 2, 4, 5]), np.array([1.0, 3, 2, 2, 9])
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
