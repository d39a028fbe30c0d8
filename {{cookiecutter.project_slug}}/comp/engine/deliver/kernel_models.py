"""The models of a kernel: predictions of every member run, on one GPU or split over all of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from comp.engine import hardware
from comp.engine.config import resolve
from comp.engine.config.competition_schema import Competition
from comp.engine.config.schema import Config
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    from comp.engine.run.context import Context

Values = dict[str, Any]  # head -> (rows, outputs)
# Environment variable of one process of several: its index / their number / the file of its result.
SHARE = "COMP_SHARE"


class Predicted(NamedTuple):
    values: dict[str, Values]  # by the address of the member run
    damaged: dict[int, str]  # position in the samples table -> why its image could not be decoded
    seconds: dict[str, float]  # by address


def predict_all(
    bundle: dict[str, Any], competition: Competition, table: Samples, rows: Positions
) -> tuple[Predicted, int]:
    """Predictions of every member run, and the number of GPUs that were used."""
    gpus = hardware.visible_gpus()[: len(rows)]
    if len(gpus) < 2:
        return predict_runs(bundle, competition, table, rows), len(gpus)
    return _on_gpus(gpus, bundle, rows), len(gpus)


def predict_runs(
    bundle: dict[str, Any], competition: Competition, table: Samples, rows: Positions
) -> Predicted:
    """Predictions of every member run, one after another in this process."""
    values: dict[str, Values] = {}
    seconds: dict[str, float] = {}
    damaged: dict[int, str] = {}
    for run in bundle["member_runs"]:
        start, address = time.perf_counter(), run["address"]
        cfg = resolve.from_yaml(artifacts.verified(paths.run_folder(run["run"]) / "config.yaml"))
        values[address], more = _predict_run(
            config_here(cfg, competition, run), table, rows, run, bundle["prior"]
        )
        damaged |= more
        seconds[address] = time.perf_counter() - start
        print(f"{address}: {seconds[address]:.0f} s", flush=True)
    return Predicted(values, damaged, seconds)


def config_here(cfg: Config, competition: Competition, run: dict[str, Any]) -> Config:
    """The run's config for this machine: images decoded from the raw files, no cache, all cores as workers,
    offline."""
    processes = int(os.environ.get(SHARE, "0/1/").split("/")[1])
    network: dict[str, Any] = {"pretrained": False}
    if run["backbone"]:
        network["name"] = f"local-dir:{run['backbone']}"
    workers = max(1, hardware.cores() // processes) if hardware.cores() > 1 else 0
    machine = {"device": "auto", "num_workers": workers, "gpu_cache_mb": 0}
    changes = {
        "competition": competition,
        "data": cfg.data.model_copy(update={"cache": False}),
        "predict": cfg.predict.model_copy(update={"tta": run["tta"], "averaging_space": run["space"]}),
        "machine": cfg.machine.model_copy(update=machine),
        "model": cfg.model.model_copy(update=network),
    }
    return cfg.model_copy(update=changes)


def _predict_run(
    cfg: Config, table: Samples, rows: Positions, run: dict[str, Any], prior: Values
) -> tuple[Values, dict[int, str]]:
    """Predictions of one member run, averaged over its checkpoints as at home, and the damaged images."""
    hardware.set_threads(cfg.train.threads)
    from comp import predict
    from comp.engine.bank import predictions

    context = _context(cfg, table)
    by_checkpoint: list[Values] = []
    damaged: dict[int, str] = {}
    for seed, fold in run["checkpoints"]:
        weights = paths.fold_folder(run["run"], seed, fold) / "weights.safetensors"
        title = f"{run['address']} seed {seed} fold {fold}"
        values, damaged = predict.predict(
            context, weights, rows, title, lambda head: np.array(prior[head.name])
        )
        by_checkpoint.append(values)
    heads = {}
    for head in table.heads:
        parts = [values[head.name] for values in by_checkpoint]
        heads[head.name] = predictions.average(parts, head, run["space"]).astype(np.float32)
    return heads, damaged


def _context(cfg: Config, table: Samples) -> Context:
    from comp.engine.run.context import Context
    from comp.engine.run.data_loader import Loader

    device = hardware.device(cfg.machine.device)
    no_folds: Any = None  # nothing is scored
    return Context(cfg, table, no_folds, Loader(cfg, table, device), device)


# --- several GPUs -------------------------------------------------------------------------------------------


def _on_gpus(gpus: list[str], bundle: dict[str, Any], rows: Positions) -> Predicted:
    """Of n GPUs each predicts every n-th row in a process of its own, with all models, so that none waits for
    another."""
    count = len(gpus)
    with tempfile.TemporaryDirectory(prefix="comp-gpus-") as folder:
        print(f"{count} GPUs: each takes every {count}-th row", flush=True)
        processes = []
        for i, gpu in enumerate(gpus):
            share = {SHARE: f"{i}/{count}/{folder}/{i}", "CUDA_VISIBLE_DEVICES": gpu}
            command = [sys.executable, "-m", "comp", "predict", "--kernel"]
            processes.append(subprocess.Popen(command, env={**os.environ, **share}))
        try:
            codes = [process.wait() for process in processes]
        finally:  # all have ended, or this process is being terminated
            for process in processes:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        for gpu, code in zip(gpus, codes, strict=True):
            if code:
                raise UserError(
                    "kernel-process",
                    where=f"GPU {gpu}",
                    what=f"its process ended with exit code {code}; its output is above",
                )
        shares = [_read_share(Path(folder, str(i))) for i in range(count)]
    values: dict[str, Values] = {}
    for run in bundle["member_runs"]:
        address = run["address"]
        values[address] = {}
        for head in shares[0].values[address]:
            parts = [share.values[address][head] for share in shares]
            whole = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
            for i, part in enumerate(parts):
                whole[i::count] = part
            values[address][head] = whole
    damaged = {row: reason for share in shares for row, reason in share.damaged.items()}
    seconds = {address: max(share.seconds[address] for share in shares) for address in values}
    return Predicted(values, damaged, seconds)


def predict_share(
    share: str, bundle: dict[str, Any], competition: Competition, table: Samples, rows: Positions
) -> Path:
    """In the process of one GPU: predict its rows and write them where `share` says."""
    index, count, file = share.split("/", 2)
    _write_share(Path(file), predict_runs(bundle, competition, table, rows[int(index) :: int(count)]))
    return Path(file)


def _write_share(file: Path, predicted: Predicted) -> None:
    values = predicted.values
    names = [(address, head) for address, heads in values.items() for head in heads]
    np.savez(file.with_suffix(".npz"), *(values[address][head] for address, head in names))
    artifacts.write_json(file, {"names": names, "damaged": predicted.damaged, "seconds": predicted.seconds})


def _read_share(file: Path) -> Predicted:
    share = artifacts.read_json(file)
    values: dict[str, Values] = {}
    with np.load(file.with_suffix(".npz")) as arrays:
        for i, (address, head) in enumerate(share["names"]):
            values.setdefault(address, {})[head] = arrays[f"arr_{i}"]
    damaged = {int(row): reason for row, reason in share["damaged"].items()}
    return Predicted(values, damaged, share["seconds"])
