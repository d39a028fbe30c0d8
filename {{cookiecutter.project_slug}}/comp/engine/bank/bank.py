"""Predictions with their keys: what a run, a member of it or an ensemble says of every row, refused where it does not fit.

One set is one uncompressed Arrow IPC file, memory-mapped: `row` (int32 into the samples table), `fold` (int16, OOF only) and
for every head a fixed-size list of float32. The metadata says what it was made from; nothing in it depends on clock, machine
or folder. Sets have one shape whoever made them, so ensembles nest.

    exp001           a run, seeds and folds averaged     runs/exp001/{oof,test}.arrow
    exp001:seed1     a member of a run                   runs/exp001/members/seed1/{oof,test}.arrow
    exp001:full      trained on all data, so no OOF      runs/exp001/members/full/test.arrow
    exp001:full-snap1    a snapshot of it, weighed by the OOF predictions of exp001:snap1
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
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = ("oof", "test")
MAGIC = b"ARROW1\0\0"
WIDE = 256  # outputs above which float16 is allowed
WEIGHTS = "weights.safetensors"


# --- files ---------------------------------------------------------------------------------------------------------------


def write(file: Path, predictions: PredictionSet) -> Path:
    """The same set gives the same bytes. An entry in the manifest beside it says that it is finished."""
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
        half = values.dtype == np.float16 and width > WIDE
        with np.errstate(over="ignore"):
            flat = np.ascontiguousarray(values, np.float16 if half else np.float32)
        gaps = np.isnan(flat).any(axis=1)
        if np.isinf(flat).any() or not np.isnan(flat[gaps]).all():
            raise Refused(
                f"{paths.relative(file)}: {head['name']} is infinite or half NaN in some row, so it is not written"
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
    """Bytes of a set over so many rows."""
    return rows * (6 + 4 * sum(len(head.outputs) for head in samples.heads))


def read(
    file: Path, samples: Samples, folds: Folds, expect: Mapping[str, Any] | None = None
) -> PredictionSet:
    """Views into the file, without a copy. Whatever does not fit samples, folds and `expect` is refused in one line."""
    batch, said = _open(artifacts.verified(file))
    if fault := _misfit(said, samples, folds, expect or {}) or _stale(said):
        raise Refused(f"{paths.relative(file)}: {fault}")
    column = dict(zip(batch.schema.names, batch.columns, strict=True))
    heads = {}
    for head in said["heads"]:
        listed = column[f"head.{head['name']}"]
        heads[head["name"]] = listed.values.to_numpy(zero_copy_only=True).reshape(
            len(batch), listed.type.list_size
        )
    fold = column["fold"].to_numpy(zero_copy_only=True) if "fold" in column else None
    return PredictionSet(column["row"].to_numpy(zero_copy_only=True), fold, heads, said)


def read_meta(file: Path) -> dict[str, Any]:
    """What a set says of itself, without looking at its values."""
    return _open(artifacts.verified(file))[1]


def _open(file: Path) -> tuple[pa.RecordBatch, dict[str, Any]]:
    import pyarrow as pa

    try:
        batch = _mapped(file, artifacts.stamp(file))
        said: dict[str, Any] = json.loads(batch.schema.metadata[b"comp"])
    except (pa.ArrowException, OSError, StopIteration, ValueError, KeyError, TypeError):
        raise Refused(f"{paths.relative(file)}: is no prediction set of this project") from None
    return batch, said


@lru_cache(maxsize=1000)  # mapped once a process: most of what reading costs is finding its pages
def _mapped(file: Path, stamp: artifacts.Stamp | None) -> pa.RecordBatch:
    import pyarrow as pa

    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    # Behind its eight bytes of magic an Arrow file is a stream; read as one it opens three times as fast.
    return pa.ipc.open_stream(pa.py_buffer(mapped).slice(len(MAGIC))).read_next_batch()


def _misfit(said: Mapping[str, Any], samples: Samples, folds: Folds, expect: Mapping[str, Any]) -> str:
    """Why a set must not be read beside these samples and folds; the most telling reason first."""
    here = {head.name: head for head in samples.heads}
    if list(here) != [head["name"] for head in said["heads"]]:
        return f"predicts {', '.join(head['name'] for head in said['heads'])}, and the targets now are {', '.join(here)}"
    for head in said["heads"]:
        now = here[head["name"]]
        for what, before, after in (
            ("task", head["task"], now.task),
            ("space", head["space"], now.row.space),
            ("outputs", head["outputs"], list(now.outputs)),
            ("classes", head["classes"], list(now.classes)),
        ):
            if before != after:
                return f"{now.name} has {what} {_short(before)} there, {_short(after)} now{_order(before, after)}"
    if said["samples"] != samples.hash:
        return f"made for another data/samples.parquet ({said['samples'][:8]}, now {samples.hash[:8]}): its rows mean other ids"
    if said["folds"] != folds.hash:
        return (
            f"made with other folds ({said['folds'][:8]}, now {folds.hash[:8]}): its scores would not compare"
        )
    for key, wanted in expect.items():
        if said.get(key) != wanted:
            return f"{key} is {_short(said.get(key))}, wanted was {_short(wanted)}"
    return ""


def _stale(said: Mapping[str, Any]) -> str:
    for name, then in said["weights"].items():
        now = _weights_now(paths.path("runs", name, WEIGHTS))
        if now is not None and now != then:
            return f"runs/{name}/{WEIGHTS} changed since these predictions were made; make them again"
    return ""


def weights_of(*folders: Path) -> dict[str, str]:
    """For the metadata: which weights spoke. A set whose weights were trained anew since is refused."""
    runs = paths.path("runs")
    return {
        str(folder.relative_to(runs)): artifacts.sha256(artifacts.verified(folder / WEIGHTS))
        for folder in folders
    }


def _weights_now(file: Path) -> str | None:
    """None when they were cleaned away: predictions outlive weights."""
    try:
        weights, manifest = file.stat(), (file.parent / artifacts.MANIFEST).stat()
    except FileNotFoundError:
        return None
    # Gigabytes of weights are not hashed to read a few megabytes of predictions: the manifest's word counts, unless the
    # file was touched after it.
    entry = _entry(file, manifest.st_ino, manifest.st_mtime_ns)
    if entry and entry["size"] == weights.st_size and weights.st_mtime_ns < manifest.st_mtime_ns:
        return str(entry["sha256"])
    return artifacts.sha256(file)


@cache
def _entry(file: Path, inode: int, changed: int) -> dict[str, Any] | None:
    return artifacts.manifest_entry(file)


# --- members by address --------------------------------------------------------------------------------------------------


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
    """The file of a member. What is not trained or not finished answers with what is missing, an unknown address with the
    nearest three."""
    file = folder(address) / f"{kind}.arrow"
    if file.exists():
        return file
    known = members()
    if address in known:
        raise Refused(
            f"{address}: has no {kind} predictions"
            + (": it was trained on all data" if kind == "oof" else "")
        )
    if why := experiments.absent(address, f"{kind} predictions"):
        raise Refused(why)
    if not known:
        raise Refused(f"{address}: no such run, member or ensemble; there are none yet: comp train exp001")
    raise Refused(
        f"{address}: no such run, member or ensemble; the nearest are {', '.join(nearest(address, known, 3))}"
    )


def load(address: str, kind: str, samples: Samples, folds: Folds) -> PredictionSet:
    return read(find(address, kind), samples, folds, {"kind": kind})


def load_all(addresses: Sequence[str], kind: str, samples: Samples, folds: Folds) -> list[PredictionSet]:
    """Many at once: files that this process reads for the first time are hashed on all cores."""
    files = [find(address, kind) for address in addresses]
    artifacts.hash_files(files)
    return [read(file, samples, folds, {"kind": kind}) for file in files]


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _order(before: Any, after: Any) -> str:
    return (
        " (the same ones in another order)"
        if isinstance(before, list) and sorted(before) == sorted(after)
        else ""
    )
