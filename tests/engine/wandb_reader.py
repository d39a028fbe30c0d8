"""Reads W&B's offline file back: a 7-byte header, then LevelDB log blocks of protobuf records. Proves what
was logged."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768
FULL, FIRST, LAST = 1, 2, 4  # how a record lies in its blocks; 3 is a middle piece


@dataclass
class Part:
    folder: Path
    run: Any = None  # id, project, group, job type, git commit: protobuf
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)  # by name: protobuf with the manifest
    files: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.history if name in row]

    def media(self, name: str) -> Path:
        """The file behind the one image or table of this name."""
        (value,) = self.column(name)
        return self.folder / "files" / value["path"]


def read(folder: Path) -> Part:
    (file,) = folder.glob("run-*.wandb")
    part = Part(folder)
    for record in records(file):
        kind = record.WhichOneof("record_type")
        value = getattr(record, kind)
        if kind == "run":
            part.run = value
            part.config |= {item.key: json.loads(item.value_json) for item in value.config.update}
        elif kind == "history":
            part.history.append(_tree(value.item))
        elif kind == "summary":
            part.summary |= _tree(value.update)
        elif kind == "metric":
            part.axes[value.name] = value.step_metric
        elif kind == "artifact":
            part.artifacts[value.name] = value
        elif kind == "files":
            part.files += [item.path for item in value.files]
        elif kind == "environment":
            part.machine |= {name.name: shown for name, shown in value.ListFields()}
        elif kind == "exit":
            part.exit_code = value.exit_code
    return part


def records(file: Path) -> Iterator[Any]:
    """A torn end, which a kill leaves, ends the reading."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    content = file.read_bytes()
    assert content[:4] == b":W&B", f"{file} is no W&B file"
    position, whole = 7, b""
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:  # no room for a head: the rest of the block is filling
            position += BLOCK - position % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        piece = content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind == 0 or len(piece) < size:
            return
        whole = piece if kind in (FULL, FIRST) else whole + piece
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(whole)
            yield record


def _tree(items: Any) -> dict[str, Any]:
    """`a` and `b` under `path`: W&B keeps a nested value as one item a leaf."""
    tree: dict[str, Any] = {}
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        node = tree
        for name in outer:
            node = node.setdefault(name, {})
        node[last] = json.loads(item.value_json)
    return tree
