"""Seconds of inference an image costs, as measured while runs predicted. Notes beside the artefacts, never in their hashes."""

from __future__ import annotations

from pathlib import Path

from comp.engine.bank import bank
from comp.engine.config import run_members
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths

FILE = "speed.json"  # {"test": seconds an image}, written by predict/infer.py


def seconds_per_image(address: str) -> float:
    """Seconds an image: every checkpoint of a member sees every test row; an ensemble costs what its members cost."""
    recipe = bank.folder(address) / "apply.json"
    if recipe.exists():
        return sum(
            seconds_per_image(each) for each in _leaf_members(artifacts.read_json(artifacts.verified(recipe)))
        )
    name, _, member = address.partition(":")
    files = _files(paths.run_folder(name), member)
    if not any(file.exists() for file in files):
        files = _files_of_weights(address)
    said = [_measured(file) for file in files]
    if not said or None in said:
        raise Refused(
            f"max_seconds: {address} has no measured latency (it was predicted by an older version, or elsewhere); "
            f"comp predict {name} --tta identity measures one"
        )
    return sum(each for each in said if each is not None)


def _leaf_members(recipe: dict) -> list[str]:
    from comp.engine.ensemble import average

    return average.leaves(recipe)


def _files(run: Path, member: str) -> list[Path]:
    """The notes of the checkpoints that a member speaks from."""
    seeds = "seed*" if not member.startswith("seed") else member
    folds = f"fold{run_members.REFIT}" if run_members.is_refit(member) else "fold[0-9]*"
    inside = "" if member.startswith("seed") else run_members.cv_member(member)
    return sorted(folder / inside / FILE for folder in run.glob(f"{seeds}/{folds}"))


def _files_of_weights(address: str) -> list[Path]:
    """A mean of several kept weights has no notes of its own; theirs add up."""
    folder = bank.folder(address)
    if not artifacts.manifest_entry(folder / "test.arrow"):
        return []
    return [paths.path("runs", name, FILE) for name in bank.read_meta(folder / "test.arrow")["weights"]]


def _measured(file: Path) -> float | None:
    if not file.exists():
        return None
    said = artifacts.read_json(file)
    return float(said["test"]) if "test" in said else None
