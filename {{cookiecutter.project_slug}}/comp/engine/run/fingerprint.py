"""A name stands for one resolved config, one samples table, one set of folds, one competition.py and the same
image files.

What continues a run must agree with what started it: otherwise rows could be scored by a model that was
trained on them. runs/<name>/ holds config.yaml, inputs.json (hashes of the inputs) and started.json (time of
the start, command that resumes it).
"""

from __future__ import annotations

import hashlib
import inspect
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comp.engine import pages
from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.errors import UserError, joined
from comp.engine.run import teachers
from comp.engine.store import artifacts, locks, paths

if TYPE_CHECKING:
    from comp.engine.data import cache

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
LISTED = 5  # files that an error names
HOOKS = (
    "load_image",
    "model",
    "loss",
    "recipe",
)  # those that change weights; the others only read predictions


# --- the name -------------------------------------------------------------------------------------


def validate_name(name: str) -> None:
    if not NAME.fullmatch(name):
        what = "a name consists of letters, digits, _, - and ."
        raise UserError("name-invalid", where=f"--as {name!r}", what=what)
    if paths.ensemble_folder(name).exists() or paths.path("configs", "ensembles", f"{name}.yaml").exists():
        what = "is the name of an ensemble, and predictions are addressed by name"
        raise UserError("name-taken", where=name, what=what, remedy="use another name for the run")


def run_id(name: str) -> str:
    """Differs from that of an earlier run of the same name, for services that never forget an id."""
    file = paths.run_folder(name) / "started.json"
    return artifacts.digest(artifacts.read_json(file)["at"])[:6] if file.exists() else ""


def resume_command(name: str) -> str:
    """`comp train exp001 --as trial optim.lr=1e-4`"""
    file = paths.run_folder(name) / "started.json"
    return str(artifacts.read_json(file)["command"]) if file.exists() else f"comp train {name}"


# --- starting and resuming ------------------------------------------------------------------------


def claim(name: str, cfg: Config, folds: Folds, command: str, replaced: Sequence[Path] = ()) -> None:
    """Starts or resumes runs/<name>. `command`: resumes it. `replaced`: folders to move to the trash, after
    the last check."""
    from comp.engine.data import image_files

    folder = paths.run_folder(name)
    _validate_unlocked(replaced)
    if replaced and _remains(folder, replaced):
        _validate_same_run(name, cfg, folds, command)
    for old in replaced:
        if old.exists():
            print(f"{paths.relative(old)} was moved to {paths.relative(artifacts.move_to_trash(old))}")
    with locks.lock(folder, "starting", wait=True):
        # Without a finished file there is nothing to disagree with, even if a kill left half a start behind.
        resumed = next(_finished_files(folder), None) is not None
        images = _validate_same_run(name, cfg, folds, command) if resumed else ""
        _record_start(folder, command, new=not resumed and not _is_same_start(folder, cfg, folds))
        file = folder / "config.yaml"
        if resumed and resolve.from_yaml(artifacts.verified(file)) == cfg:
            return
        artifacts.write_text(file, resolve.to_yaml(cfg))
        inputs = input_hashes(cfg, folds) | {"images": images or image_files.record(cfg)}
        artifacts.write_json(folder / "inputs.json", inputs)
        artifacts.add_to_manifest(file, folder / "inputs.json")


def _finished_files(folder: Path) -> Iterator[Path]:
    """What was made under the config of a run: states and weights of folds, and members."""
    yield from folder.glob("seed*/fold*/manifest.json")
    yield from folder.glob("members/*/manifest.json")


def _remains(folder: Path, replaced: Sequence[Path]) -> bool:
    """Whether anything finished is left once `replaced` is in the trash."""
    return any(not any(file.is_relative_to(old) for old in replaced) for file in _finished_files(folder))


def _is_same_start(folder: Path, cfg: Config, folds: Folds) -> bool:
    """Whether a start that finished nothing, and that a kill may have interrupted, had the same inputs."""
    files = folder / "config.yaml", folder / "inputs.json"
    return (
        all(map(artifacts.manifest_entry, files))
        and not resolve.diff(resolve.from_yaml(artifacts.verified(files[0])), cfg)
        and input_hashes(cfg, folds).items() <= artifacts.read_json(artifacts.verified(files[1])).items()
    )


def _record_start(folder: Path, command: str, new: bool) -> None:
    file = folder / "started.json"
    record = {"at": time.time_ns(), "command": command}
    if file.exists() and not new:
        record["at"] = artifacts.read_json(file)["at"]
        if artifacts.read_json(file) == record:
            return
    artifacts.write_json(file, record)


def _validate_unlocked(folders: Sequence[Path]) -> None:
    for lock in (lock for folder in folders for lock in folder.rglob(".lock")):
        if owner := locks.owner(lock.parent):
            raise UserError("locked", what=owner, remedy="stop it first")


