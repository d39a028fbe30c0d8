"""data/samples.parquet: one line a sample, as `comp prepare` made it from what competition.yaml declares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Array, Head

if TYPE_CHECKING:
    import pandas as pd

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """Columns: id (text, unique), images (list of paths under raw), weight, source (train, test, extra, pseudo:<name>),
    row (the key the host scores), and where there are any group, time, target.<name> (float), meta.<name>."""

    frame: pd.DataFrame
    heads: tuple[Head, ...]
    hash: str
    multi_image: bool = (
        False  # images of a sample: then networks join them, also where a test set happens to have one each
    )

    def positions(self, source: str) -> Positions:
        return np.flatnonzero((self.frame["source"] == source).to_numpy())

    @cached_property
    def labeled(self) -> Positions:
        """Everything with labels: train, extra, pseudo. Only source = train is ever scored."""
        return np.flatnonzero((self.frame["source"] != "test").to_numpy())

    def targets(self, head: Head) -> NDArray[np.float64]:
        return self.frame[list(head.columns)].to_numpy(np.float64)

    def truth(self, head: Head, positions: Positions) -> NDArray[Any]:
        return head.spec.encode_target(self.targets(head)[positions])

    def label(self, position: int) -> str:
        """What the first head says of a sample, as people write it."""
        head = self.heads[0]
        values = self.targets(head)[position]
        if head.classes and len(values) == 1:
            return head.classes[int(values[0])]
        if head.task == "multilabel":
            return " ".join(n for n, value in zip(head.outputs, values, strict=True) if value > 0.5)
        if head.spec.space == "logit" and len(values) > 1:
            return head.outputs[int(np.argmax(values))]
        return " ".join(f"{value:g}" for value in values)


def load(file: Path | None = None) -> Samples:
    import pyarrow.parquet as pq

    file = artifacts.verified(file or paths.samples_file(), "make it with: comp prepare")
    table = pq.read_table(file)
    facts = json.loads(table.schema.metadata[b"comp"])
    heads = tuple(_head(said) for said in facts["heads"])
    return Samples(table.to_pandas(), heads, facts["hash"], facts["multi_image"])


def _head(said: dict[str, Any]) -> Head:
    outputs, columns, classes, graded = (
        tuple(said[name]) for name in ("outputs", "columns", "classes", "graded")
    )
    return Head(said["name"], said["task"], outputs, columns, classes, graded, said.get("unknown", ""))


def save(frame: pd.DataFrame, heads: tuple[Head, ...], file: Path | None = None, **facts: Any) -> Path:
    """The same frame gives the same bytes. `facts` stand beside them in the manifest, like the sha256 of a source."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = file or paths.samples_file()
    table = pa.Table.from_pandas(frame, preserve_index=False)
    said = {
        "heads": [asdict(head) for head in heads],
        "hash": content_hash(frame, heads),
        "multi_image": bool((frame["images"].map(len) > 1).any()),
    }
    table = table.replace_schema_metadata({"comp": json.dumps(said)})
    with artifacts.atomic(file) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    artifacts.add_to_manifest(file, rows=len(frame), hash=said["hash"], **facts)
    return file


def content_hash(frame: pd.DataFrame, heads: tuple[Head, ...]) -> str:
    """What every later artefact repeats: the rows and what their columns mean, not the file's bytes, which another pyarrow
    would write differently."""
    hashed = hashlib.sha256(json.dumps([asdict(head) for head in heads]).encode())
    for name in frame.columns:
        values = frame[name].to_numpy()
        hashed.update(f"\n{name}\n".encode())
        if values.dtype.kind in "fiub":
            hashed.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())
        else:
            hashed.update("\n".join(map(_written, values)).encode())
    return hashed.hexdigest()


def _written(cell: Any) -> str:
    """Text as it is, a list of paths, or a mark for what is missing: pandas 2 and 3 disagree on what that is."""
    if isinstance(cell, str):
        return cell
    return "\x00" if np.ndim(cell) == 0 else "\x1f".join(cell)


# --- several samples of one scored row (for example several images of one patient) ------------------------------------------


def unique_rows(keys: NDArray[Any]) -> list[str]:
    """Every row once, in the order of its first sample."""
    return list(dict.fromkeys(keys.tolist()))


def aggregate_rows(keys: NDArray[Any], values: Array, order: Sequence[str], how: str) -> Array:
    """(samples, outputs) -> (rows of `order`, outputs); a row of one sample keeps its bits."""
    if len(order) == len(keys) and keys.tolist() == list(order):
        return values
    place = {each: i for i, each in enumerate(order)}
    at = np.array([place[key] for key in keys.tolist()])
    if how == "max":
        out = np.full((len(order), values.shape[1]), -np.inf)
        np.maximum.at(out, at, values)
        return out
    total = np.zeros((len(order), values.shape[1]))
    np.add.at(total, at, values)
    return total / np.bincount(at, minlength=len(order))[:, None]
