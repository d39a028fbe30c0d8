"""A process that sends the lines of a log.jsonl to W&B while the run writes them. Started by
tracking.WandbProcess.

The number of a line is W&B's step: a server that has some lines already gets only the others, and an offline
run is always written from the first line. So there is one history after a kill, and the fallback (no key, no
response, a dead service) is a new start of this process with mode offline.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from comp.engine import hardware
from comp.engine.run.tracking import parse
from comp.engine.store import artifacts

POLL = 0.1  # seconds between two reads of the log
ATTEMPTS = 3  # in the mode of the config, then offline twice

Job = dict[str, Any]


def main(folder: Path, attempt: int) -> None:
    for number in hardware.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # it ends when its run ends, and sends how that ended
    job = json.loads((folder / "job.json").read_text())
    mode = job["mode"] if attempt == 1 else "offline"
    with (folder / "lock").open("w") as lock:
        threading.Thread(target=_exit_when_replaced, args=(folder, job["token"]), daemon=True).start()
        fcntl.flock(lock, fcntl.LOCK_EX)  # an older process of this run may still be running
        _use_project_folders(Path(job["root"]), mode)
        timeout = f"{job['init_timeout']:.0f}"  # W&B accepts whole numbers only
        os.environ.setdefault("WANDB_HTTP_TIMEOUT", timeout)
        try:
            import wandb

            _send(wandb, job, mode, folder)
        except Exception as error:
            # Whatever W&B raises: log.jsonl is the record, so a new attempt loses nothing.
            print(f"attempt {attempt}, {mode}: {type(error).__name__}: {error}", flush=True)
            if attempt == ATTEMPTS:
                _write_state(folder, note=f"gave up ({_short(error)}); log.jsonl is complete")
                os._exit(1)  # without exit hooks, which would wait for the service that failed
            if mode == "online":
                note = f"online failed ({_short(error)}); this run is written offline to wandb/"
                _write_state(folder, mode="offline", note=note)
            # With exec: within this process W&B regards the id as in use, and a dead service is not replaced.
            try:
                if "wandb" in sys.modules:
                    sys.modules["wandb"].teardown()
            finally:
                os.execv(
                    sys.executable,
                    [sys.executable, "-m", "comp.engine.run.wandb_worker", str(folder), str(attempt + 1)],
                )


def _send(wandb: Any, job: Job, mode: str, folder: Path) -> None:
    if mode == "offline":
        _trash_offline_runs(Path(job["root"]) / "wandb", job["run"]["id"], Path(job["trash"]))
    settings = {
        "init_timeout": job["init_timeout"],
        "finish_timeout": job["upload_timeout"],
        "finish_timeout_raises": True,
        "console": "off",
        "silent": True,
        "save_code": False,
        "x_stats_pid": job["trainer"],
    }
    known = wandb.Settings.model_fields  # older versions, like that of Kaggle's image, lack some
    run = wandb.init(
        **job["run"],
        mode=mode,
        # On a server: continue the history of this id, or start it again.
        resume=None if job["fresh"] or mode == "offline" else "allow",
        settings=wandb.Settings(**{name: value for name, value in settings.items() if name in known}),
    )
    _write_state(folder, mode=mode, part=os.path.relpath(Path(run.dir).parent, job["root"]))
    source = Path(job["folder"])
    run.save(str(source / "code.diff"), base_path=str(source), policy="now")
    sent = run.starting_step if mode == "online" else 0  # lines that the server has
    axes: dict[str, str] = {}
    status = "killed"
    for number, line in enumerate(_follow(source / "log.jsonl", lambda: os.getppid() == job["trainer"])):
        record = parse(line)
        if record.get("event") == "finish":
            status = record["name"]
            break
        clock = record.pop("clock", None)
        if number < sent and record.get("event") != "summary":
            continue
        try:
            _send_record(wandb, run, record, number, clock, source, axes)
        except Exception as error:
            # Online: the whole run is written offline instead, and can be synchronized later.
            # Offline: one image less is no problem.
            if mode == "online" or "event" not in record:
                raise
            print(f"line {number}: skipped: {type(error).__name__}: {error}", flush=True)
    try:
        run.finish(exit_code=0 if status == "finished" else 1)
    except TimeoutError:
        part = os.path.relpath(Path(run.dir).parent, job["root"])
        _write_state(folder, mode=mode, note=f"the upload took too long; wandb sync {part} continues it")


def _send_record(
    wandb: Any,
    run: Any,
    record: dict[str, Any],
    number: int,
    clock: float | None,
    folder: Path,
    axes: dict[str, str],
) -> None:
    event = record.get("event")
    file = folder / record["file"] if event and "file" in record else folder
    if event == "summary":
        run.summary.update(record["values"])
    elif event == "artifact":
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", record["name"]), type=record["type"])
        artifact.add_file(
            str(file.resolve()), policy="immutable", skip_cache=True
        )  # a reference to the file, no copy
        run.log_artifact(artifact)
    else:
        row = {record["name"]: _media(wandb, event, file)} if event else _numbers(run, record, axes)
        run.log({**row, "_timestamp": clock} if clock else row, step=number, commit=True)


def _numbers(run: Any, record: dict[str, Any], axes: dict[str, str]) -> dict[str, Any]:
    """Plots have `step` or `epoch` as their x axis, since W&B's own step counts lines. So no step is logged
    twice."""
    axis = "epoch" if "epoch" in record else "step"
    record = {key: value for key, value in record.items() if axis == "step" or key != "step"}
    for key in record:
        if key not in axes:
            axes[key] = axis
            # step_sync would repeat the last step in the row of every epoch.
            run.define_metric(
                key, step_metric=None if key == axis else axis, step_sync=None if key == axis else False
            )
    return record


def _media(wandb: Any, event: str, file: Path) -> Any:
    if event == "image":
        return wandb.Image(str(file))
    table = json.loads(file.read_text())
    if not table["images"]:
        return wandb.Table(columns=table["columns"], data=table["rows"])
    images = [wandb.Image(str(file.parent / name)) if name else None for name in table["images"]]
    rows = [[*row, image] for row, image in zip(table["rows"], images, strict=True)]
    return wandb.Table(columns=[*table["columns"], "image"], data=rows)


def _follow(log: Path, alive: Callable[[], bool]) -> Iterator[bytes]:
    """Complete lines as they are written, until the writer has ended and everything is read."""
    rest = b""
    with log.open("rb") as file:
        while True:
            running = alive()  # before reading, so that the last lines of a process that ends now are read
            chunk = file.read(2**20)
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
            if not chunk:
                if not running:
                    return
                time.sleep(POLL)


def _trash_offline_runs(wandb_folder: Path, run_id: str, trash: Path) -> None:
    """Earlier offline runs of this id: the new one contains all of their lines, which would be synchronized
    twice."""
    own = re.compile(rf"offline-run-\d{{8}}_\d{{6}}-{re.escape(run_id)}")
    for part in wandb_folder.glob("offline-run-*"):
        if own.fullmatch(part.name):
            trash.mkdir(parents=True, exist_ok=True)
            os.replace(part, trash / f"{part.name}-{time.time_ns()}")


def _use_project_folders(root: Path, mode: str) -> None:
    """Nothing is written outside the project. Online, W&B's own config is used: it may hold a self-hosted
    server's address."""
    os.environ["WANDB_DIR"] = str(root)
    os.environ["WANDB_DATA_DIR"] = str(root / "wandb" / "data")
    os.environ["WANDB_CACHE_DIR"] = str(root / "wandb" / "cache")
    if mode == "offline":
        os.environ["WANDB_CONFIG_DIR"] = str(root / "wandb" / "config")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def _exit_when_replaced(folder: Path, token: str) -> None:
    """The run was resumed and has written a new job.json, whose process sends everything again."""
    while json.loads((folder / "job.json").read_text())["token"] == token:
        time.sleep(POLL)
    os._exit(0)


def _write_state(folder: Path, **facts: Any) -> None:
    before = json.loads((folder / "state.json").read_text()) if (folder / "state.json").exists() else {}
    artifacts.write_json(folder / "state.json", before | facts)


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
