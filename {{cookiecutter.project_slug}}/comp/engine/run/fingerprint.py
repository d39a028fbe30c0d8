"""A name stands for one resolved config, on one table, one set of folds, one competition.py and the same image files. Whatever goes on under a name
must agree with what began under it; anything else would score rows with a model that has seen them."""

from __future__ import annotations

import hashlib
import inspect
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from comp.engine import pages
from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.errors import Refused
from comp.engine.run import teachers
from comp.engine.store import artifacts, locks, paths

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
LISTED = 5  # files that a refusal names
HOOKS = ("load_image", "model", "loss", "recipe")  # that move weights; the others only read predictions


def claim(name: str, cfg: Config, folds: Folds, command: str, fresh: Sequence[Path] = ()) -> None:
    """Begin or go on with runs/<name>. `fresh` are folders to move to the trash first; they move when nothing is refused any more.
    `command` is what to type to go on."""
    from comp.engine.data import image_files

    folder = paths.run_folder(name)
    _refuse_busy(fresh)
    if fresh and _stays(folder, fresh):
        _agree(name, cfg, folds, command)
    for old in fresh:
        if old.exists():
            print(f"{paths.relative(old)} lies in {paths.relative(artifacts.move_to_trash(old))} now")
    with locks.lock(folder, "starting", wait=True):
        # Without a finished file below there is nothing that could disagree, even if a kill left half a start behind.
        begun = next(_finished(folder), None) is not None
        images = ""
        if begun:
            images = _agree(name, cfg, folds, command)
        _note_birth(folder, command, anew=not begun and not _same(folder, cfg, folds))
        file = folder / "config.yaml"
        if begun and resolve.from_yaml(artifacts.verified(file)) == cfg:
            return
        artifacts.write_text(file, resolve.to_yaml(cfg))
        made = input_hashes(cfg, folds) | {"images": images or image_files.record(cfg)}
        artifacts.write_json(folder / "made_of.json", made)
        artifacts.add_to_manifest(file, folder / "made_of.json")


def _finished(folder: Path) -> Iterator[Path]:
    """What was made under the config of a run: states and weights of folds, and members."""
    yield from folder.glob("seed*/fold*/manifest.json")
    yield from folder.glob("members/*/manifest.json")


def _stays(folder: Path, fresh: Sequence[Path]) -> bool:
    """Whether anything finished is left once `fresh` is in the trash."""
    return any(not any(file.is_relative_to(old) for old in fresh) for file in _finished(folder))


def _same(folder: Path, cfg: Config, folds: Folds) -> bool:
    """Whether a start that finished nothing, of which a kill may have left half, was a start of this."""
    files = folder / "config.yaml", folder / "made_of.json"
    return (
        all(map(artifacts.manifest_entry, files))
        and not resolve.diff(resolve.from_yaml(artifacts.verified(files[0])), cfg)
        and input_hashes(cfg, folds).items() <= artifacts.read_json(artifacts.verified(files[1])).items()
    )


def _note_birth(folder: Path, command: str, anew: bool) -> None:
    """When a run began, which tells it from an earlier one of its name, and the last command that went on with it."""
    file = folder / "birth.json"
    born = {"at": time.time_ns(), "command": command}
    if file.exists() and not anew:
        born["at"] = artifacts.read_json(file)["at"]
        if artifacts.read_json(file) == born:
            return
    artifacts.write_json(file, born)


def validate_images(name: str, cfg: Config, fresh: Sequence[Path] = (), read: bool = True) -> None:
    """Refuse to go on with a run whose image files are others now. A stat a file; `read`: they will be read, so none may be missing."""
    from comp.engine.data import image_files

    folder = paths.run_folder(name)
    if not _stays(folder, fresh):
        return
    ways = _ways(name, resume_command(name))
    now = image_files.compare(
        cfg, artifacts.read_json(artifacts.verified(folder / "made_of.json", ways))["images"]
    )
    other = [*now.changed, *(now.missing if read else [])]
    if other:
        like = ", ".join(other[:LISTED]) + (", …" if len(other) > LISTED else "")
        raise Refused(
            f"runs/{name}: {len(other)} of its {now.files} image files are not those that it began with: {like}; old and new would be "
            f"scored as one: put the old files back, or {ways}"
        )
    if now.missing:
        print(
            f"note: {len(now.missing)} image files of runs/{name} are missing, like {now.missing[0]}; they are not compared"
        )
    for count, what in ((now.touched, "bytes"), (now.sized, "size, and no image cache has hashed them")):
        if count:
            print(
                f"note: {count} image files of runs/{name} have another mtime and the same {what}; it goes on"
            )


