"""comp clean: what lies on the disk, and what of it can go. Nothing goes that was not named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from comp.engine import text_table
from comp.engine.errors import Refused
from comp.engine.store import artifacts, locks, paths

WORKED_IN = ("runs", "ensembles", "studies", "submissions", "kernels", "data", "wandb", "configs")
HALF = (".making", ".rehearsal")  # folders of a killed comp kernel, which its next call would clear as well
WEIGHTS, STATES = "weights.safetensors", ("state-*.pt", "epoch-*.safetensors")


def clean(trash: bool = False, cache: bool = False, state: bool = False, steal_lock: bool = False) -> None:
    if steal_lock and not (trash or cache or state):
        raise Refused("--steal-lock has no effect without --trash, --cache or --state")
    if (trash or cache or state) and (busy := _busy()):
        raise Refused(f"{busy}; what it works with is not cleaned away under it")
    freed = 0
    if state:
        freed += sum(_drop_state(file) for file in list(_finished_states()))
    if cache:
        freed += _empty(paths.path("data", "cache"))
    if trash:
        freed += _empty(paths.path("runs", ".trash"))
        freed += sum(_drop(file) for file in list(_parts()) if locks.is_orphan(file, steal_lock))
        for folder in list(_half_made()):
            freed += _empty(folder)
            folder.rmdir()
    _show()
    if trash or cache or state:
        print(f"freed {artifacts.format_size(freed)}")


def _show() -> None:
    runs = [
        each
        for each in sorted(paths.path("runs").glob("*"))
        if each.is_dir() and not each.name.startswith(".")
    ]
    states = {file: file.stat().st_size for file in _finished_states()}
    parts = list(_parts())
    dead = [file for file in parts if locks.is_orphan(file)]
    unseen = [file for file in parts if file not in dead and locks.is_orphan(file, include_unknown=True)]
    lines = [(paths.relative(each), size(each), "") for each in runs]
    lines += [
        (name, size(paths.path(name)), "")
        for name in ("ensembles", "studies", "submissions", "kernels", "wandb", "data/raw")
    ]
    lines += [
        ("optimizer states of finished folds", sum(states.values()), "--state"),
        ("data/cache, made again when missing", size(paths.path("data", "cache")), "--cache"),
        ("runs/.trash, replaced runs", size(paths.path("runs", ".trash")), "--trash"),
        (
            "files that killed processes left half-written",
            sum(map(size, _half_made())) + sum(map(_size, dead)),
            "--trash",
        ),
        (
            f"the same of other hosts and containers, unchanged for {locks.STALE_AFTER / 60:.0f} min",
            sum(map(_size, unseen)),
            "--trash --steal-lock",
        ),
    ]
    rows = [[what, artifacts.format_size(bytes_), how] for what, bytes_, how in lines if bytes_ or how]
    print(text_table.render(["what", "size", "goes with"], rows, ["size"]))
    print(f"{artifacts.format_size(shutil.disk_usage(paths.root()).free)} free")
    flags = dict.fromkeys(flag for _, bytes_, how in lines if bytes_ for flag in how.split())
    if flags:
        print(f"next: comp clean {' '.join(flags)}")


def size(folder: Path) -> int:
    """Links are not followed: what they lead to is not ours to count or to delete."""
    total = 0
    for here, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(here, name)).st_size
            except FileNotFoundError:  # a run at work renames its files while we look
                continue
    return total


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except FileNotFoundError:  # of a process on another host, which has just finished it
        return 0


def _finished_states() -> Iterator[Path]:
    for fold in paths.path("runs").glob("*/seed*/fold*"):
        if artifacts.manifest_entry(fold / WEIGHTS):
            for pattern in STATES:
                yield from fold.glob(pattern)


def _parts() -> Iterator[Path]:
    for name in WORKED_IN:
        yield from paths.path(name).rglob(".*.part")


def _half_made() -> Iterator[Path]:
    for made in paths.path("kernels").glob("*"):
        if not locks.owner(made):
            yield from (made / name for name in HALF if (made / name).is_dir())


def _busy() -> str:
    held_files = (lock for name in WORKED_IN for lock in paths.path(name).rglob(".lock"))
    return next((held for lock in held_files if (held := locks.owner(lock.parent))), "")


def _drop_state(file: Path) -> int:
    freed = _drop(file)
    artifacts.remove_from_manifest(file)
    return freed


def _drop(file: Path) -> int:
    freed = file.lstat().st_size
    file.unlink()
    return freed


def _empty(folder: Path) -> int:
    """The folder itself stays: it may be a link to a larger disk."""
    freed = size(folder)
    for each in folder.iterdir() if folder.is_dir() else ():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()
    return freed
