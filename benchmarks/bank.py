"""How long 200 prediction sets of 100,000 rows x 5 outputs take to load, as multiples of copying the same bytes.

    .venv/bin/python benchmarks/bank.py

All variants take turns in one process, medians are compared, JSON comes out. Bars: 3 once hashes are noted, 15 for the first,
checking read of a process.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"
PROJECT = Path(__file__).resolve().parent.parent / "{{cookiecutter.project_slug}}"
sys.path.insert(0, str(PROJECT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from comp.engine.bank import bank, predictions  # noqa: E402
from comp.engine.data import folds, samples  # noqa: E402
from comp.engine.store import artifacts  # noqa: E402
from comp.engine.tasks import kinds  # noqa: E402

MEMBERS, ROWS, OUTPUTS, ROUNDS = 200, 100_000, 5, 9


def lay_out(root: Path) -> tuple[samples.Samples, folds.Folds, list[str]]:
    (root / "configs").mkdir()
    (root / "configs" / "base.yaml").touch()
    names = tuple(f"class{i}" for i in range(OUTPUTS))
    head = kinds.Head("label", "multiclass", names, ("target.label",), names)
    ids = [f"{i:06d}" for i in range(ROWS)]
    frame = pd.DataFrame(
        {
            "id": ids,
            "images": [["x.png"]] * ROWS,
            "source": "train",
            "row": ids,
            "weight": 1.0,
            "target.label": 0.0,
        }
    )
    samples.save(frame, (head,))
    table = samples.load()
    lines = pd.DataFrame({"id": ids, "repeat": 0, "fold": np.arange(ROWS) % 5})
    folds.save(
        lines,
        {
            "scheme": "kfold",
            "k": 5,
            "repeats": 1,
            "seed": 0,
            "rule": "others",
            "gap": 0.0,
            "samples": table.hash,
        },
    )
    split = folds.load(table)
    rows = predictions.rows_of("oof", table, split)
    fold = split.assignment[0][rows].astype(np.int16)
    random, addresses = np.random.default_rng(0), []
    for i in range(MEMBERS):
        addresses.append(f"exp{i:03d}")
        values = {"label": random.normal(size=(ROWS, OUTPUTS)).astype(np.float32)}
        facts = {"run": addresses[-1], "member": "", "config": "0" * 16}
        said = predictions.PredictionSet(
            rows.astype(np.int32), fold, values, predictions.build_meta("oof", table, split, facts)
        )
        bank.write(bank.folder(addresses[-1]) / "oof.arrow", said)
    return table, split, addresses


def main() -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        os.environ["COMP_ROOT"] = folder
        table, split, addresses = lay_out(Path(folder))
        source = np.ones((MEMBERS, ROWS, OUTPUTS), np.float32)
        target = np.ones_like(source)

        def copy() -> None:
            np.copyto(target, source)

        def noted() -> None:
            for i, each in enumerate(bank.load_all(addresses, "oof", table, split)):
                target[i] = each.heads["label"]

        def first() -> None:
            artifacts._hashes.clear(), artifacts._verified.clear()
            noted()

        def mapped() -> None:
            bank.load_all(addresses, "oof", table, split)

        variants: dict[str, Callable[[], None]] = {
            "copy": copy,
            "noted": noted,
            "first": first,
            "mapped": mapped,
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(ROUNDS + 1):
            for name, variant in variants.items():
                gc.collect()
                began = time.perf_counter()
                variant()
                if number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - began)
        said = bank.load(addresses[-1], "oof", table, split).heads["label"]
        assert (target[-1] == said).all() and not said.flags.owndata
    middle = {name: median(each) for name, each in seconds.items()}
    print(
        json.dumps(
            {
                "what": f"{MEMBERS} sets x {ROWS} rows x {OUTPUTS} float32 into one array",
                "copy_seconds": round(middle["copy"], 4),
                "noted_ratio": round(middle["noted"] / middle["copy"], 2),
                "noted_bar": 3,
                "first_ratio": round(middle["first"] / middle["copy"], 2),
                "first_bar": 15,
                "mapped_only_ratio": round(middle["mapped"] / middle["copy"], 2),
                "rounds": ROUNDS,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
