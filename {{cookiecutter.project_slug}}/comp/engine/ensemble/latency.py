"""Seconds of inference per image, as measured while runs predicted. Stored in files of their own that no hash
includes."""

from __future__ import annotations

from pathlib import Path

from comp.engine.bank import bank
from comp.engine.config import run_members
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

FILE = "speed.json"  # {"test": seconds per image}, written by comp/predict.py


def seconds_per_image(address: str) -> float:
    """Every checkpoint of a member predicts every test row, so theirs add up; so do those of an ensemble's
    members."""
    recipe = bank.folder(address) / "apply.json"
    if recipe.exists():
        leaves = _leaf_members(artifacts.read_json(artifacts.verified(recipe)))
        return sum(seconds_per_image(leaf) for leaf in leaves)
    name, _, member = address.partition(":")
    files = _checkpoint_files(paths.run_folder(name), member)
    if not any(file.exists() for file in files):
        files = _files_of_weights(address)
    seconds = [_measured(file) for file in files]
    if not seconds or None in seconds:
        raise UserError(
            "latency-unknown",
            key="max_seconds",
            what=f"{address} has no measured latency (predicted by an older version, or on another machine)",
            remedy=f"comp predict {name} --tta identity measures one",
        )
    return sum(value for value in seconds if value is not None)


def _leaf_members(recipe: dict) -> list[str]:
    from comp.engine.ensemble import average

    return average.leaves(recipe)


def _checkpoint_files(run: Path, member: str) -> list[Path]:
    """Of the checkpoints that predict a member."""
    seeds = "seed*" if not member.startswith("seed") else member
    folds = f"fold{run_members.REFIT}" if run_members.is_refit(member) else "fold[0-9]*"
    inside = "" if member.startswith("seed") else run_members.cv_member(member)
    return sorted(folder / inside / FILE for folder in run.glob(f"{seeds}/{folds}"))


def _files_of_weights(address: str) -> list[Path]:
    """Of the weight sets in the metadata: a mean of several weight sets has no file of its own; theirs add
    up."""
    folder = bank.folder(address)
    if not artifacts.manifest_entry(folder / "test.arrow"):
        return []
    return [paths.path("runs", name, FILE) for name in bank.read_meta(folder / "test.arrow")["weights"]]


def _measured(file: Path) -> float | None:
    if not file.exists():
        return None
    content = artifacts.read_json(file)
    return float(content["test"]) if "test" in content else None
