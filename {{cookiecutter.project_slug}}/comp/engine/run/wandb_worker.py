"""The process that feeds W&B with the lines of a log.jsonl, beside the run that writes them. Started by track.py.

The number of a line is W&B's own step: a server that already holds some lines gets only the others, and an offline part
always holds the whole history, since it is told anew from the first line. So after a kill there is one history, and a
fallback (no key, no answer, a dead service) is nothing but a new start with mode offline.
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

POLL = 0.1  # seconds between looks at the log
ATTEMPTS = 3  # the mode asked for, then offline twice

Order = dict[str, Any]


def main(desk: Path, attempt: int) -> None:
    for number in hardware.STOPS:
        signal.signal(number, signal.SIG_IGN)  # it ends when its run does, and says how that ended
    order = json.loads((desk / "order.json").read_text())
    mode = order["mode"] if attempt == 1 else "offline"
    with (desk / "lock").open("w") as lock:
        threading.Thread(target=_leave_when_replaced, args=(desk, order["token"]), daemon=True).start()
        fcntl.flock(lock, fcntl.LOCK_EX)  # an older feeder of this run may still be on its way out
        _local_folders(Path(order["root"]), mode)
        os.environ.setdefault(
            "WANDB_HTTP_TIMEOUT", f"{order['answer_seconds']:.0f}"
        )  # must be a whole number
        try:
            import wandb

            _feed(wandb, order, mode, desk)
        except Exception as error:
            # W&B's own troubles, whatever they are. The record is log.jsonl: we may begin again, and lose nothing.
            print(f"attempt {attempt}, {mode}: {type(error).__name__}: {error}", flush=True)
            if attempt == ATTEMPTS:
                _state(desk, note=f"gave up ({_short(error)}); log.jsonl is complete")
                os._exit(1)  # its exit hooks would wait for the service that just failed
            if mode == "online":
                note = f"online failed ({_short(error)}); this run is kept offline in wandb/"
                _state(desk, mode="offline", note=note)
            # In a new process image: after a failed start the same id counts as in use, and a dead service stays dead.
            try:
                if "wandb" in sys.modules:
                    sys.modules["wandb"].teardown()
            finally:
                os.execv(
                    sys.executable,
                    [sys.executable, "-m", "comp.engine.run.wandb_worker", str(desk), str(attempt + 1)],
                )


def _feed(wandb: Any, order: Order, mode: str, desk: Path) -> None:
    if mode == "offline":
        _put_away(Path(order["root"]) / "wandb", order["run"]["id"], Path(order["trash"]))
    wanted = {
        "init_timeout": order["answer_seconds"],
        "finish_timeout": order["upload_seconds"],
        "finish_timeout_raises": True,
        "console": "off",
        "silent": True,
        "save_code": False,
        "x_stats_pid": order["trainer"],
    }
    known = wandb.Settings.model_fields  # older versions, Kaggle's own among them, lack some
    run = wandb.init(
        **order["run"],
        mode=mode,
        # On a server: go on with what it holds, or begin this id anew.
        resume=None if order["fresh"] or mode == "offline" else "allow",
        settings=wandb.Settings(**{name: value for name, value in wanted.items() if name in known}),
    )
    _state(desk, mode=mode, part=os.path.relpath(Path(run.dir).parent, order["root"]))
    folder = Path(order["folder"])
    run.save(str(folder / "code.diff"), base_path=str(folder), policy="now")
    held = run.starting_step if mode == "online" else 0
    axes: dict[str, str] = {}
    status = "killed"
    for number, line in enumerate(_follow(folder / "log.jsonl", lambda: os.getppid() == order["trainer"])):
        record = parse(line)
        if record.get("event") == "finish":
            status = record["name"]
            break
        clock = record.pop("clock", None)
        if number < held and record.get("event") != "summary":
            continue
        try:
            _tell(wandb, run, record, number, clock, folder, axes)
        except Exception as error:
            # A server that takes no artifact may take the whole run later: it goes offline. There, one picture less is no matter.
            if mode == "online" or "event" not in record:
                raise
            print(f"line {number}: left out: {type(error).__name__}: {error}", flush=True)
    try:
        run.finish(exit_code=0 if status == "finished" else 1)
    except TimeoutError:
        part = os.path.relpath(Path(run.dir).parent, order["root"])
        _state(desk, mode=mode, note=f"the upload did not end in time; the rest: wandb sync {part}")


def _tell(
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
        )  # noted where it lies, no copy
        run.log_artifact(artifact)
    else:
        row = {record["name"]: _media(wandb, event, file)} if event else _numbers(run, record, axes)
        run.log({**row, "_timestamp": clock} if clock else row, step=number, commit=True)


def _numbers(run: Any, record: dict[str, Any], axes: dict[str, str]) -> dict[str, Any]:
    """Steps are drawn over `step`, epochs over `epoch`: W&B's own step only counts lines. So no step comes twice."""
    axis = "epoch" if "epoch" in record else "step"
    record = {key: value for key, value in record.items() if axis == "step" or key != "step"}
    for key in record:
        if key not in axes:
            axes[key] = axis
            # step_sync would repeat the last step in every epoch's row.
            run.define_metric(
                key, step_metric=None if key == axis else axis, step_sync=None if key == axis else False
            )
    return record