def validate_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise Refused(f"--as {name!r}: a name is made of letters, digits, _, - and .")
    if paths.ensemble_folder(name).exists() or paths.path("configs", "ensembles", f"{name}.yaml").exists():
        raise Refused(
            f"{name}: is the name of an ensemble; a run needs another, or nobody could tell them apart"
        )


def input_hashes(cfg: Config, folds: Folds) -> dict[str, Any]:
    hooks = {hook: _text(hook) for hook in HOOKS if pages.get(hook) is not None}
    labels = (
        None
        if cfg.data.pseudo_labels is None
        else artifacts.manifest_entry(paths.pseudo_file(cfg.data.pseudo_labels))
    )
    return {
        "samples": folds.samples.hash,
        "folds": folds.hash,
        "competition.py": hooks,
        "pseudo": labels and labels["sha256"],
        "teacher": {} if cfg.distill.teacher is None else _births(cfg.distill.teacher, folds),
    }


def _births(teacher: str, folds: Folds) -> dict[str, str]:
    """A run that was begun anew under its old name is another teacher."""
    return {voice.run: run_id(voice.run) for voice in teachers.load(teacher, folds, "distill.teacher").voices}


def run_id(name: str) -> str:
    """Tells a run from an earlier one of the same name, for services that never forget an id."""
    file = paths.run_folder(name) / "birth.json"
    return artifacts.digest(artifacts.read_json(file)["at"])[:6] if file.exists() else ""


def resume_command(name: str) -> str:
    """What goes on with a run: `comp train exp001 --as trial optim.lr=1e-4`."""
    file = paths.run_folder(name) / "birth.json"
    return str(artifacts.read_json(file)["command"]) if file.exists() else f"comp train {name}"


def _ways(name: str, command: str) -> str:
    whole = command if command.startswith("comp train ") else f"comp train {name}"
    return (
        f"either give this one a name with --as NAME, or move the whole old run to the trash: {whole} --fresh"
    )


def _agree(name: str, cfg: Config, folds: Folds, command: str) -> str:
    """The record of its images, which validate_images compares."""
    folder, ways = paths.run_folder(name), _ways(name, command)
    old = resolve.from_yaml(artifacts.verified(folder / "config.yaml", ways))
    if changed := resolve.diff(old, cfg):
        raise Refused(
            f"runs/{name} was trained with another config; {ways}",
            *(f"  {key}: {before!r} there, {after!r} here" for key, (before, after) in changed.items()),
        )
    then, now = (
        artifacts.read_json(artifacts.verified(folder / "made_of.json", ways)),
        input_hashes(cfg, folds),
    )
    what = {
        "samples": "another data/samples.parquet",
        "folds": "other folds",
        "competition.py": "another comp/competition.py",
        "teacher": f"another {cfg.distill.teacher}",
        "pseudo": f"another data/pseudo/{cfg.data.pseudo_labels}.parquet",
    }
    if differ := [words for key, words in what.items() if then.get(key) != now[key]]:
        raise Refused(
            f"runs/{name} was trained with {', '.join(differ)}: its rows and scores would not compare; {ways}"
        )
    return str(then["images"])


def _refuse_busy(folders: Sequence[Path]) -> None:
    for lock in (lock for folder in folders for lock in folder.rglob(".lock")):
        if who := locks.owner(lock.parent):
            raise Refused(f"{who}; end that first")


def _text(hook: str) -> str:
    """The source of the whole module, since a hook may call anything in it."""
    function = pages.get(hook)
    assert function is not None
    file = inspect.getsourcefile(function)
    return hashlib.sha256(Path(file).read_bytes() if file and Path(file).exists() else b"").hexdigest()[:16]
