"""A small run that tests start as a process of its own, and kill: python tracked_run.py MODE [kill|torn]
[numbers] [hasty].

It does what a training loop does with its log: a checkpoint every epoch, which keeps the log's offset, and a
result that must be the same however W&B fares.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from comp.engine.config.schema import Track as Settings
from comp.engine.run import tracking
from comp.engine.store import artifacts, paths

EPOCHS, STEPS = 4, 10
KILL_STEP = 25  # half way between two checkpoints
# Put together here, so that the repository holds nothing that looks like a key.
CONFIG_KEY, NOTE_KEY = "config-secret-" + "0123456789", "wandb_v1_" + "0123456789abcdefghij"
CONFIG = {
    "competition": {"slug": "practice"},
    "optim": {"lr": 1e-3},
    "api_key": CONFIG_KEY,
    "nested": {"note": NOTE_KEY},
}


def main(mode: str, kill: str | None, only_numbers: bool) -> None:
    folder = paths.fold_folder("exp001", 0, 1)
    checkpoint = folder / "checkpoint.json"
    state: dict[str, Any] = (
        json.loads(checkpoint.read_text())
        if checkpoint.exists()
        else {"step": 0, "value": 1.0, "offset": None}
    )
    run = tracking.open_log(
        folder,
        run_id="exp001-seed0-fold1",
        name="exp001/seed0/fold1",
        group="exp001",
        job_type="fold",
        config=CONFIG,
        settings=Settings(mode=mode, project=None, entity=None, log_model=True),  # type: ignore[arg-type]
        resume_at=state["offset"],
    )
    with run as log:
        if not only_numbers:
            begin(log, folder)
        for step in range(state["step"] + 1, EPOCHS * STEPS + 1):
            state["value"] = state["value"] * 0.9 + math.sin(step)
            log.log({"step": step, "loss": math.nan if step == 7 else state["value"], "lr": np.float32(0.5)})
            if kill and step == KILL_STEP:
                die(kill, folder)
            if step % STEPS == 0:
                log.log({"epoch": step // STEPS, "step": step, "valid_loss": state["value"] / 2})
                state |= {"step": step, "offset": log.offset()}
                artifacts.write_json(checkpoint, state)
        (folder / "result.txt").write_text(repr(state["value"]))
        if not only_numbers:
            finish(log, folder)


def begin(log: tracking.RunLogger, folder: Path) -> None:
    import pandas as pd

    from comp.engine.report import plots

    plots.residuals(np.arange(5.0), np.arange(5.0) + 0.1, folder / "sheet.png")
    log.image("augment", folder / "sheet.png")
    log.table("folds", pd.DataFrame({"fold": [0, 1], "rows": [50, 50], "share": [0.1, math.nan]}))


def finish(log: tracking.RunLogger, folder: Path) -> None:
    from comp.engine.report import plots

    (folder / "oof.arrow").write_bytes(b"out of fold " * 1000)
    (folder / "weights.safetensors").write_bytes(b"weights " * 1000)
    truth = np.array([0, 1, 2, 1])
    probability = np.array([[0.1, 0.8, 0.1], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4], [0.0, 0.0, 1.0]])
    classes = ["ant", "bee", "cat"]
    plots.confusion(truth, probability.argmax(1), classes, folder / "confusion.png")
    log.image("confusion", folder / "confusion.png")
    worst = plots.worst_rows(truth, probability, ["00a", "00b", "00c", "00d"], classes, count=2)
    log.table("worst", worst, [np.full((400, 300, 3), 40 * i, np.uint8) for i in range(len(worst))])
    log.artifact(folder / "oof.arrow", "exp001-seed0-fold1-oof", "oof")
    log.artifact(folder / "weights.safetensors", "exp001-seed0-fold1-weights", "model")
    log.summary({"score": 0.75, "broken": math.inf})


def die(how: str, folder: Path) -> None:
    """Only once W&B has begun its part, so that there is something to join."""
    desk = paths.path("wandb", "feed", "exp001-seed0-fold1", "state.json")
    while not (desk.exists() and "part" in desk.read_text()):
        time.sleep(0.05)
    if how == "torn":
        with (folder / "log.jsonl").open("ab") as log:
            log.write(b'{"step": 26, "lo')
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    # No test is about time, and the machine may be busy.
    tracking.INIT_TIMEOUT, tracking.UPLOAD_TIMEOUT, tracking.WAIT_ONLINE, tracking.WAIT_OFFLINE = (
        60.0,
        5.0,
        100.0,
        100.0,
    )
    if "hasty" in sys.argv:
        tracking.INIT_TIMEOUT = 2.0
    how = next((word for word in sys.argv[2:] if word in ("kill", "torn")), None)
    main(sys.argv[1], how, "numbers" in sys.argv)