# --- the same inputs ------------------------------------------------------------------------------


def input_hashes(cfg: Config, folds: Folds) -> dict[str, Any]:
    pseudo = (
        None
        if cfg.data.pseudo_labels is None
        else artifacts.manifest_entry(paths.pseudo_file(cfg.data.pseudo_labels))
    )
    return {
        "samples": folds.samples.hash,
        "folds": folds.hash,
        "competition.py": {hook: _source_hash(hook) for hook in HOOKS if pages.get(hook) is not None},
        "pseudo": pseudo and pseudo["sha256"],
        "teacher": {} if cfg.distill.teacher is None else _teacher_ids(cfg.distill.teacher, folds),
    }


def _teacher_ids(teacher: str, folds: Folds) -> dict[str, str]:
    """A run that was started again under its old name is another teacher."""
    return {each.run: run_id(each.run) for each in teachers.load(teacher, folds, "distill.teacher").teachers}


def _source_hash(hook: str) -> str:
    """Of the whole module, since a hook may call anything in it."""
    function = pages.get(hook)
    assert function is not None
    file = inspect.getsourcefile(function)
    return hashlib.sha256(Path(file).read_bytes() if file and Path(file).exists() else b"").hexdigest()[:16]


def _remedy(name: str, command: str) -> str:
    again = command if command.startswith("comp train ") else f"comp train {name}"
    return f"use another name with --as NAME, or move the old run to the trash: {again} --fresh"


def _validate_same_run(name: str, cfg: Config, folds: Folds, command: str) -> str:
    """Against config and hashes of the start. Returns the record of the images, which validate_images
    compares."""
    folder, remedy = paths.run_folder(name), _remedy(name, command)
    old = resolve.from_yaml(artifacts.verified(folder / "config.yaml", remedy))
    if changed := resolve.diff(old, cfg):
        last = [*changed][-1]
        raise joined(
            [
                UserError(
                    "run-differs",
                    where=f"runs/{name}",
                    key=key,
                    what=f"was trained with {then!r}, now {now!r}",
                    remedy=remedy if key == last else "",
                )
                for key, (then, now) in changed.items()
            ]
        )
    old_hashes = artifacts.read_json(artifacts.verified(folder / "inputs.json", remedy))
    hashes = input_hashes(cfg, folds)
    inputs = {
        "samples": "another data/samples.parquet",
        "folds": "other folds",
        "competition.py": "another comp/competition.py",
        "teacher": f"another {cfg.distill.teacher}",
        "pseudo": f"another data/pseudo/{cfg.data.pseudo_labels}.parquet",
    }
    if differing := [what for key, what in inputs.items() if old_hashes.get(key) != hashes[key]]:
        what = f"was trained with {', '.join(differing)}, so its scores are not comparable"
        raise UserError("run-differs", where=f"runs/{name}", what=what, remedy=remedy)
    return str(old_hashes["images"])


def validate_images(name: str, cfg: Config, replaced: Sequence[Path] = (), read: bool = True) -> None:
    """Refuses to resume a run whose image files have changed. Costs a stat per file. `read`: they will be
    read, so a missing file is an error as well."""
    from comp.engine.data import image_files

    folder = paths.run_folder(name)
    if not _remains(folder, replaced):
        return
    remedy = _remedy(name, resume_command(name))
    started_with = artifacts.read_json(artifacts.verified(folder / "inputs.json", remedy))["images"]
    now = image_files.compare(cfg, started_with)
    where = f"runs/{name}"
    errors = []
    if now.changed:
        what = f"{len(now.changed)} of its {now.files} image files have changed since it was started: "
        errors.append(
            UserError(
                "images-differ",
                where=where,
                what=what + _listed(now.changed),
                remedy=f"restore the old files, or {remedy}",
            )
        )
    if now.missing and read:
        what = f"{len(now.missing)} of its {now.files} image files are missing: {_listed(now.missing)}"
        errors.append(UserError("images-missing", where=where, what=what, remedy="restore them"))
    if errors:
        raise joined(errors)
    if now.missing:
        missing = f"{len(now.missing)} image files are missing, like {now.missing[0]}"
        print(f"note: runs/{name}: {missing}; they are not compared")
    for count, what in (
        (now.mtime_only, "bytes"),
        (now.size_only, "size, and no image cache has hashed them"),
    ):
        if count:
            touched = f"{count} image files have another mtime and the same {what}"
            print(f"note: runs/{name}: {touched}; it is resumed")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", …" if len(names) > LISTED else "")


def validate_uncached_images(name: str, cfg: Config, images: cache.Images) -> None:
    """Before each fold. Images in the cache cannot change while a process has it open, files can."""
    from comp.engine.data import cache

    if isinstance(images, cache.UncachedImages):
        validate_images(name, cfg)
