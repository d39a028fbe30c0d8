"""The only module that knows where things lie, and how they are written so that a kill at any moment harms nothing.

A file is written under a temporary name, flushed to disk and renamed; then `seal` notes its sha256 in the manifest.json of
its folder. An entry in a manifest means: done, and these bytes. `verified` is the one way to read an artefact back.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from comp.engine import hardware
from comp.engine.errors import Refused
from comp.engine.store import process

MANIFEST = "manifest.json"

LOCK = ".lock"
STEAL = "COMP_STEAL_LOCK"  # --steal-lock, for this process and those that it starts
BEAT = 60.0  # seconds between two heartbeats of a lock
STALE = 600.0  # seconds without one, until --steal-lock takes over what cannot be seen to be dead


@cache
def root() -> Path:
    """The folder that holds configs/base.yaml: COMP_ROOT, or the nearest one upwards from here."""
    named = os.environ.get("COMP_ROOT")
    places = [Path(named)] if named else [Path.cwd(), *Path.cwd().parents]
    for place in places:
        if (place / "configs" / "base.yaml").is_file():
            return place.resolve()
    raise Refused(
        f"{named or Path.cwd()}: not inside a competition project (no configs/base.yaml here or above)"
    )


def path(*parts: str | Path) -> Path:
    return root().joinpath(*parts)


def samples_file() -> Path:
    return path("data", "samples.parquet")


def folds_file() -> Path:
    return path("data", "folds.parquet")


def pseudo_file(name: str) -> Path:
    return path("data", "pseudo", f"{name}.parquet")


def run_folder(experiment: str) -> Path:
    return path("runs", experiment)


def fold_folder(experiment: str, seed: int, fold: int | str) -> Path:
    return path("runs", experiment, f"seed{seed}", f"fold{fold}")


def member_folder(experiment: str, member: str) -> Path:
    return path("runs", experiment, "members", member)


def study_folder(study: str) -> Path:
    return path("studies", study)


def trial_run(study: str, number: int) -> str:
    """Name of the run that a trial is: out of sight of comp runs and the bank until it is exported."""
    return f".studies/{study}/{number:04d}"


def ensemble_folder(name: str) -> Path:
    return path("ensembles", name)


def submission_file(name: str) -> Path:
    return path("submissions", f"{name}.csv")


def shown(file: Path) -> str:
    """A path as a person wants to read it: from the project's root."""
    return str(file.relative_to(root())) if file.is_relative_to(root()) else str(file)


@contextmanager
def writing(file: Path) -> Iterator[Path]:
    """Yields a temporary path beside `file`; what was written there replaces `file` only when it is all on disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{process.me()}.part")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    except OSError as error:
        raise Refused(
            f"{shown(file)}: could not be written ({error.strerror}); what stood there before is untouched"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    with writing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(f"{shown(file)}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Refused(f"{shown(file)}: damaged, it is not JSON any more ({error})") from None


def seal(*files: Path, **facts: Any) -> None:
    """Note in the folder's manifest that these files are finished. Call it last."""
    folder = files[0].parent
    assert all(file.parent == folder for file in files)
    with _guard(folder / f".{MANIFEST}.guard"):
        manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
        manifest |= {f.name: {"sha256": sha256(f), "size": f.stat().st_size, **facts} for f in files}
        write_json(folder / MANIFEST, dict(sorted(manifest.items())))


def unseal(file: Path) -> None:
    """Take a file that is gone out of its folder's manifest."""
    with _guard(file.parent / f".{MANIFEST}.guard"):
        manifest = read_json(file.parent / MANIFEST) if (file.parent / MANIFEST).exists() else {}
        if manifest.pop(file.name, None):
            write_json(file.parent / MANIFEST, manifest)


def sealed(file: Path) -> dict[str, Any] | None:
    """The manifest entry of a file, None while it is unfinished or absent. Does not look at the bytes."""
    if not file.exists() or not (file.parent / MANIFEST).exists():
        return None
    entry = read_json(file.parent / MANIFEST).get(file.name)
    return dict(entry) if entry else None


def verified(file: Path, remedy: str = "") -> Path:
    """The path itself, once its bytes are known to be those that were sealed."""
    stamps = stamp(file), stamp(file.parent / MANIFEST)
    if stamps[0] is not None and _trusted.get(file) == stamps:
        return file
    remedy = f"; {remedy}" if remedy else ""
    if stamps[0] is None:
        raise Refused(f"{shown(file)}: no such file{remedy}")
    entry = sealed(file)
    if entry is None:
        raise Refused(f"{shown(file)}: unfinished, {MANIFEST} beside it does not list it{remedy}")
    if entry.get("size") != stamps[0].size or entry.get("sha256") != sha256(file):
        raise Refused(
            f"{shown(file)}: damaged or changed since it was written (sha256 differs from {MANIFEST}){remedy}"
        )
    if all(each is not None and each.settled for each in stamps):
        _trusted[file] = stamps
    return file


class Stamp(NamedTuple):
    """What tells a changed file without reading it. Not to be believed while it is fresh: a file that changes twice
    within a tick of the file system's clock keeps its mtime."""

    inode: int
    size: int
    changed: int  # ns

    @property
    def settled(self) -> bool:
        return time.time_ns() - self.changed > 50_000_000


_noted: dict[Path, tuple[Stamp, str]] = {}
_trusted: dict[Path, tuple[Stamp | None, Stamp | None]] = {}


def stamp(file: Path) -> Stamp | None:
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return None
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)


def sha256(file: Path) -> str:
    """Hashed once a process: an unchanged (inode, size, mtime) is not read again."""
    now = stamp(file)
    if now is not None and file in _noted and _noted[file][0] == now:
        return _noted[file][1]
    believed = now is not None and now.settled
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if believed and now is not None:
        _noted[file] = (now, found)
    return found


