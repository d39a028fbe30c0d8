"""The training state between two steps. A run resumed from it ends with the same bytes as one that was never
interrupted.

Random number generators are not part of it: every step seeds its own from (seed, step), every sample from its
place in the epoch. Each state has its own file name, so a kill between writing and sealing leaves the
previous one intact.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from comp.engine.errors import UserError
from comp.engine.run import distributed
from comp.engine.store import artifacts, paths

State = dict[str, Any]


def save(folder: Path, step: int, state: State, log_offset: int) -> None:
    """Only rank 0 saves. `log_offset`: length of log.jsonl at this step; what follows is cut off when
    training resumes here."""
    if not distributed.is_main():
        return
    file = folder / f"state-{step:08d}.pt"
    # To memory first: on a full disk torch's own file writer raises a RuntimeError instead of an OSError.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with artifacts.atomic(file) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    artifacts.add_to_manifest(file, log=log_offset)
    delete(folder, keep=file)


def load_latest(folder: Path, device: torch.device) -> State | None:
    files = sorted(file for file in folder.glob("state-*.pt") if artifacts.manifest_entry(file))
    if not files:
        return None
    file = artifacts.verified(files[-1], "start this fold again with --fresh")
    place = device if distributed.world_size() == 1 else "cpu"  # broadcast to the other processes from there
    state = torch.load(file, map_location=place, weights_only=True)
    if not isinstance(state, dict):
        raise UserError(
            "file-damaged",
            where=paths.relative(file),
            what="not a training state",
            remedy="start this fold again with --fresh",
        )
    return state


def log_offset(folder: Path) -> int | None:
    """Where log.jsonl continues: after the final weights or the latest state; None for a fold that was not
    started."""
    files = [folder / "weights.safetensors", *sorted(folder.glob("state-*.pt"), reverse=True)]
    return next((entry["log"] for file in files if (entry := artifacts.manifest_entry(file))), None)


def delete(folder: Path, keep: Path | None = None) -> None:
    for file in folder.glob("state-*.pt"):
        if file != keep:
            file.unlink()
            artifacts.remove_from_manifest(file)
