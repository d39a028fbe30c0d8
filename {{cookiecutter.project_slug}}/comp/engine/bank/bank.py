"""Prediction sets on disk: of runs, their members and ensembles. Reading validates them against samples and
folds.

A set is one uncompressed Arrow IPC file, memory-mapped: `row` (int32, position in the samples table), `fold`
(int16, OOF only) and one fixed-size list of float32 per head. Its metadata says what it was made from; no
byte depends on clock, machine or folder. Runs and ensembles write the same format, so ensembles nest.

    exp001           a run, mean of seeds and folds      runs/exp001/{oof,test}.arrow
    exp001:seed1     a member of a run                   runs/exp001/members/seed1/{oof,test}.arrow
    exp001:full      trained on all rows, so no OOF      runs/exp001/members/full/test.arrow
    exp001:full-snap1    a snapshot of it; a blend weighs it by the OOF predictions of exp001:snap1
    blend001         an ensemble                         ensembles/blend001/{oof,test}.arrow
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import experiments
from comp.engine.config.resolve import nearest
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = ("oof", "test")
MAGIC = b"ARROW1\0\0"
FLOAT16_OUTPUTS = 256  # sets with more outputs may be float16
WEIGHTS = "weights.safetensors"


# --- files --------------------------------------------------------------------------------------------------


def write(file: Path, predictions: PredictionSet) -> Path:
    """Deterministic: the same set gives the same bytes. The file counts as finished once the folder's
    manifest lists it."""
    import pyarrow as pa

    rows, heads = predictions.row, predictions.heads
    assert predictions.meta["kind"] in KINDS and (predictions.fold is not None) == (
        predictions.meta["kind"] == "oof"
    )
    assert list(heads) == [head["name"] for head in predictions.meta["heads"]], (
        f"{list(heads)} are not the heads of the samples"
    )
    columns: dict[str, Any] = {"row": pa.array(np.ascontiguousarray(rows, np.int32))}
    if predictions.fold is not None:
        columns["fold"] = pa.array(np.ascontiguousarray(predictions.fold, np.int16))
    for head in predictions.meta["heads"]:
        values, width = heads[head["name"]], len(head["outputs"])
        assert values.shape == (len(rows), width), (
            f"{head['name']}: {values.shape} is not ({len(rows)}, {width})"
        )
        half = values.dtype == np.float16 and width > FLOAT16_OUTPUTS
        with np.errstate(over="ignore"):
            flat = np.ascontiguousarray(values, np.float16 if half else np.float32)
        gaps = np.isnan(flat).any(axis=1)
        if np.isinf(flat).any() or not np.isnan(flat[gaps]).all():
            raise UserError(
                "predictions-not-finite",
                where=paths.relative(file),
                key=head["name"],
                what="some rows are infinite or partly NaN; nothing was written",
            )
        columns[f"head.{head['name']}"] = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), width)
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    text = json.dumps(predictions.meta, sort_keys=True, ensure_ascii=False, allow_nan=False)
    batch = batch.replace_schema_metadata({"comp": text})
    with (
        artifacts.atomic(file) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)
    artifacts.add_to_manifest(file)
    return file


def nbytes(samples: Samples, rows: int) -> int:
    """Size on disk of a set with so many rows."""
    return rows * (6 + 4 * sum(len(head.outputs) for head in samples.heads))


def read(
    file: Path, samples: Samples, folds: Folds, expect: Mapping[str, Any] | None = None
) -> PredictionSet:
    """Views into the file, without a copy. Raises if the set does not match samples, folds or `expect`."""
    batch, meta = _open(artifacts.verified(file))
    _validate(file, meta, samples, folds, expect or {})
    column = dict(zip(batch.schema.names, batch.columns, strict=True))
    heads = {}
    for head in meta["heads"]:
        values = column[f"head.{head['name']}"]
        heads[head["name"]] = values.values.to_numpy(zero_copy_only=True).reshape(
            len(batch), values.type.list_size
        )
    fold = column["fold"].to_numpy(zero_copy_only=True) if "fold" in column else None
    return PredictionSet(column["row"].to_numpy(zero_copy_only=True), fold, heads, meta)


def read_meta(file: Path) -> dict[str, Any]:
    """The metadata of a set, without validation against samples and folds."""
    return _open(artifacts.verified(file))[1]


def _open(file: Path) -> tuple[pa.RecordBatch, dict[str, Any]]:
    import pyarrow as pa

    try:
        batch = _mapped(file, artifacts.stamp(file))
        meta: dict[str, Any] = json.loads(batch.schema.metadata[b"comp"])
    except (pa.ArrowException, OSError, StopIteration, ValueError, KeyError, TypeError):
        raise UserError(
            "predictions-unreadable", where=paths.relative(file), what="not a prediction set"
        ) from None
    return batch, meta


@lru_cache(maxsize=1000)  # mapped once per process: page faults are most of the cost of reading
def _mapped(file: Path, stamp: artifacts.Stamp | None) -> pa.RecordBatch:
    import pyarrow as pa

    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    # After eight magic bytes an Arrow file is a stream; opened as a stream it is three times as fast.
    return pa.ipc.open_stream(pa.py_buffer(mapped).slice(len(MAGIC))).read_next_batch()


def _validate(
    file: Path, meta: Mapping[str, Any], samples: Samples, folds: Folds, expect: Mapping[str, Any]
) -> None:
    """Raises if a set does not match these samples and folds. The most specific difference comes first."""
    where = paths.relative(file)
    current = {head.name: head for head in samples.heads}
    if list(current) != [head["name"] for head in meta["heads"]]:
        before = ", ".join(head["name"] for head in meta["heads"])
        what = f"predicts {before}; the targets are {', '.join(current)}"
        raise UserError("predictions-differ", where=where, key="targets", what=what)
    for head in meta["heads"]:
        now = current[head["name"]]
        for field, before, after in (
            ("task", head["task"], now.task),
            ("space", head["space"], now.spec.space),
            ("outputs", head["outputs"], list(now.outputs)),
            ("classes", head["classes"], list(now.classes)),
        ):
            if before != after:
                what = (
                    f"was predicted with {field} {_short(before)}, now {_short(after)}{_order(before, after)}"
                )
                raise UserError("predictions-differ", where=where, key=now.name, what=what)
    for key, current_hash, reason in (
        ("samples", samples.hash, "its rows are other ids"),
        ("folds", folds.hash, "its scores are not comparable"),
    ):
        if meta[key] != current_hash:
            what = f"was predicted with {meta[key][:8]}, now {current_hash[:8]}: {reason}"
            raise UserError("predictions-differ", where=where, key=f"data/{key}.parquet", what=what)
    for key, expected in expect.items():
        if meta.get(key) != expected:
            what = f"is {_short(meta.get(key))}, expected {_short(expected)}"
            raise UserError("predictions-differ", where=where, key=key, what=what)
    for name, sha in meta["weights"].items():
        now_sha = _weights_now(paths.path("runs", name, WEIGHTS))
        if now_sha is not None and now_sha != sha:
            raise UserError(
                "predictions-stale",
                where=where,
                what=f"runs/{name}/{WEIGHTS} changed since these predictions were made",
                remedy="predict again",
            )


def weights_of(*folders: Path) -> dict[str, str]:
    """For the metadata: the hashes of the weights that made the predictions. `read` raises once they
    change."""
    runs = paths.path("runs")
    return {
        str(folder.relative_to(runs)): artifacts.sha256(artifacts.verified(folder / WEIGHTS))
        for folder in folders
    }


def _weights_now(file: Path) -> str | None:
    """The current hash of a weights file; None if it was deleted, since predictions may outlive weights."""
    try:
        weights, manifest = file.stat(), (file.parent / artifacts.MANIFEST).stat()
    except FileNotFoundError:
        return None
    # Gigabytes of weights are not hashed to read a few megabytes of predictions: the manifest is trusted
    # unless the file is newer.
    entry = _entry(file, manifest.st_ino, manifest.st_mtime_ns)
    if entry and entry["size"] == weights.st_size and weights.st_mtime_ns < manifest.st_mtime_ns:
        return str(entry["sha256"])
    return artifacts.sha256(file)


@cache
def _entry(file: Path, inode: int, changed: int) -> dict[str, Any] | None:
    return artifacts.manifest_entry(file)


# --- members by address -------------------------------------------------------------------------------------


def folder(address: str) -> Path:
    name, _, member = address.partition(":")
    if member:
        return paths.member_folder(name, member)
    return paths.ensemble_folder(name) if paths.ensemble_folder(name).is_dir() else paths.run_folder(name)


def members() -> list[str]:
    """The address of everything that has finished predictions: runs, their members, ensembles."""
    runs, found = paths.path("runs"), []
    for run in sorted(p for p in runs.glob("*") if p.is_dir() and not p.name.startswith(".")):
        found.append(run.name)
        found += [f"{run.name}:{p.name}" for p in sorted(run.glob("members/*")) if not p.name.startswith(".")]
    found += [p.name for p in sorted(paths.path("ensembles").glob("*")) if not p.name.startswith(".")]
    return [
        address
        for address in dict.fromkeys(found)
        if any(artifacts.manifest_entry(folder(address) / f"{k}.arrow") for k in KINDS)
    ]


def find(address: str, kind: str) -> Path:
    """The file of a member. Raises with what is missing, or with the nearest addresses if there is no such
    member."""
    file = folder(address) / f"{kind}.arrow"
    if file.exists():
        return file
    known = members()
    if address in known:
        reason = ": it was trained on all rows" if kind == "oof" else ""
        raise UserError("predictions-missing", where=address, what=f"has no {kind} predictions{reason}")
    if reason := experiments.why_missing(address, f"{kind} predictions"):
        raise UserError("predictions-missing", what=reason)
    what = "no such run, member or ensemble"
    if not known:
        raise UserError(
            "member-unknown", where=address, what=f"{what}; there are none yet", remedy="comp train exp001"
        )
    near = ", ".join(nearest(address, known, 3))
    raise UserError("member-unknown", where=address, what=what, remedy=f"the nearest are {near}")


def load(address: str, kind: str, samples: Samples, folds: Folds) -> PredictionSet:
    return read(find(address, kind), samples, folds, {"kind": kind})


def load_all(addresses: Sequence[str], kind: str, samples: Samples, folds: Folds) -> list[PredictionSet]:
    """Several sets; files read for the first time are hashed on all cores."""
    files = [find(address, kind) for address in addresses]
    artifacts.hash_files(files)
    return [read(file, samples, folds, {"kind": kind}) for file in files]


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _order(before: Any, after: Any) -> str:
    return (
        " (the same in another order)" if isinstance(before, list) and sorted(before) == sorted(after) else ""
    )
