"""The log of a run: log.jsonl always, and W&B from it.

log.jsonl is the record: one JSON object per line, on disk before anything else uses it. A process of its own
(wandb_worker.py) sends that file to W&B, and nothing else. So no server, key or crash of W&B affects the
training process, W&B does not capture its arguments and output, and a run that was killed is sent again from
the lines that are on disk.

A line with `epoch` is an epoch, any other with `step` a training step, one with `event` an image, table,
file, summary or the end. Every line has `clock`, the time it was written. NaN and infinity, which JSON lacks,
are null and listed under `nonfinite`.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from comp.engine.errors import UserError
from comp.engine.run import provenance
from comp.engine.store import artifacts, paths, process

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from comp.engine.config.schema import Config
    from comp.engine.config.schema import Track as Settings

WAIT_ONLINE = 9.0  # seconds that a process waits for a server at the end of its runs, all of them together
WAIT_OFFLINE = 30.0  # seconds to wait for an offline run to be written; it usually takes 0.3 s
INIT_TIMEOUT = 4.0  # seconds for a server to accept the run, before it is written offline
UPLOAD_TIMEOUT = (
    600.0  # seconds that the W&B process may upload after the run has ended, without being waited for
)
THUMBNAIL = 256  # px, longer side of an image in a table

Record = Mapping[str, Any]


def open_log(
    folder: Path,
    *,
    run_id: str,
    name: str,
    group: str,
    job_type: str,
    config: Mapping[str, Any],
    settings: Settings,
    resume_at: int | None = None,
) -> RunLogger:
    """`resume_at`: the RunLogger.offset() stored in the checkpoint that is resumed; None starts a new log."""
    folder.mkdir(parents=True, exist_ok=True)
    code, diff = provenance.code(paths.root())
    artifacts.write_text(folder / "code.diff", diff)
    made_by = {"code": code, "hardware": provenance.hardware(), "command": " ".join(sys.argv)}
    wandb: WandbProcess | NoWandb = NoWandb()
    if settings.mode != "none":
        job = {
            "run": {
                "id": run_id,
                "name": name,
                "group": group,
                "job_type": job_type,
                "project": settings.project or dict(config.get("competition", {})).get("slug") or "comp",
                "entity": settings.entity,
                "config": provenance.without_secrets({**config, **made_by}),
            },
            "mode": settings.mode,
            "fresh": resume_at is None,
            "folder": str(folder.resolve()),
            "root": str(paths.root()),
            "trash": str(paths.path("runs", ".trash")),
            "trainer": os.getpid(),
            "token": f"{process.own_id()}-{time.time_ns()}",
            "init_timeout": INIT_TIMEOUT,
            "upload_timeout": UPLOAD_TIMEOUT,
        }
        wandb = WandbProcess(job)
    # After WandbProcess has written its job: an older worker of this run then stops reading the log.
    lines = _truncate(folder / "log.jsonl", resume_at or 0)
    wandb.start()
    return RunLogger(folder, wandb, lines)


def open_fold_log(run: str, seed: int, fold: int | str, cfg: Config) -> RunLogger:
    from comp.engine.run import checkpoint, fingerprint

    folder = paths.fold_folder(run, seed, fold)
    return open_log(
        folder,
        run_id=f"{run}-{fingerprint.run_id(run)}-seed{seed}-fold{fold}",
        name=f"{run}/seed{seed}/fold{fold}",
        group=run,
        job_type="fold",
        config=cfg.model_dump(),
        settings=cfg.track,
        resume_at=checkpoint.log_offset(folder),
    )


def open_summary_log(run: str, cfg: Config) -> RunLogger:
    """One more W&B run for all folds: mean and standard deviation of the CV score, merged OOF predictions."""
    from comp.engine.run import fingerprint

    return open_log(
        paths.run_folder(run),
        run_id=f"{run}-{fingerprint.run_id(run)}-summary",
        name=run,
        group=run,
        job_type="summary",
        config=cfg.model_dump(),
        settings=cfg.track,
    )


class RunLogger:
    """Appends to log.jsonl. `lines`: those that are there already."""

    def __init__(self, folder: Path, wandb: WandbProcess | NoWandb, lines: list[bytes]):
        self.folder = folder
        self._wandb = wandb
        self._logged_events = {_without_clock(line) for line in lines if b'"event"' in line}
        self._log = (folder / "log.jsonl").open("ab")
        self._next_report = 0.0

    def log(self, record: Record) -> None:
        """Numbers of a step or an epoch. They are on disk when it returns."""
        assert "event" not in record and not self._log.closed
        self._write(record)
        if time.monotonic() > self._next_report:
            self._next_report = time.monotonic() + 2
            self._wandb.report()

    def offset(self) -> int:
        """Bytes of the log so far, for the checkpoint: a resumed run repeats no line."""
        return self._log.tell()

    def image(self, name: str, file: Path) -> None:
        self._event("image", name, file)

    def table(
        self, name: str, frame: pd.DataFrame, images: Sequence[Path | NDArray[Any]] | None = None
    ) -> None:
        """A small table, with one image per row if given. It is stored in the run as media/<name>.json."""
        file = self.folder / "media" / f"{name}.json"
        thumbnails = [
            _thumbnail(image, file.with_suffix("") / f"{i:03d}.png") for i, image in enumerate(images or [])
        ]
        assert not thumbnails or len(thumbnails) == len(frame)
        rows = [list(row) for row in frame.itertuples(index=False, name=None)]
        content = {"columns": [str(column) for column in frame.columns], "rows": rows, "images": thumbnails}
        artifacts.write_text(file, json.dumps(_valid(content, "", {}), ensure_ascii=False))
        self._event("table", name, file)

    def artifact(self, path: Path, name: str, type: str) -> None:
        """A finished file. W&B refers to it without a copy, so it must not change any more."""
        self._event("artifact", name, path, type=type)

    def summary(self, values: Record) -> None:
        self._event("summary", "", None, values=dict(values))

    def finish(self, status: str = "finished") -> None:
        """Ends the run (finished, failed, killed) and waits for W&B, but not long. Call it before the
        manifest entry of the last file: a run that is killed between the two is then sent twice instead of
        never."""
        if self._log.closed:
            return
        self._event("finish", status, None)
        self._log.close()
        self._wandb.wait()
        self._wandb.report()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.finish("finished" if kind is None else "killed" if stopped else "failed")

    def _event(self, event: str, name: str, file: Path | None, **more: Any) -> None:
        record = {"event": event, "name": name, **more}
        if file is not None:
            relative = os.path.relpath(file.resolve(), self.folder.resolve())
            record |= {"file": relative, "sha256": artifacts.sha256(file)}
        # A resumed run logs its images again; those that are in the log already are left out.
        line = json.dumps(_valid(record, "", {}), ensure_ascii=False).encode()
        if _without_clock(line) not in self._logged_events:
            self._write(record)

    def _write(self, record: Record) -> None:
        nonfinite: dict[str, str] = {}
        line = {str(key): _valid(value, str(key), nonfinite) for key, value in record.items()}
        if nonfinite:
            line["nonfinite"] = nonfinite
        line.setdefault("clock", round(time.time(), 3))
        try:
            self._log.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            self._log.flush()
        except OSError as error:
            where, what = f"{paths.relative(self.folder)}/log.jsonl", f"cannot be written ({error.strerror})"
            raise UserError("file-unwritable", where=where, what=what) from error


def read(log: Path) -> list[dict[str, Any]]:
    """The complete lines of a log, with nan and inf instead of null."""
    return [parse(line) for line in log.read_bytes().split(b"\n")[:-1]]


def parse(line: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(line)
    for key, value in record.pop("nonfinite", {}).items():
        outer, _, inner = key.partition(".")  # the values of a summary are nested
        if key in record:
            record[key] = float(value)
        elif isinstance(record.get(outer), dict) and inner in record[outer]:
            record[outer][inner] = float(value)
    return record


def finished(folder: Path) -> bool:
    """Whether the log in this folder is complete, its end included."""
    log = folder / "log.jsonl"
    last = read(log)[-1:] if log.exists() else []
    return bool(last) and last[0].get("event") == "finish" and last[0]["name"] == "finished"


def _truncate(log: Path, offset: int) -> list[bytes]:
    """Removes what was logged after the checkpoint, and an incomplete last line. Returns the remaining
    lines."""
    with log.open("a+b") as file:
        file.seek(0)
        content = file.read(offset)
        content = content[: content.rfind(b"\n") + 1]
        file.truncate(len(content))
    return content.splitlines()


def _without_clock(line: bytes) -> str:
    record = json.loads(line)
    record.pop("clock", None)
    return json.dumps(record, sort_keys=True)


def _valid(value: Any, key: str, nonfinite: dict[str, str]) -> Any:
    """Anything that a metric may return, as valid JSON; numpy and torch values become numbers. Adds to
    `nonfinite`."""
    if isinstance(value, Mapping):
        return {str(k): _valid(v, f"{key}.{k}", nonfinite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(v, f"{key}.{i}", nonfinite) for i, v in enumerate(value)]
    if hasattr(value, "tolist"):
        return _valid(value.tolist(), key, nonfinite)
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[key] = str(value)
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _thumbnail(image: Path | NDArray[Any], file: Path) -> str | None:
    """The image, small; None if its file is unreadable, which training has logged already."""
    from PIL import Image

    try:
        small = Image.open(image) if isinstance(image, Path) else Image.fromarray(image)
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        with artifacts.atomic(file) as temporary:
            small.convert("RGB").save(temporary, "png")
    except (OSError, ValueError, TypeError, SyntaxError):  # what PIL raises for damaged files
        return None
    return str(Path(file.parent.name) / file.name)


class NoWandb:
    """track.mode: none. The same methods, which do nothing."""

    def start(self, attempt: int = 1) -> None:
        pass

    def report(self) -> None:
        pass

    def wait(self) -> None:
        pass


class WandbProcess:
    """The process of wandb_worker.py, as the training process sees it. They share a folder:

    wandb/feed/<run id>/job.json    what to send, and how; a new token makes an older process of this run end
                        state.json  of the worker: its mode, the offline folder, a note for the terminal
                        output.txt  its stdout and stderr
    """

    _waited = 0.0  # seconds, by all runs of this process for a server
    _online_failed = False  # then later runs of this process start offline
    _uploading: list[subprocess.Popen[bytes]] = []  # not waited for any longer

    def __init__(self, job: dict[str, Any]):
        if WandbProcess._online_failed:
            job["mode"] = "offline"
        self._folder = paths.path("wandb", "feed", re.sub(r"[^\w.-]", "_", job["run"]["id"]))
        self._state = self._folder / "state.json"
        self._printed: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._folder.mkdir(parents=True, exist_ok=True)
        self._state.unlink(missing_ok=True)
        artifacts.write_json(self._folder / "job.json", job)
        self._online = job["mode"] == "online"

    def start(self, attempt: int = 1) -> None:
        # The package's parent folder, since a run may be started from any folder.
        # WANDB_SERVICE would share the service of another run.
        environment = {
            k: v for k, v in os.environ.items() if k not in ("WANDB_SERVICE", "WANDB_RUN_ID", "WANDB_RESUME")
        }
        package = str(Path(__file__).resolve().parents[3])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        with (self._folder / "output.txt").open("wb" if attempt == 1 else "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "comp.engine.run.wandb_worker", str(self._folder), str(attempt)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=paths.root(),
                start_new_session=True,  # Ctrl+C reaches the training process alone, which logs its end
            )

    def report(self) -> None:
        """Prints a problem of the worker, once."""
        state = artifacts.read_json(self._state) if self._state.exists() else {}
        note = state.get("note")
        if self._process and self._process.poll() and not note:
            output = paths.relative(self._folder / "output.txt")
            note = f"its process died, see {output}; log.jsonl is complete"
            if not self._printed:  # most likely killed for lack of memory
                note += ", and is sent again offline"
                self.start(attempt=2)
        WandbProcess._online_failed |= self._online and state.get("mode") == "offline"
        if note and note != self._printed:
            self._printed = note
            print(f"W&B: {note}", file=sys.stderr, flush=True)

    def wait(self) -> None:
        assert self._process is not None
        started = time.monotonic()
        try:
            self._process.wait(max(0.0, WAIT_ONLINE - WandbProcess._waited) if self._online else WAIT_OFFLINE)
        except subprocess.TimeoutExpired:
            WandbProcess._uploading.append(self._process)
            print(
                "W&B: upload continues in the background; log.jsonl is complete", file=sys.stderr, flush=True
            )
        if self._online:
            WandbProcess._waited += time.monotonic() - started
