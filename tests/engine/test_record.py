"""log.jsonl without W&B: truncated logs, odd values; and the provenance of a run, without secrets."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_tracking import KEY, new_project

from comp.engine.config.schema import Track as Settings
from comp.engine.run import provenance, tracking


def test_a_log_shorter_than_its_checkpoint_keeps_its_complete_lines(empty: Path) -> None:
    """After a power cut the file may be shorter than the offset in the checkpoint."""
    log = empty / "log.jsonl"
    log.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert tracking._truncate(log, 10_000) == [b'{"step": 1}', b'{"step": 2}']
    assert log.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert tracking._truncate(log, 12) == [b'{"step": 1}']
    assert tracking._truncate(log, 0) == [] and log.read_bytes() == b""


def test_nonfinite_values_and_unreadable_images_do_not_stop_a_run(empty: Path) -> None:
    import pandas as pd

    damaged = empty / "damaged.png"
    damaged.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    with open_quietly(empty / "run") as log:
        log.log(
            {
                "step": np.int64(1),
                "loss": np.array(0.5),
                "list": [np.float64("inf"), 1],
                "path": Path("x"),
                "none": None,
            }
        )
        log.table("worst", pd.DataFrame({"id": ["001", "002"]}), [damaged, np.zeros((900, 300), np.uint8)])
    first = tracking.read(empty / "run" / "log.jsonl")[0]
    assert {k: first[k] for k in ("step", "loss", "list", "path", "none")} == {
        "step": 1, "loss": 0.5, "list": [None, 1], "path": "x", "none": None,
    }  # fmt: skip
    table = json.loads((empty / "run" / "media" / "worst.json").read_text())
    assert table["rows"] == [["001"], ["002"]] and table["images"] == [None, "worst/001.png"]
    assert max(Image.open(empty / "run" / "media" / "worst" / "001.png").size) == tracking.THUMBNAIL


def test_an_error_ends_the_run_as_failed(empty: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_quietly(empty / "run") as log:
        log.log({"step": 1 // 0})
    assert tracking.read(empty / "run" / "log.jsonl")[-1]["name"] == "failed"
    assert not tracking.finished(empty / "run")


def open_quietly(folder: Path) -> tracking.RunLogger:
    settings = Settings(mode="none", project=None, entity=None, log_model=False)
    return tracking.open_log(
        folder, run_id="r", name="r", group="r", job_type="fold", config={}, settings=settings
    )


@pytest.mark.parametrize(
    "text", ["Key points: token counts", "monkey=5", "competition.classes=[key, lock]", "commit " + KEY]
)
def test_ordinary_text_is_not_removed_as_a_secret(text: str) -> None:
    assert provenance.without_secrets({"title": text, "num_tokens": 7}) == {"title": text, "num_tokens": 7}


@pytest.mark.parametrize(
    "text", ["--api-key abc", "KAGGLE_KEY=abc", "https://me:" + "abc@host/x", "hf_" + "abc" * 6]
)
def test_secrets_are_recognised_by_name_place_and_form(text: str) -> None:
    assert "abc" not in provenance.without_secrets({"command": text})["command"]


def test_the_diff_applied_to_the_commit_is_the_code_that_ran(tmp_path: Path) -> None:
    root = new_project(tmp_path).root
    (root / "train.sh").write_text("after\n")
    (root / "configs" / "exp009.yaml").write_text("base: exp001\n")
    (root / "empty.py").write_text("")
    facts, difference = provenance.code(root)
    (tmp_path / "code.diff").write_text(difference)
    subprocess.run(["git", "clone", "-q", str(root), str(tmp_path / "clone")], check=True)
    subprocess.run(["git", "-C", str(tmp_path / "clone"), "apply", str(tmp_path / "code.diff")], check=True)
    for name in ("train.sh", "configs/exp009.yaml", "empty.py"):
        assert (tmp_path / "clone" / name).read_text() == (root / name).read_text()
    assert facts["changed"] and provenance.code(tmp_path)[0]["commit"] is None
