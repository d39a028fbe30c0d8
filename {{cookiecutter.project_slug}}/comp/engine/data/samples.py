"""data/samples.parquet: one row per sample, written by `comp prepare` from the tables that competition.yaml
declares."""

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
    """Columns: id (text, unique), images (list of image keys, see image_key.py), weight, source (train, test,
    extra, pseudo:<name>), row (the key in the submission), target.<name> (float); if declared also group,
    time, meta.<name>.
    """

    frame: pd.DataFrame
    heads: tuple[Head, ...]
    hash: str
    # Whether any sample has several images, which the network pools. Stored, since it must not change for a
    # hidden test set in which all samples have one image.
    multi_image: bool = False

    def positions(self, source: str) -> Positions:
        return np.flatnonzero((self.frame["source"] == source).to_numpy())

    @cached_property
    def labeled(self) -> Positions:
        """Rows with labels: train, extra, pseudo. Of these only source = train is ever scored."""
        return np.flatnonzero((self.frame["source"] != "test").to_numpy())

    def targets(self, head: Head) -> NDArray[np.float64]:
        return self.frame[list(head.columns)].to_numpy(np.float64)

    def truth(self, head: Head, positions: Positions) -> NDArray[Any]:
        return head.spec.encode_target(self.targets(head)[positions])

    def label(self, position: int) -> str:
        """The label of the first head as text, for captions and tables."""
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
    meta = json.loads(table.schema.metadata[b"comp"])
    heads = tuple(_head(fields) for fields in meta["heads"])
    return Samples(table.to_pandas(), heads, meta["hash"], meta["multi_image"])


def _head(fields: dict[str, Any]) -> Head:
    outputs, columns, classes, graded = (
        tuple(fields[name]) for name in ("outputs", "columns", "classes", "graded")
    )
    return Head(fields["name"], fields["task"], outputs, columns, classes, graded, fields.get("unknown", ""))


def save(
    frame: pd.DataFrame, heads: tuple[Head, ...], file: Path | None = None, **manifest_entry: Any
) -> Path:
    """Writes the table; the same frame gives the same bytes. `manifest_entry` is added to the manifest, for
    example the sha256 of a source."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = file or paths.samples_file()
    table = pa.Table.from_pandas(frame, preserve_index=False)
    meta = {
        "heads": [asdict(head) for head in heads],
        "hash": content_hash(frame, heads),
        "multi_image": bool((frame["images"].map(len) > 1).any()),
    }
    table = table.replace_schema_metadata({"comp": json.dumps(meta)})
    with artifacts.atomic(file) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    artifacts.add_to_manifest(file, rows=len(frame), hash=meta["hash"], **manifest_entry)
    return file


def content_hash(frame: pd.DataFrame, heads: tuple[Head, ...]) -> str:
    """Hash of rows and heads, not of the file, whose bytes depend on pyarrow's version. Every later artifact
    records it."""
    hashed = hashlib.sha256(json.dumps([asdict(head) for head in heads]).encode())
    for name in frame.columns:
        values = frame[name].to_numpy()
        hashed.update(f"\n{name}\n".encode())
        if values.dtype.kind in "fiub":
            hashed.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())
        else:
            hashed.update("\n".join(map(_cell_text, values)).encode())
    return hashed.hexdigest()


def _cell_text(cell: Any) -> str:
    """A cell as text: lists joined, and one symbol for missing values, which pandas 2 and 3 represent
    differently."""
    if isinstance(cell, str):
        return cell
    return "\x00" if np.ndim(cell) == 0 else "\x1f".join(cell)


# --- several samples of one scored row, for example several images of one patient -------------------------


def unique_rows(keys: NDArray[Any]) -> list[str]:
    """The distinct row keys, in the order of their first samples."""
    return list(dict.fromkeys(keys.tolist()))


def aggregate_rows(keys: NDArray[Any], values: Array, order: Sequence[str], how: str) -> Array:
    """(samples, outputs) -> (rows of `order`, outputs): mean over the samples of a row, or maximum with
    how="max". If there is one sample per row, in this order, `values` is returned unchanged."""
    if len(order) == len(keys) and keys.tolist() == list(order):
        return values
    index = {key: i for i, key in enumerate(order)}
    at = np.array([index[key] for key in keys.tolist()])
    if how == "max":
        out = np.full((len(order), values.shape[1]), -np.inf)
        np.maximum.at(out, at, values)
        return out
    total = np.zeros((len(order), values.shape[1]))
    np.add.at(total, at, values)
    return total / np.bincount(at, minlength=len(order))[:, None]
