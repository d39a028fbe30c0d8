"""The state of a training run between two steps. With it a run that was killed ends in the same bytes as one that was not.

Random numbers are no part of it: every step seeds its own from (seed, step), and every sample from its place in the epoch.
Each state has its own file name, so that a kill between writing and sealing leaves the one before it whole.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from comp.engine.errors import Refused
from comp.engine.run import distributed
from comp.engine.store import artifacts, paths

State = dict[str, Any]


def save(folder: Path, step: int, state: State, log: int) -> None:
    """Of several processes the first alone saves. `log` is where log.jsonl ends at this step: what stands behind it is cut off when the run goes on from here."""
    if not distributed.is_main():
        return
    file = folder / f"state-{step:08d}.pt"
    written = io.BytesIO()  # torch's own writer answers a full disk with a RuntimeError of its own kind
    torch.save(state, written)
    with artifacts.atomic(file) as temporary:
        temporary.write_bytes(written.getbuffer())
    artifacts.add_to_manifest(file, log=log)
    delete(folder, but=file)


def load_latest(folder: Path, device: torch.device) -> State | None:
    files = sorted(file for file in folder.glob("state-*.pt") if artifacts.manifest_entry(file))
    if not files:
        return None
    file = artifacts.verified(files[-1], "start this fold again with --fresh")
    place = device if distributed.world_size() == 1 else "cpu"  # from where the others get it
    state = torch.load(file, map_location=place, weights_only=True)
    if not isinstance(state, dict):
        raise Refused(f"{paths.relative(file)}: is not a training state")
    return state


def log_offset(folder: Path) -> int | None:
    """Where the log goes on: behind the finished weights, or the newest state; None for a run that begins."""
    files = [folder / "weights.safetensors", *sorted(folder.glob("state-*.pt"), reverse=True)]
    return next((entry["log"] for file in files if (entry := artifacts.manifest_entry(file))), None)


def delete(folder: Path, but: Path | None = None) -> None:
    for file in folder.glob("state-*.pt"):
        if file != but:
            file.unlink()
            artifacts.remove_from_manifest(file)
