"""comp predict --kernel: what the notebook runs on Kaggle. The bundle is the project, read-only; the only
file written is submission.csv.

Runs with the older package versions of Kaggle's image, builds every model with pretrained=False, and uses no
network.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comp.engine.config.schema import Config
from comp.engine.data.samples import Samples
from comp.engine.deliver import kernel_inputs, kernel_models
from comp.engine.deliver.kernel_models import Values
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pandas as pd

MAX_REPORTED = 20  # damaged images


def predict() -> Path:
    began = time.perf_counter()
    root = Path(__file__).resolve().parents[3]
    if not (root / "bundle.json").exists():
        raise UserError(
            "kernel-bundle", where="--kernel", what="works only in the bundle that comp kernel NAME builds"
        )
    os.environ["COMP_ROOT"] = str(root)
    paths.root.cache_clear()
    os.environ["HF_HUB_OFFLINE"] = "1"  # so that no library waits for a connection
    kernel_inputs.unpack_wheels(root / "wheels")
    kaggle = Path(os.environ.get("COMP_KAGGLE", "/kaggle"))
    bundle = artifacts.read_json(root / "bundle.json")
    cfg = kernel_inputs.competition_config(kaggle, bundle["competition"])
    competition = cfg.competition
    heads = tuple(kernel_inputs.head_of(fields) for fields in bundle["heads"])
    table = kernel_inputs.test_rows(cfg, heads, bundle["multi_image"])
    rows = table.positions("test")
    start_seconds = time.perf_counter() - began
    if share := os.environ.get(kernel_models.SHARE):
        return kernel_models.predict_share(share, bundle, competition, table, rows)
    print(f"{bundle['name']}: {len(rows)} test rows, {len(bundle['member_runs'])} models", flush=True)
    predicted, gpus = kernel_models.predict_all(bundle, competition, table, rows)
    values = blend(bundle["name"], predicted.values, table.frame.iloc[rows])
    file = write(cfg, table, bundle["name"], values, kaggle / "working")
    _print_damaged(predicted.damaged, table.frame["id"])
    report = {
        "start_seconds": start_seconds,
        "seconds": predicted.seconds,
        "rows": len(rows),
        "damaged": len(predicted.damaged),
        "gpus": gpus,
    }
    _report(kaggle / "working", table.frame["id"].iloc[rows], values, report)
    print(f"written: {file}, {len(rows)} rows, validated")
    return file


def blend(name: str, values: dict[str, Values], frame: pd.DataFrame) -> Values:
    """The predictions of the ensemble from those of its member runs; of a single run its own."""
    from comp.engine.bank import bank
    from comp.engine.ensemble import average

    recipe = bank.folder(name) / "apply.json"
    if not recipe.exists():
        return values[name]
    return dict(average.apply(artifacts.read_json(artifacts.verified(recipe)), values, frame))


def write(cfg: Config, table: Samples, name: str, values: Values, working: Path) -> Path:
    """submission.csv."""
    from comp import submission
    from comp.engine.bank.predictions import PredictionSet
    from comp.engine.data.sample_submission import load_sample

    rows = table.positions("test")
    prediction = PredictionSet(rows.astype(np.int32), None, values, {"kind": "test"})
    sample = load_sample(cfg.competition)
    made, rules = submission.make_lines(cfg, table, name, prediction, sample, submission.fitted_cuts)
    submission.save(working / "submission.csv", made, rules, sample)
    return working / "submission.csv"


def _print_damaged(damaged: dict[int, str], ids: pd.Series) -> None:
    for row, reason in sorted(damaged.items())[:MAX_REPORTED]:
        print(f"damaged image: {ids.iloc[row]}: {reason}; predicted the mean of the training labels")
    if len(damaged) > MAX_REPORTED:
        print(f"and {len(damaged) - MAX_REPORTED} more damaged images")


def _report(working: Path, ids: pd.Series, values: Values, report: dict[str, Any]) -> None:
    """In a rehearsal only: time, memory, and the predictions behind submission.csv."""
    if not os.environ.get("COMP_REHEARSAL"):
        return
    own, child = (
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    peak = max(own, child * max(1, report["gpus"]))
    artifacts.write_json(working / "report.json", {**report, "peak": peak * 1024})
    np.savez(
        working / "predictions.npz",
        ids=ids.to_numpy().astype(str),
        **{f"head.{name}": value for name, value in values.items()},
    )
