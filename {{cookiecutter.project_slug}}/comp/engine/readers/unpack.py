"""Archives from elsewhere: files come out of them, below the folder they belong in, and nothing else does.

Every name is checked before the first byte is written, and every byte is counted while it is: an archive may lie about its
sizes. Links, devices and encrypted members are refused, not skipped, since a competition without a file is found out late.
Modes, owners and times of an archive are not taken over.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from comp.engine.errors import Refused
from comp.engine.readers.archives import (
    BROKEN,
    MEMBERS,
    DamagedArchive,
    Member,
    kind,
    open_archive,
    path_parts,
    stem,
)
from comp.engine.store import artifacts, paths

CHUNK = 2**20
DEPTH = 3  # archives inside archives inside archives


def unpack(
    archive: Path, folder: Path, ceiling: int, ask: Callable[[int], bool], progress: bool = False
) -> int:
    """All files of an archive, and of the archives in it, below `folder`; returns their bytes.

    More than `ceiling` bytes are unpacked only when ask(bytes) says so.
    """
    budget = _Budget(ceiling, ask)
    folder.mkdir(parents=True, exist_ok=True)
    _level(archive, folder, budget, progress, depth=1)
    return budget.used


class _Budget:
    def __init__(self, ceiling: int, ask: Callable[[int], bool]):
        self.ceiling, self.ask, self.used = ceiling, ask, 0

    def announce(self, size: int, what: Path) -> None:
        """What an archive says of itself. Lies are caught by spend."""
        if self.used + size > self.ceiling:
            if not self.ask(self.used + size):
                raise Refused(
                    f"{paths.relative(what)}: would unpack to {artifacts.format_size(self.used + size)}, more than the ceiling of "
                    f"{artifacts.format_size(self.ceiling)}; if that is right: comp download --ceiling {-(-2 * (self.used + size) // 10**9)}"
                )
            self.ceiling = 2 * (self.used + size)  # archives in it need not ask one by one
        artifacts.require_space(size, f"unpacking {paths.relative(what)}")

    def spend(self, size: int, what: Path) -> None:
        self.used += size
        if self.used > self.ceiling:
            raise Refused(
                f"{paths.relative(what)}: holds more than it says, and more than the ceiling; it is not to be trusted"
            )


def _level(archive: Path, folder: Path, budget: _Budget, progress: bool, depth: int) -> None:
    if depth > DEPTH:
        raise Refused(
            f"{paths.relative(archive)}: archives are nested more than {DEPTH} deep; unpack it by hand"
        )
    written: list[Path] = []
    with open_archive(archive) as members:
        places = _places(archive, members, folder)
        budget.announce(sum(member.size for member in members), archive)
        bar = tqdm(total=sum(m.size for m in members), desc=f"unpacking {archive.name}", unit="B", unit_scale=True, leave=False, disable=None if progress else True)  # fmt: skip
        with bar:
            for member, place in zip(members, places, strict=True):
                _write(archive, member, place, budget, bar.update)
                written.append(place)
    for inner in [file for file in written if kind(file)]:
        # train.zip with train/1.png in it belongs here; train.zip with 1.png in it belongs into train/.
        _level(inner, _home(inner), budget, progress, depth + 1)
        inner.unlink()


def _home(archive: Path) -> Path:
    if kind(archive) == "gz":
        return archive.parent
    with open_archive(archive) as members:
        tops = {member.name.replace("\\", "/").split("/")[0] for member in members}
        alone = len(members) == 1 and tops == {stem(archive)}
    return archive.parent if alone or tops == {stem(archive)} else archive.parent / stem(archive)


def _write(
    archive: Path, member: Member, place: Path, budget: _Budget, tell: Callable[[int], object]
) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        raise Refused(
            f"{paths.relative(archive)}: {member.name!r} is there already from another archive; unpack by hand"
        )
    written = 0
    with member.open() as source, place.open("xb") as target:
        while True:
            try:
                chunk = source.read(CHUNK)
            except (*BROKEN, OSError) as error:
                raise DamagedArchive(
                    f"{paths.relative(archive)}: {member.name!r} is damaged ({error})"
                ) from None
            if not chunk:
                break
            written += len(chunk)
            budget.spend(len(chunk), archive)
            try:
                target.write(chunk)
            except OSError as error:
                raise Refused(
                    f"{paths.relative(place)}: could not be written ({error.strerror}); the same command begins it anew"
                ) from None
            tell(len(chunk))
    if member.size >= 0 and written != member.size and kind(archive) != "gz":
        raise DamagedArchive(
            f"{paths.relative(archive)}: {member.name!r} has {written} bytes, {member.size} were promised"
        )


# --- names ---------------------------------------------------------------------------------------------------------------


def _places(archive: Path, members: list[Member], folder: Path) -> list[Path]:
    """Where each member goes; nothing is written before all of them have passed."""
    if len(members) > MEMBERS:
        raise Refused(
            f"{paths.relative(archive)}: {len(members)} members; more than {MEMBERS} are not to be trusted"
        )
    files: dict[str, str] = {}
    folders: set[str] = set()
    places = []
    for member in members:
        names = path_parts(archive, member.name)
        same = unicodedata.normalize("NFC", "/".join(names))
        if same in files:
            raise Refused(
                f"{paths.relative(archive)}: holds {member.name!r} twice; one of them would be lost"
            )
        files[same] = member.name
        folders.update(
            "/".join(unicodedata.normalize("NFC", part) for part in names[:i]) for i in range(1, len(names))
        )
        places.append(folder.joinpath(*names))
    if both := sorted(folders & files.keys()):
        raise Refused(f"{paths.relative(archive)}: {both[0]!r} is a file and a folder in it")
    root = folder.resolve()
    for member, place in zip(members, places, strict=True):
        if not place.resolve().is_relative_to(root):  # a link that stood there before
            raise Refused(f"{paths.relative(archive)}: {member.name!r} leads out of {paths.relative(folder)}")
    return places
