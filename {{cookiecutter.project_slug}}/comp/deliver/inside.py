"""comp predict --kernel: what the notebook runs on Kaggle. The bundle is the project, read-only; the test set is whatever
lies there now, with other ids and of another size than at home; the one thing written is submission.csv.

Runs under the older versions of Kaggle's image, makes every model with pretrained=False, and touches no network.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comp import config, machine, store
from comp.config import Config, Refused
from comp.samples import Samples
from comp.tasks import Head

if TYPE_CHECKING:
    import pandas as pd

    from comp.train.loop import Material

Values = dict[str, Any]  # head -> (rows, outputs)


def predict() -> Path:
    began = time.perf_counter()
    bundle = Path(__file__).resolve().parents[2]
    if not (bundle / "bundle.json").exists():
        raise Refused("--kernel: only the folder that comp kernel NAME makes can be run this way")
    os.environ["COMP_ROOT"] = str(bundle)
    store.root.cache_clear()
    os.environ["HF_HUB_OFFLINE"] = "1"  # whatever asks a hub is told at once that there is none
    unpack_wheels(bundle / "wheels")
    kaggle = Path(os.environ.get("COMP_KAGGLE", "/kaggle"))
    about = store.read_json(bundle / "bundle.json")
    base = config.load(store.root(), "base").config
    home = base.competition.model_copy(update={"raw": str(raw_folder(kaggle, about["competition"]))})
    table = test_rows(
        base.model_copy(update={"competition": home}), tuple(_head(each) for each in about["heads"])
    )
    print(f"{about['name']}: {len(table.frame)} test rows, {len(about['leaves'])} models", flush=True)
    ready = time.perf_counter() - began
    given: dict[str, Values] = {}
    seconds: dict[str, float] = {}
    damaged: dict[int, str] = {}
    for leaf in about["leaves"]:
        start = time.perf_counter()
        cfg = config.from_yaml(store.verified(store.run_folder(leaf["run"]) / "config.yaml"))
        given[leaf["address"]], broken = spoken(here(cfg, home, leaf), table, leaf, about["prior"])
        damaged |= broken
        seconds[leaf["address"]] = time.perf_counter() - start
        print(f"{leaf['address']}: {seconds[leaf['address']]:.0f} s", flush=True)
    file = written(
        base.model_copy(update={"competition": home}),
        table,
        about["name"],
        together(about["name"], given),
        kaggle / "working",
    )
    for place, reason in sorted(damaged.items())[:20]:
        print(f"damaged: {table.frame['id'].iloc[place]}: {reason}; it got the mean of the labels")
    if len(damaged) > 20:
        print(f"and {len(damaged) - 20} more damaged pictures")
    _report(
        kaggle / "working",
        table,
        together(about["name"], given),
        {"ready": ready, "seconds": seconds, "rows": len(table.frame), "damaged": len(damaged)},
    )
    print(f"written: {file}, {len(table.frame)} rows, validated")
    return file


def unpack_wheels(place: Path) -> None:
    """Installed nowhere: unpacked into a temporary folder that comes first on the path. What is here already stays packed."""
    target = tempfile.mkdtemp(prefix="comp-wheels-")
    for wheel in sorted(place.glob("*.whl")):
        name, version, *_ = wheel.name.split("-")
        if _installed(name) == version:
            continue
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
    for place in (kaggle / "input" / slug, kaggle / "input" / "competitions" / slug):
        if place.is_dir():
            return place
    raise Refused(
        f"{kaggle / 'input' / slug}: no such folder; add the competition {slug} to the notebook's inputs"
    )


def test_rows(cfg: Config, heads: tuple[Head, ...]) -> Samples:
    """The samples table of a test set that nobody has seen: no targets, no training rows."""
    from comp.prepare import sources

    rows = sources.tests(cfg.competition)
    mine = (rows.samples["source"] == "test").to_numpy()
    table = rows.samples[mine].reset_index(drop=True)
    for name in cfg.competition.metadata:
        table[f"meta.{name}"] = _feature(rows.columns[name][mine].reset_index(drop=True))
    for column in dict.fromkeys(column for head in heads for column in head.columns):
        table[column] = np.nan
    return Samples(table, heads, "")


def _feature(text: pd.Series) -> Any:
    """As comp prepare does it: numbers where every value is one."""
    import pandas as pd

    numbers = pd.to_numeric(text, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    return numbers if (np.isfinite(numbers) | text.isna().to_numpy()).all() else text.to_numpy()


def here(cfg: Config, home: Any, leaf: dict[str, Any]) -> Config:
    """The run's own config on this machine: the pictures as they come, no cache, every core reads."""
    workers = machine.cores() if machine.cores() > 1 else 0
    changes = {
        "competition": home,
        "data": cfg.data.model_copy(update={"cache": False}),
        "predict": cfg.predict.model_copy(update={"tta": leaf["tta"], "space": leaf["space"]}),
        "machine": cfg.machine.model_copy(update={"device": "auto", "workers": workers, "resident": 0}),
        "model": cfg.model.model_copy(update={"pretrained": False}),
    }
    return cfg.model_copy(update=changes)


def spoken(cfg: Config, table: Samples, leaf: dict[str, Any], prior: Values) -> tuple[Values, dict[int, str]]:
    """What one run or member says of every row, merged over its checkpoints as at home; and what is damaged."""
    machine.settle(cfg.train.threads)
    from comp import predictions
    from comp.predict import infer

    made, rows = material(cfg, table), table.positions("test")
    said: list[Values] = []
    damaged: dict[int, str] = {}
    for seed, fold in leaf["checkpoints"]:
        weights = store.fold_folder(leaf["run"], seed, fold) / "weights.safetensors"
        values, damaged = infer.predict(
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


def material(cfg: Config, table: Samples) -> Material:
    from comp.train.clock import Clock
    from comp.train.data import Feed
    from comp.train.loop import Material

    device = machine.device(cfg.machine.device)
    feed = Feed(cfg, table, device)
    no_folds: Any = None  # nothing is scored
    return Material(cfg, table, no_folds, feed, device, machine.Stop(), Clock(device))


def together(name: str, given: dict[str, Values]) -> Values:
    from comp import bank
    from comp.ensemble import average

    recipe = bank.folder(name) / "apply.json"
    if not recipe.exists():
        return given[name]
    return dict(average.apply(store.read_json(store.verified(recipe)), given))


def written(cfg: Config, table: Samples, name: str, heads: Values, working: Path) -> Path:
    from comp.deliver import submission
    from comp.deliver.sample import read_sample
    from comp.predictions import PredictionSet

    rows = table.positions("test")
    said = PredictionSet(rows.astype(np.int32), None, heads, {"kind": "test"})
    sample = read_sample(Path(cfg.competition.raw) / cfg.competition.submission.sample, cfg.competition.id)
    made, form = submission.filled(cfg, table, name, said, sample)
    submission.put(working / "submission.csv", made, form, sample)
    return working / "submission.csv"


def _head(said: dict[str, Any]) -> Head:
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in said.items()
    }
    return Head(**fields)


def _report(working: Path, table: Samples, heads: Values, facts: dict[str, Any]) -> None:
    """Only for a rehearsal: what it took, and what was said before it became a file."""
    if not os.environ.get("COMP_REHEARSAL"):
        return
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    store.write_json(working / "report.json", {**facts, "peak": peak * 1024})
    np.savez(
        working / "said.npz",
        ids=table.frame["id"].to_numpy().astype(str),
        **{f"head.{k}": v for k, v in heads.items()},
    )
