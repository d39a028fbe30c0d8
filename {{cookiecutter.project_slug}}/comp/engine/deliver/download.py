"""comp download: the competition's files into data/raw, once. Everything happens in a folder beside it, which takes its place
when it is complete; from then on nobody writes there."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from comp.engine import notebook
from comp.engine.config.schema import Config
from comp.engine.deliver import kaggle
from comp.engine.errors import Refused
from comp.engine.readers import unpack
from comp.engine.store import artifacts, locks, paths

CEILING = 100  # GB unpacked, before anybody is asked


def download(cfg: Config, ceiling: int | None = None) -> None:
    slug, raw = cfg.competition.slug, paths.path(cfg.competition.raw)
    if raw.exists() and any(raw.iterdir()):
        print(f"{paths.relative(raw)}: is there, and is never changed; to get it anew, move it away first")
        print("next: comp prepare")
        return
    if (there := notebook.input_folder(slug)) is not None:
        if raw.is_symlink():
            raw.unlink()  # of a session before, to what is not there any more
        elif raw.exists():
            raw.rmdir()  # empty, as looked up above
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.symlink_to(there)
        print(
            f"written: {paths.relative(raw)}, a link to {there}: this notebook has the files, nothing was fetched"
        )
        print("next: configs/competition.yaml says what they are, then comp prepare")
        return
    folder = paths.path("data", ".download")
    with locks.lock(folder, f"downloading {slug}"):
        archive = _fetched(slug, folder, cfg.machine.progress)
        beside = folder / "unpacked"
        limit = (ceiling or CEILING) * 10**9
        try:
            size = _unpacked(archive, beside, limit, cfg.machine.progress)
        except unpack.DamagedArchive as damage:
            print(f"{damage}; fetched once more", flush=True)
            _forget(archive)
            archive = _fetched(slug, folder, cfg.machine.progress)
            try:
                size = _unpacked(archive, beside, limit, cfg.machine.progress)
            except unpack.DamagedArchive as again:
                _forget(archive)
                raise Refused(
                    f"{again}, twice; the host's file may be broken: {kaggle.SITE}/competitions/{slug}/data"
                ) from None
        raw.parent.mkdir(parents=True, exist_ok=True)
        if raw.exists():
            raw.rmdir()  # empty, as looked up above
        os.replace(beside, raw)
        _forget(archive)
    count = sum(1 for file in raw.rglob("*") if file.is_file())
    print(f"written: {paths.relative(raw)}, {count:,} files, {artifacts.format_size(size)}")
    print("next: configs/competition.yaml says what they are, then comp prepare")


def _fetched(slug: str, folder: Path, progress: bool) -> Path:
    archive = kaggle.download(slug, folder, progress and sys.stderr.isatty())
    if unpack.archive_type(archive) is None:
        raise Refused(
            f"{paths.relative(archive)}: is no archive that comp knows; unpack it into data/raw by hand"
        )
    return archive


def _unpacked(archive: Path, folder: Path, ceiling: int, progress: bool) -> int:
    if folder.exists():
        shutil.rmtree(folder)  # of a killed call
    return unpack.unpack(archive, folder, ceiling, _ask, progress)


def _ask(size: int) -> bool:
    if not sys.stdin.isatty():
        return False
    return input(f"unpacked it is {artifacts.format_size(size)}; go on? [y/N] ").strip().lower() in (
        "y",
        "yes",
    )


def _forget(archive: Path) -> None:
    for file in archive.parent.glob(f"{archive.name}*"):
        file.unlink()
