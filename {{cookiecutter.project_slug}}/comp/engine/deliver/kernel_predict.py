"""comp predict --kernel: what the notebook runs on Kaggle. The bundle is the project, read-only; the test set is whatever
lies there now, with other ids and of another size than at home; the one thing written is submission.csv.

Runs under the older versions of Kaggle's image, makes every model with pretrained=False, and touches no network.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comp.engine import hardware, notebook
from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.data import samples
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

if TYPE_CHECKING:
    import pandas as pd

    from comp.engine.run.context import Context

Values = dict[str, Any]  # head -> (rows, outputs)
Said = tuple[dict[str, Values], dict[int, str], dict[str, float]]  # of every model, reasons by row, seconds
BACKBONES = (
    "backbones"  # of the bundle: config.json of networks that are not timm's own by name, a folder a run
)
SHARE = "COMP_SHARE"  # in the environment of a process that is one of several: number, of how many, where its part goes


def predict() -> Path:
    began = time.perf_counter()
    bundle = Path(__file__).resolve().parents[3]
    if not (bundle / "bundle.json").exists():
        raise Refused("--kernel: only the folder that comp kernel NAME makes can be run this way")
    os.environ["COMP_ROOT"] = str(bundle)
    paths.root.cache_clear()
    os.environ["HF_HUB_OFFLINE"] = "1"  # whatever asks a hub is told at once that there is none
    unpack_wheels(bundle / "wheels")
    kaggle = Path(os.environ.get("COMP_KAGGLE", "/kaggle"))
    about = artifacts.read_json(bundle / "bundle.json")
    base = resolve.load(paths.root(), "base").config
    home = base.competition.model_copy(update={"raw": str(raw_folder(kaggle, about["competition"]))})
    table = test_rows(
        base.model_copy(update={"competition": home}),
        tuple(_head(each) for each in about["heads"]),
        about["multi_image"],
    )
    rows = table.positions("test")
    ready = time.perf_counter() - began
    if share := os.environ.get(SHARE):
        mine, of, place = share.split("/", 2)
        put_share(Path(place), *everything(about, home, table, rows[int(mine) :: int(of)]))
        return Path(place)
    print(f"{about['name']}: {len(rows)} test rows, {len(about['leaves'])} models", flush=True)
    cards = hardware.visible_gpus()[: len(rows)]
    given, damaged, seconds = (
        everything(about, home, table, rows) if len(cards) < 2 else over_cards(cards, about, rows)
    )
    said = together(about["name"], given, table.frame.iloc[rows])
    filled = base.model_copy(update={"competition": home})
    file = written(filled, table, about["name"], said, kaggle / "working")
    for at, reason in sorted(damaged.items())[:20]:
        print(f"damaged: {table.frame['id'].iloc[at]}: {reason}; it got the mean of the labels")
    if len(damaged) > 20:
        print(f"and {len(damaged) - 20} more damaged pictures")
    facts = {
        "ready": ready,
        "seconds": seconds,
        "rows": len(rows),
        "damaged": len(damaged),
        "cards": len(cards),
    }
    _report(kaggle / "working", table.frame["id"].iloc[rows], said, facts)
    print(f"written: {file}, {len(rows)} rows, validated")
    return file


def everything(about: dict[str, Any], home: Any, table: Samples, rows: Positions) -> Said:
    """What every model says of these rows; which of them are damaged; how long each model took."""
    given: dict[str, Values] = {}
    seconds: dict[str, float] = {}
    damaged: dict[int, str] = {}
    for leaf in about["leaves"]:
        start = time.perf_counter()
        cfg = resolve.from_yaml(artifacts.verified(paths.run_folder(leaf["run"]) / "config.yaml"))
        given[leaf["address"]], broken = spoken(here(cfg, home, leaf), table, rows, leaf, about["prior"])
        damaged |= broken
        seconds[leaf["address"]] = time.perf_counter() - start
        print(f"{leaf['address']}: {seconds[leaf['address']]:.0f} s", flush=True)
    return given, damaged, seconds


# --- several GPUs --------------------------------------------------------------------------------------------------------


def over_cards(cards: list[str], about: dict[str, Any], rows: Positions) -> Said:
    """Every GPU gets each count-th row, in a process of its own: all models, so none waits for another."""
    count = len(cards)
    with tempfile.TemporaryDirectory(prefix="comp-cards-") as folder:
        print(f"{count} GPUs: each takes every {count}-th row", flush=True)
        workers = []
        for i, card in enumerate(cards):
            mine = {SHARE: f"{i}/{count}/{folder}/{i}", "CUDA_VISIBLE_DEVICES": card}
            command = [sys.executable, "-m", "comp", "predict", "--kernel"]
            workers.append(subprocess.Popen(command, env={**os.environ, **mine}))
        try:
            ends = [worker.wait() for worker in workers]
        finally:  # all have ended, or this process is told to
            for worker in workers:
                if worker.poll() is None:
                    worker.terminate()
                    worker.wait()
        for card, end in zip(cards, ends, strict=True):
            if end:
                raise Refused(f"GPU {card}: its process ended with {end}; what it said stands above")
        shares = [get_share(Path(folder, str(i))) for i in range(count)]
    given: dict[str, Values] = {}
    for leaf in about["leaves"]:
        address, heads = leaf["address"], {}
        for head in shares[0][0][address]:
            parts = [share[0][address][head] for share in shares]
            whole = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
            for i, part in enumerate(parts):
                whole[i::count] = part
            heads[head] = whole
        given[address] = heads
    damaged = {at: reason for _, broken, _ in shares for at, reason in broken.items()}
    return given, damaged, {each: max(took[each] for *_, took in shares) for each in given}


def put_share(
    place: Path, given: dict[str, Values], damaged: dict[int, str], seconds: dict[str, float]
) -> None:
    names = [(address, head) for address, heads in given.items() for head in heads]
    np.savez(place.with_suffix(".npz"), *(given[address][head] for address, head in names))
    artifacts.write_json(place, {"names": names, "damaged": damaged, "seconds": seconds})


def get_share(place: Path) -> Said:
    facts = artifacts.read_json(place)
    given: dict[str, Values] = {}
    with np.load(place.with_suffix(".npz")) as arrays:
        for i, (address, head) in enumerate(facts["names"]):
            given.setdefault(address, {})[head] = arrays[f"arr_{i}"]
    return given, {int(at): reason for at, reason in facts["damaged"].items()}, facts["seconds"]


# --- parts ---------------------------------------------------------------------------------------------------------------


def unpack_wheels(place: Path) -> None:
    """Installed nowhere: unpacked into a temporary folder that comes first on the path. What is here already stays packed."""
    target = tempfile.mkdtemp(prefix="comp-wheels-")
    for wheel in sorted(place.glob("*.whl")):
        name, version, *_ = wheel.name.split("-")
        if _installed(name) == version:
            continue
        python, abi = wheel.stem.split("-")[-3:-1]
        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        if abi != "abi3" and not {f"cp{here.replace('.', '')}", "py3"} & set(python.split(".")):
            raise Refused(
                f"{wheel.name}: is for another Python than {here}, which runs here; "
                "set PYTHON in comp/engine/deliver/kernel.py to it, then build and push the kernel again: comp kernel NAME --push"
            )
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(target)
    sys.path.insert(0, target)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [target, os.environ.get("PYTHONPATH", "")]
    )  # loader processes, too


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def raw_folder(kaggle: Path, slug: str) -> Path:
    if (place := notebook.input_folder(slug)) is not None:
        return place
    raise Refused(
        f"{kaggle / 'input' / slug}: no such folder; add the competition {slug} to the notebook's inputs"
    )


def test_rows(cfg: Config, heads: tuple[Head, ...], several: bool) -> Samples:
    """The samples table of a test set that nobody has seen: no targets, and of training rows their metadata alone."""
    import pandas as pd

    from comp.engine.data import raw_tables

    rows = raw_tables.load_test(cfg.competition)
    mine = (rows.samples["source"] == "test").to_numpy()
    table = rows.samples[mine].reset_index(drop=True)
    if cfg.competition.metadata:
        known = samples.load().frame
        for name in cfg.competition.metadata:
            text = rows.columns[name][mine].reset_index(drop=True)
            numbers = (
                known[f"meta.{name}"].dtype.kind == "f"
            )  # as comp prepare found it over all rows at home
            table[f"meta.{name}"] = (
                pd.to_numeric(text, errors="coerce").astype("float64") if numbers else text
            )
        table = pd.concat([known, table], ignore_index=True)
    for column in dict.fromkeys(column for head in heads for column in head.columns):
        table[column] = np.nan
    return Samples(table, heads, "", several)


def here(cfg: Config, home: Any, leaf: dict[str, Any]) -> Config:
    """The run's own config on this machine: the pictures as they come, no cache, every core reads."""
    of = int(os.environ.get(SHARE, "0/1/").split("/")[1])
    network: dict[str, Any] = {"pretrained": False}
    if paths.path(BACKBONES, leaf["run"], "config.json").exists():
        network["name"] = f"local-dir:{BACKBONES}/{leaf['run']}"
    workers = max(1, hardware.cores() // of) if hardware.cores() > 1 else 0
    changes = {
        "competition": home,
        "data": cfg.data.model_copy(update={"cache": False}),
        "predict": cfg.predict.model_copy(update={"tta": leaf["tta"], "averaging_space": leaf["space"]}),
        "machine": cfg.machine.model_copy(
            update={"device": "auto", "num_workers": workers, "gpu_cache_mb": 0}
        ),
        "model": cfg.model.model_copy(update=network),
    }
    return cfg.model_copy(update=changes)


def spoken(
    cfg: Config, table: Samples, rows: Positions, leaf: dict[str, Any], prior: Values
) -> tuple[Values, dict[int, str]]:
    """What one run or member says of every row, merged over its checkpoints as at home; and what is damaged."""
    hardware.set_threads(cfg.train.threads)
    from comp import predict
    from comp.engine.bank import predictions

    made = context(cfg, table)
    said: list[Values] = []
    damaged: dict[int, str] = {}
    for seed, fold in leaf["checkpoints"]:
        weights = paths.fold_folder(leaf["run"], seed, fold) / "weights.safetensors"
        values, damaged = predict.predict(
            made,
            weights,
            rows,
            f"{leaf['address']} seed {seed} fold {fold}",
            lambda head: np.array(prior[head.name]),
        )
        said.append(values)
    heads = {}
    for head in table.heads:
        parts = [values[head.name] for values in said]
        heads[head.name] = predictions.average(parts, head, leaf["space"]).astype(np.float32)
    return heads, damaged


def context(cfg: Config, table: Samples) -> Context:
    from comp.engine.run.context import Context
    from comp.engine.run.data_loader import Loader

    device = hardware.device(cfg.machine.device)
    loader = Loader(cfg, table, device)
    no_folds: Any = None  # nothing is scored
    return Context(cfg, table, no_folds, loader, device)


def together(name: str, given: dict[str, Values], frame: pd.DataFrame) -> Values:
    from comp.engine.bank import bank
    from comp.engine.ensemble import average

    recipe = bank.folder(name) / "apply.json"
    if not recipe.exists():
        return given[name]
    return dict(average.apply(artifacts.read_json(artifacts.verified(recipe)), given, frame))


def written(cfg: Config, table: Samples, name: str, heads: Values, working: Path) -> Path:
    from comp import submission
    from comp.engine.bank.predictions import PredictionSet
    from comp.engine.data.sample_submission import load_sample

    rows = table.positions("test")
    said = PredictionSet(rows.astype(np.int32), None, heads, {"kind": "test"})
    sample = load_sample(cfg.competition)
    made, form = submission.filled(cfg, table, name, said, sample, submission.fitted_cuts)
    submission.put(working / "submission.csv", made, form, sample)
    return working / "submission.csv"


def _head(said: dict[str, Any]) -> Head:
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in said.items()
    }
    return Head(**fields)


def _report(working: Path, ids: pd.Series, heads: Values, facts: dict[str, Any]) -> None:
    """Only for a rehearsal: what it took, and what was said before it became a file."""
    if not os.environ.get("COMP_REHEARSAL"):
        return
    mine, one = (
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    peak = max(mine, one * max(1, facts["cards"]))
    artifacts.write_json(working / "report.json", {**facts, "peak": peak * 1024})
    np.savez(
        working / "said.npz",
        ids=ids.to_numpy().astype(str),
        **{f"head.{k}": v for k, v in heads.items()},
    )