def note(files: Iterable[Path]) -> None:
    """Hash many files on all cores, so that reading them one by one finds their hashes noted."""
    new = [file for file in files if file not in _noted]
    with ThreadPoolExecutor(hardware.cores()) as pool:
        list(pool.map(sha256, new))


def digest(value: Any) -> str:
    """A short, stable name for anything that JSON can hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Held(NamedTuple):
    """Another process's lock."""

    said: str
    job: str
    stale: bool  # --steal-lock would take it over


@contextmanager
def lock(folder: Path, doing: str, wait: bool = False, job: str = "") -> Iterator[None]:
    """One writer a folder. A dead owner's lock is taken over; a living one's is waited for, or refused.

    Where an owner cannot be seen to be dead (another host, another container), its lock is taken over only with --steal-lock, and
    only after STALE seconds without a heartbeat: the owner touches the file every BEAT seconds. `job` names a piece of
    work that a queue hands out again when its process has died: an owner with the same job is waited for until it is stale.

    The owner is a process, not flock: loader processes inherit a flock, and would hold it for seconds after their parent was
    killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = False
    text = "\n".join(
        [str(os.getpid()), process.me(), process.host(), time.strftime("%H:%M:%S"), doing, job, ""]
    )
    while held := _take(folder, text, job):
        if held.stale or not (wait or (job and held.job == job)):
            raise Refused(f"{held.said}; wait for it, or end it")
        if not told:
            print(f"{held.said}; waiting for it", flush=True)
            told = True
        time.sleep(0.2)
    ended = threading.Event()
    threading.Thread(target=_beat, args=(folder / LOCK, text, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if _text(folder / LOCK) == text:
            (folder / LOCK).unlink(missing_ok=True)


def _take(folder: Path, text: str, job: str) -> Held | None:
    """None when the lock is ours now, otherwise who holds it."""
    with _guard(folder / f"{LOCK}.guard"):
        if held := _held(folder, job):
            return held
        write_text(folder / LOCK, text)  # whole or not at all: others read it without the guard
    return None


def _beat(file: Path, text: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        try:
            now = _text(file)
            if now == text:
                os.utime(file)
        except OSError:
            continue  # the disk does not answer: no heartbeat, and the next one may get through
        if now != text and not ended.is_set():
            # This process was suspended for so long that another took over. Ended like this it harms nothing.
            print(
                f"{shown(file.parent)}: its lock was taken over; this process ends",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def holder(folder: Path) -> str:
    """Who works in a folder, in words; empty when nobody does."""
    held = _held(folder)
    return held.said if held else ""


def _held(folder: Path, job: str = "") -> Held | None:
    try:
        text, heartbeat = (folder / LOCK).read_text(), (folder / LOCK).stat().st_mtime
    except FileNotFoundError:
        return None
    # A lock torn by a power cut reads as nobody's.
    pid, name, host, since, doing, its, *_ = [*text.split("\n"), "", "", "", "", "", ""]
    state = process.state(name, heartbeat)
    if state == "dead":
        return None
    if state == "alive":
        return Held(f"{shown(folder)}: process {pid} is already {doing} since {since}", its, False)
    age = _now(folder) - heartbeat
    stale = age >= STALE
    if stale and (os.environ.get(STEAL) or (job and its == job)):
        return None
    silent = f"{age / 60:.0f} min" if age >= 120 else f"{max(age, 0):.0f} s"
    way = "if it is dead, the same command with --steal-lock takes over"
    return Held(
        f"{shown(folder)}: process {pid} on host {host} is already {doing} since {since}, last heartbeat {silent} ago; whether it runs "
        f"cannot be seen from here: {way}{'' if stale else f' after {STALE / 60:.0f} min without a heartbeat'}",
        its,
        stale,
    )


def _now(folder: Path) -> float:
    """By the clock of the file system, which also stamps the heartbeats: those of two hosts may be minutes apart."""
    guard = folder / f"{LOCK}.guard"
    try:
        os.utime(guard)
        return guard.stat().st_mtime
    except OSError:  # a disk that may only be read, as for comp runs
        return time.time()


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


@contextmanager
def stealing() -> Iterator[None]:
    """--steal-lock."""
    os.environ[STEAL] = "1"
    try:
        yield
    finally:
        del os.environ[STEAL]


def orphaned(file: Path, steal: bool = False) -> bool:
    """A temporary file of `writing` whose process is dead. With `steal` also that of one which cannot be seen from here, when
    nothing was written to it for STALE seconds."""
    *_, name, end = ("", "", *file.name.split("."))
    if end != "part" or not process.NAME.fullmatch(name):
        return False
    try:
        written = file.stat().st_mtime
    except FileNotFoundError:
        return False
    state = process.state(name, written)
    return state == "dead" or (steal and state == "unknown" and _now(file.parent) - written >= STALE)


def need_space(size: int, what: str) -> None:
    """Refuse before the work rather than die in the middle of it."""
    free = shutil.disk_usage(root()).free
    if free < size + 2**28:
        raise Refused(
            f"{what} will write {readable(size)}, and only {readable(free)} are free; `comp clean` shows what can go"
        )


def readable(size: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def trash(folder: Path) -> Path:
    """Nothing is deleted by a verb that trains: the old run moves to runs/.trash, `comp clean` frees it."""
    bin_ = path("runs", ".trash")
    bin_.mkdir(parents=True, exist_ok=True)
    target = bin_ / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6:06d}"
    os.replace(folder, target)
    return target


@contextmanager
def _guard(file: Path) -> Iterator[None]:
    """Held for the few lines of a check and its write, never across a fork."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
