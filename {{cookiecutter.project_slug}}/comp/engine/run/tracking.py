"""What a run says about itself: log.jsonl always, W&B beside it.

log.jsonl is the record: one JSON object a line, with the file before anything else sees it. W&B is fed from that file
and from nothing else, by a process of its own (feeder.py). So no server, key, or crash of W&B reaches the training process,
nothing that W&B captures (arguments, output) is ours, and a run that was killed is told again from its kept lines.

A line with `epoch` is an epoch, any other with `step` a training step, one with `event` a picture, table, file,
summary or the end. Every line carries `clock`, the time it was written. NaN and infinity, which JSON lacks, are null and
named under `nonfinite`.
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

from comp.engine.errors import Refused
from comp.engine.run import provenance
from comp.engine.store import artifacts, paths, process

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from comp.engine.config.schema import Track as Settings

PATIENCE = 9.0  # seconds that one process may wait for a server in all, however many runs it tracks
DRAIN = 30.0  # seconds to wait for an offline part, where only this machine is slow: 0.3 s as a rule
ANSWER = 4.0  # seconds a server has to take the run, before it is kept offline
UPLOAD = 600.0  # seconds a feeder may go on uploading after its run has ended; nobody waits for it
THUMBNAIL = 256  # px, longer side of a picture in a table

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
    """`resume_at` is the offset() kept with the checkpoint the run goes on from; None begins the log anew."""
    folder.mkdir(parents=True, exist_ok=True)
    code, diff = provenance.code(paths.root())
    artifacts.write_text(folder / "code.diff", diff)
    made_by = {"code": code, "hardware": provenance.hardware(), "command": " ".join(sys.argv)}
    feed: WandbProcess | NoWandb = NoWandb()
    if settings.mode != "none":
        order = {
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
            "answer_seconds": ANSWER,
            "upload_seconds": UPLOAD,
        }
        feed = WandbProcess(order, folder)
    kept = _cut(
        folder / "log.jsonl", resume_at or 0
    )  # after the order: an older feeder stops when it sees a new one
    feed.start()
    return RunLogger(folder, feed, kept)


def open_summary_log(
    experiment: str, birth: str, *, config: Mapping[str, Any], settings: Settings
) -> RunLogger:
    """The run that speaks for all folds: CV mean and deviation, the merged OOF, what the folds have in common."""
    folder = paths.run_folder(experiment)
    run_id = f"{experiment}-{birth}-summary"
    return open_log(
        folder,
        run_id=run_id,
        name=experiment,
        group=experiment,
        job_type="summary",
        config=config,
        settings=settings,
    )


class RunLogger:
    def __init__(self, folder: Path, feed: WandbProcess | NoWandb, kept: list[bytes]):
        self.folder = folder
        self._feed = feed
        self._told = {_without_clock(line) for line in kept if b'"event"' in line}
        self._log = (folder / "log.jsonl").open("ab")
        self._next_look = 0.0

    def log(self, record: Record) -> None:
        """Numbers of a step or an epoch. On disk when it returns."""
        assert "event" not in record and not self._log.closed
        self._write(record)
        if time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + 2
            self._feed.report()

    def offset(self) -> int:
        """Where the log ends now: what a checkpoint keeps, so that a resumed run repeats no line."""
        return self._log.tell()

    def sheet(self, name: str, picture: Path) -> None:
        self._event("image", name, picture)

    def table(
        self, name: str, frame: pd.DataFrame, images: Sequence[Path | NDArray[Any]] | None = None
    ) -> None:
        """A small table for people, with one picture a row if given. It also stays in the run as media/<name>.json."""
        file = self.folder / "media" / f"{name}.json"
        thumbnails = [
            _thumbnail(image, file.with_suffix("") / f"{i:03d}.png") for i, image in enumerate(images or [])
        ]
        assert not thumbnails or len(thumbnails) == len(frame)
        rows = [list(row) for row in frame.itertuples(index=False, name=None)]
        content = {"columns": [str(column) for column in frame.columns], "rows": rows, "pictures": thumbnails}
        artifacts.write_text(file, json.dumps(_valid(content, "", {}), ensure_ascii=False))
        self._event("table", name, file)

    def artifact(self, path: Path, name: str, type: str) -> None:
        """A finished file, kept where it lies: W&B notes it without a copy, so it must not change any more."""
        self._event("artifact", name, path, type=type)

    def summary(self, values: Record) -> None:
        self._event("summary", "", None, values=dict(values))

    def finish(self, status: str = "finished") -> None:
        """Ends the run (finished, failed, killed) and waits for W&B, but never long. Call it before the last seal:
        a run killed between the two is then told once more instead of never."""
        if self._log.closed:
            return
        self._event("finish", status, None)
        self._log.close()
        self._feed.wait()
        self._feed.report()

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
        # A resumed run shows its sheets again; what the kept lines already say is not said twice.
        if _without_clock(json.dumps(_valid(record, "", {}), ensure_ascii=False).encode()) not in self._told:
            self._write(record)

    def _write(self, record: Record) -> None:
        strange: dict[str, str] = {}
        line = {str(key): _valid(value, str(key), strange) for key, value in record.items()}
        if strange:
            line["nonfinite"] = strange
        line.setdefault("clock", round(time.time(), 3))
        try:
            self._log.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            self._log.flush()
        except OSError as error:
            raise Refused(
                f"{paths.relative(self.folder)}/log.jsonl: could not be written ({error.strerror})"
            ) from error


def read(log: Path) -> list[dict[str, Any]]:
    """The lines of a log that are whole, numbers as they were: null turns into nan or inf again."""
    return [parse(line) for line in log.read_bytes().split(b"\n")[:-1]]


def parse(line: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(line)
    for key, value in record.pop("nonfinite", {}).items():
        outer, _, inner = key.partition(".")  # a summary's values lie one level down
        if key in record:
            record[key] = float(value)
        elif isinstance(record.get(outer), dict) and inner in record[outer]:
            record[outer][inner] = float(value)
    return record


def finished(folder: Path) -> bool:
    """Whether the run in this folder has told all, its end included."""
    log = folder / "log.jsonl"
    last = read(log)[-1:] if log.exists() else []
    return bool(last) and last[0].get("event") == "finish" and last[0]["name"] == "finished"


def _cut(log: Path, offset: int) -> list[bytes]:
    """Drop what was logged after the checkpoint, and a torn last line; returns what stays."""
    with log.open("a+b") as file:
        file.seek(0)
        kept = file.read(offset)
        kept = kept[: kept.rfind(b"\n") + 1]
        file.truncate(len(kept))
    return kept.splitlines()


def _without_clock(line: bytes) -> str:
    record = json.loads(line)
    record.pop("clock", None)
    return json.dumps(record, sort_keys=True)


def _valid(value: Any, key: str, strange: dict[str, str]) -> Any:
    """JSON of anything a metric may return; numpy and torch values are numbers. What is not finite is noted."""
    if isinstance(value, Mapping):
        return {str(k): _valid(v, f"{key}.{k}", strange) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(v, f"{key}.{i}", strange) for i, v in enumerate(value)]
    if hasattr(value, "tolist"):
        return _valid(value.tolist(), key, strange)
    if isinstance(value, float) and not math.isfinite(value):
        strange[key] = str(value)
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _thumbnail(image: Path | NDArray[Any], file: Path) -> str | None:
    """The picture, small; None where the file is unreadable, which the log of the training has already said."""
    from PIL import Image

    try:
        picture = Image.open(image) if isinstance(image, Path) else Image.fromarray(image)
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        with artifacts.atomic(file) as temporary:
            picture.convert("RGB").save(temporary, "png")
    except (OSError, ValueError, TypeError, SyntaxError):  # what PIL raises on damage
        return None
    return str(Path(file.parent.name) / file.name)


class NoWandb:
    """W&B is off: the same calls, nothing behind them."""

    def start(self, attempt: int = 1) -> None:
        pass

    def report(self) -> None:
        pass

    def wait(self) -> None:
        pass


class WandbProcess:
    """The feeder process as the run sees it: started, looked at, waited for with patience."""

    _waited = 0.0  # by all runs of this process for a server
    _online_failed = False  # one dead server is enough: later runs of this process start offline
    _left: list[subprocess.Popen[bytes]] = []  # still uploading

    def __init__(self, order: dict[str, Any], folder: Path):
        if WandbProcess._online_failed:
            order["mode"] = "offline"
        self._desk = paths.path("wandb", "feed", re.sub(r"[^\w.-]", "_", order["run"]["id"]))
        self._state = self._desk / "state.json"
        self._said: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._desk.mkdir(parents=True, exist_ok=True)
        self._state.unlink(missing_ok=True)
        artifacts.write_json(self._desk / "order.json", order)
        self._online = order["mode"] == "online"

    def start(self, attempt: int = 1) -> None:
        # The package's parent folder, since a run may be started from anywhere. WANDB_SERVICE would tie us to another's.
        environment = {
            k: v for k, v in os.environ.items() if k not in ("WANDB_SERVICE", "WANDB_RUN_ID", "WANDB_RESUME")
        }
        package = str(Path(__file__).resolve().parents[3])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        with (self._desk / "output.txt").open("wb" if attempt == 1 else "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "comp.engine.run.wandb_worker", str(self._desk), str(attempt)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=paths.root(),
                start_new_session=True,  # Ctrl+C is for the run, which then says how it ended
            )

    def report(self) -> None:
        """One line when something went wrong, once."""
        state = artifacts.read_json(self._state) if self._state.exists() else {}
        note = state.get("note")
        if self._process and self._process.poll() and not note:
            note = f"its feeder died, {paths.relative(self._desk / 'output.txt')} may say why; log.jsonl is complete"
            if not self._said:  # killed for memory, most likely: it tells everything once more, offline
                note += ", told once more offline"
                self.start(attempt=2)
        WandbProcess._online_failed |= self._online and state.get("mode") == "offline"
        if note and note != self._said:
            self._said = note
            print(f"W&B: {note}", file=sys.stderr, flush=True)

    def wait(self) -> None:
        assert self._process is not None
        began = time.monotonic()
        try:
            self._process.wait(max(0.0, PATIENCE - WandbProcess._waited) if self._online else DRAIN)
        except subprocess.TimeoutExpired:
            WandbProcess._left.append(self._process)
            print(
                "W&B: still at it, and goes on without us; log.jsonl is complete", file=sys.stderr, flush=True
            )
        if self._online:
            WandbProcess._waited += time.monotonic() - began