def _media(wandb: Any, event: str, file: Path) -> Any:
    if event == "image":
        return wandb.Image(str(file))
    table = json.loads(file.read_text())
    if not table["pictures"]:
        return wandb.Table(columns=table["columns"], data=table["rows"])
    images = [wandb.Image(str(file.parent / name)) if name else None for name in table["pictures"]]
    rows = [[*row, image] for row, image in zip(table["rows"], images, strict=True)]
    return wandb.Table(columns=[*table["columns"], "picture"], data=rows)


def _follow(log: Path, alive: Callable[[], bool]) -> Iterator[bytes]:
    """Whole lines as they come, until the writer is dead and everything it wrote is read."""
    torn = b""
    with log.open("rb") as file:
        while True:
            living = alive()  # asked before reading: what a dying writer wrote last still counts
            chunk = file.read(2**20)
            *lines, torn = (torn + chunk).split(b"\n")
            yield from lines
            if not chunk:
                if not living:
                    return
                time.sleep(POLL)


def _put_away(wandb_folder: Path, run_id: str, trash: Path) -> None:
    """Earlier offline parts of this run: the new part tells all they told, and both together would tell it twice."""
    own = re.compile(rf"offline-run-\d{{8}}_\d{{6}}-{re.escape(run_id)}")
    for part in wandb_folder.glob("offline-run-*"):
        if own.fullmatch(part.name):
            trash.mkdir(parents=True, exist_ok=True)
            os.replace(part, trash / f"{part.name}-{time.time_ns()}")


def _local_folders(root: Path, mode: str) -> None:
    """Nothing is written outside the project. A self-hosted server's address lies in W&B's own config: left online."""
    os.environ["WANDB_DIR"] = str(root)
    os.environ["WANDB_DATA_DIR"] = str(root / "wandb" / "data")
    os.environ["WANDB_CACHE_DIR"] = str(root / "wandb" / "cache")
    if mode == "offline":
        os.environ["WANDB_CONFIG_DIR"] = str(root / "wandb" / "config")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def _leave_when_replaced(desk: Path, token: str) -> None:
    """A resumed run has written a new order: whatever this process still waits for, it is told anew by the next one."""
    while json.loads((desk / "order.json").read_text())["token"] == token:
        time.sleep(POLL)
    os._exit(0)


def _state(desk: Path, **facts: Any) -> None:
    before = json.loads((desk / "state.json").read_text()) if (desk / "state.json").exists() else {}
    artifacts.write_json(desk / "state.json", before | facts)


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
