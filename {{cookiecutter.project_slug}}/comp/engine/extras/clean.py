"""comp clean: what uses disk space, and deleting it. Nothing is deleted without a flag that names it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from comp.engine import text_table
from comp.engine.errors import UserError
from comp.engine.store import artifacts, locks, paths

FOLDERS = ("runs", "ensembles", "studies", "submissions", "kernels", "data", "wandb", "configs")
KERNEL_LEFTOVERS = (".making", ".rehearsal")  # of a killed comp kernel; its next call deletes them as well
WEIGHTS, STATES = "weights.safetensors", ("state-*.pt", "epoch-*.safetensors")


def clean(trash: bool = False, cache: bool = False, state: bool = False, steal_lock: bool = False) -> None:
    """`trash`: replaced runs and files of killed processes. `cache`: decoded images. `state`: optimizer
    states of finished folds. `steal_lock`: also files of processes on other hosts that are old enough."""
    deletes = trash or cache or state
    if steal_lock and not deletes:
        raise UserError(
            "option-unused",
            where="--steal-lock",
            what="has no effect without --trash, --cache or --state",
        )
    if deletes and (job := _running_job()):
        raise UserError("project-busy", where="comp clean", what=f"{job}; nothing was deleted")
    freed = 0
    if state:
        freed += sum(_delete_state(file) for file in list(_finished_states()))
    if cache:
        freed += _empty(paths.path("data", "cache"))
    if trash:
        freed += _empty(paths.path("runs", ".trash"))
        freed += sum(_delete(file) for file in list(_partial_files()) if locks.is_orphan(file, steal_lock))
        for folder in list(_kernel_leftovers()):
            freed += _empty(folder)
            folder.rmdir()
    _print_usage()
    if deletes:
        print(f"freed {artifacts.format_size(freed)}")


def _print_usage() -> None:
    runs = [
        folder
        for folder in sorted(paths.path("runs").glob("*"))
        if folder.is_dir() and not folder.name.startswith(".")
    ]
    states = {file: file.stat().st_size for file in _finished_states()}
    partial = list(_partial_files())
    dead = [file for file in partial if locks.is_orphan(file)]
    unknown = [file for file in partial if file not in dead and locks.is_orphan(file, include_unknown=True)]
    lines = [(paths.relative(folder), size(folder), "") for folder in runs]
    lines += [
        (name, size(paths.path(name)), "")
        for name in ("ensembles", "studies", "submissions", "kernels", "wandb", "data/raw")
    ]
    lines += [
        ("optimizer states of finished folds", sum(states.values()), "--state"),
        ("data/cache, made again when needed", size(paths.path("data", "cache")), "--cache"),
        ("runs/.trash, replaced runs", size(paths.path("runs", ".trash")), "--trash"),
        (
            "partial files of killed processes",
            sum(map(size, _kernel_leftovers())) + sum(map(_file_size, dead)),
            "--trash",
        ),
        (
            f"partial files of other hosts and containers, unchanged for {locks.STALE_AFTER / 60:.0f} min",
            sum(map(_file_size, unknown)),
            "--trash --steal-lock",
        ),
    ]
    rows = [[what, artifacts.format_size(used), flags] for what, used, flags in lines if used or flags]
    print(text_table.render(["what", "size", "deleted with"], rows, ["size"]))
    print(f"{artifacts.format_size(shutil.disk_usage(paths.root()).free)} free")
    useful = dict.fromkeys(flag for _, used, flags in lines if used for flag in flags.split())
    if useful:
        print(f"next: comp clean {' '.join(useful)}")


def size(folder: Path) -> int:
    """Links are not followed: their targets are outside the project."""
    total = 0
    for here, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(here, name)).st_size
            except FileNotFoundError:  # a running job may rename its files meanwhile
                continue
    return total


def _file_size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except FileNotFoundError:  # a process on another host has just finished it
        return 0


def _finished_states() -> Iterator[Path]:
    for fold in paths.path("runs").glob("*/seed*/fold*"):
        if artifacts.manifest_entry(fold / WEIGHTS):
            for pattern in STATES:
                yield from fold.glob(pattern)


def _partial_files() -> Iterator[Path]:
    for name in FOLDERS:
        yield from paths.path(name).rglob(".*.part")


def _kernel_leftovers() -> Iterator[Path]:
    for kernel in paths.path("kernels").glob("*"):
        if not locks.owner(kernel):
            yield from (kernel / name for name in KERNEL_LEFTOVERS if (kernel / name).is_dir())


def _running_job() -> str:
    """The owner of any lock of the project; empty for none."""
    files = (lock for name in FOLDERS for lock in paths.path(name).rglob(".lock"))
    return next((owner for lock in files if (owner := locks.owner(lock.parent))), "")


def _delete_state(file: Path) -> int:
    freed = _delete(file)
    artifacts.remove_from_manifest(file)
    return freed


def _delete(file: Path) -> int:
    freed = file.lstat().st_size
    file.unlink()
    return freed


def _empty(folder: Path) -> int:
    """The folder itself stays: it may be a link to a larger disk."""
    freed = size(folder)
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return freed
