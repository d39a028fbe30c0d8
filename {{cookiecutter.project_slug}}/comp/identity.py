"""A name stands for one resolved config, on one table, one set of folds and one competition.py. Whatever goes on under a name
must agree with what began under it; anything else would score rows with a model that has seen them."""

from __future__ import annotations

import hashlib
import inspect
import re
import time
from pathlib import Path
from typing import Any

from comp import config, own, store, teachers
from comp.config import Config, Refused
from comp.folds import Folds

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
HOOKS = ("load_image", "model", "loss", "recipe")  # that move weights; the others only read predictions


def claim(name: str, cfg: Config, folds: Folds, command: str, fresh: list[Path] | None = None) -> None:
    """Begin or go on with runs/<name>. `fresh` are folders to move to the trash first; none of them may be in use."""
    folder = store.run_folder(name)
    for old in fresh or []:
        _away(old)
    with store.lock(folder, "starting", wait=True):
        file = folder / "config.yaml"
        begun = next(folder.glob("seed*/fold*/manifest.json"), None) is not None
        # Without a finished file below there is nothing that could disagree, even if a kill left half a start behind.
        if begun:
            _agree(name, cfg, folds)
            if config.from_yaml(store.verified(file)) == cfg:
                return
        elif not (folder / "birth.json").exists():
            store.write_json(folder / "birth.json", {"at": time.time_ns(), "command": command})
        store.write_text(file, config.to_yaml(cfg))
        store.write_json(folder / "made_of.json", made_of(cfg, folds))
        store.seal(file, folder / "made_of.json")


def refuse_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise Refused(f"--as {name!r}: a name is made of letters, digits, _, - and .")
    if store.ensemble_folder(name).exists() or store.path("configs", "ensembles", f"{name}.yaml").exists():
        raise Refused(
            f"{name}: is the name of an ensemble; a run needs another, or nobody could tell them apart"
        )


def made_of(cfg: Config, folds: Folds) -> dict[str, Any]:
    hooks = {hook: _text(hook) for hook in HOOKS if own.get(hook) is not None}
    labels = None if cfg.data.pseudo is None else store.sealed(store.pseudo_file(cfg.data.pseudo))
    return {
        "samples": folds.samples.hash,
        "folds": folds.hash,
        "competition.py": hooks,
        "pseudo": labels and labels["sha256"],
        "teacher": {} if cfg.distill.teacher is None else _births(cfg.distill.teacher, folds),
    }


def _births(teacher: str, folds: Folds) -> dict[str, str]:
    """A run that was begun anew under its old name is another teacher."""
    return {voice.run: birth(voice.run) for voice in teachers.of(teacher, folds, "distill.teacher").voices}


def birth(name: str) -> str:
    """Tells a run from an earlier one of the same name, for services that never forget an id."""
    file = store.run_folder(name) / "birth.json"
    return str(store.digest(store.read_json(file)))[:6] if file.exists() else ""


def command(name: str) -> str:
    """What began a run, to type again: `comp train exp001 --as trial optim.rate=1e-4`."""
    file = store.run_folder(name) / "birth.json"
    return str(store.read_json(file)["command"]) if file.exists() else f"comp train {name}"


def _agree(name: str, cfg: Config, folds: Folds) -> None:
    folder = store.run_folder(name)
    ways = "either give this one a name with --as NAME, or move the old one to the trash with --fresh"
    old = config.from_yaml(store.verified(folder / "config.yaml", ways))
    if changed := config.difference(old, cfg):
        raise Refused(
            f"runs/{name} was trained with another config; {ways}:",
            *(f"  {key}: {before!r} there, {after!r} here" for key, (before, after) in changed.items()),
        )
    then, now = store.read_json(store.verified(folder / "made_of.json", ways)), made_of(cfg, folds)
    what = {
        "samples": "another data/samples.parquet",
        "folds": "other folds",
        "competition.py": "another comp/competition.py",
        "teacher": f"another {cfg.distill.teacher}",
        "pseudo": f"another data/pseudo/{cfg.data.pseudo}.parquet",
    }
    if differ := [words for key, words in what.items() if then.get(key) != now[key]]:
        raise Refused(
            f"runs/{name} was trained with {', '.join(differ)}: its rows and scores would not compare; {ways}"
        )


def _away(folder: Path) -> None:
    if not folder.exists():
        return
    for lock in folder.rglob(".lock"):
        if who := store.holder(lock.parent):
            raise Refused(f"{who}; end that first")
    print(f"{store.shown(folder)} lies in {store.shown(store.trash(folder))} now")


def _text(hook: str) -> str:
    """The source of the whole module, since a hook may call anything in it."""
    function = own.get(hook)
    assert function is not None
    file = inspect.getsourcefile(function)
    return hashlib.sha256(Path(file).read_bytes() if file and Path(file).exists() else b"").hexdigest()[:16]
