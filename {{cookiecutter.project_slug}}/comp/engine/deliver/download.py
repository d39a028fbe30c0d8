"""comp download: the competition's files into data/raw, once. They are downloaded and unpacked in
data/.download, which replaces data/raw when it is complete; after that nothing writes there."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from comp.engine import notebook
from comp.engine.config.schema import Config
from comp.engine.deliver import kaggle
from comp.engine.errors import UserError
from comp.engine.readers import unpack
from comp.engine.store import artifacts, locks, paths

MAX_GB = 100  # unpacked, until a confirmation is required
NEXT = "next: declare what they are in configs/competition.yaml, then comp prepare"


def download(cfg: Config, ceiling: int | None = None) -> None:
    """`ceiling`: gigabytes that may be unpacked without confirmation (default: 100)."""
    slug, raw = cfg.competition.slug, paths.path(cfg.competition.raw)
    if raw.exists() and any(raw.iterdir()):
        print(
            f"{paths.relative(raw)}: exists already and is never changed; "
            "to download again, move it away first"
        )
        print("next: comp prepare")
        return
    if (inputs := notebook.input_folder(slug)) is not None:
        _link(raw, inputs)
        return
    folder = paths.path("data", ".download")
    progress = cfg.machine.progress
    with locks.lock(folder, f"downloading {slug}"):
        archive = _download(slug, folder, progress)
        unpacked = folder / "unpacked"
        limit = (ceiling or MAX_GB) * 10**9
        try:
            size = _unpack(archive, unpacked, limit, progress)
        except unpack.DamagedArchive as error:
            print(f"{error}; downloading once more", flush=True)
            _remove(archive)
            archive = _download(slug, folder, progress)
            try:
                size = _unpack(archive, unpacked, limit, progress)
            except unpack.DamagedArchive as again:
                _remove(archive)
                raise UserError(
                    "archive-damaged",
                    what=f"{again}, after two downloads",
                    remedy=f"the host's file may be broken: {kaggle.SITE}/competitions/{slug}/data",
                ) from None
        raw.parent.mkdir(parents=True, exist_ok=True)
        if raw.exists():
            raw.rmdir()  # empty, see above
        os.replace(unpacked, raw)
        _remove(archive)
    count = sum(1 for file in raw.rglob("*") if file.is_file())
    print(f"written: {paths.relative(raw)}, {count:,} files, {artifacts.format_size(size)}")
    print(NEXT)


def _link(raw: Path, inputs: Path) -> None:
    """On Kaggle: the notebook has the files already."""
    if raw.is_symlink():
        raw.unlink()  # of an earlier session, to a folder that does not exist any more
    elif raw.exists():
        raw.rmdir()  # empty, see download
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.symlink_to(inputs)
    print(
        f"written: {paths.relative(raw)}, a link to {inputs}: "
        "this notebook has the files, nothing was downloaded"
    )
    print(NEXT)


def _download(slug: str, folder: Path, progress: bool) -> Path:
    archive = kaggle.download(slug, folder, progress and sys.stderr.isatty())
    if unpack.archive_type(archive) is None:
        raise UserError(
            "archive-unknown",
            where=paths.relative(archive),
            what="not a known kind of archive",
            remedy="unpack it into data/raw by hand",
        )
    return archive


def _unpack(archive: Path, folder: Path, max_bytes: int, progress: bool) -> int:
    if folder.exists():
        shutil.rmtree(folder)  # of a call that was killed
    return unpack.unpack(archive, folder, max_bytes, _confirmed, progress)


def _confirmed(size: int) -> bool:
    if not sys.stdin.isatty():
        return False
    return input(f"unpacked it has {artifacts.format_size(size)}; continue? [y/N] ").strip().lower() in (
        "y",
        "yes",
    )


def _remove(archive: Path) -> None:
    """The archive and its partial downloads."""
    for file in archive.parent.glob(f"{archive.name}*"):
        file.unlink()
