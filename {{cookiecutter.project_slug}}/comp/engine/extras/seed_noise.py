"""comp seed-noise: the standard deviation of a score over seeds, with everything else unchanged. comp runs
compares differences between runs with it, and comp compare trains the same way.

Seeds are trained in a run of their own, <experiment>-seeds, so that <experiment> itself is unchanged. A
killed call continues where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine import text_table
from comp.engine.bank import bank, score
from comp.engine.bank.metric import Metric
from comp.engine.config import resolve, run_members
from comp.engine.data import folds, samples
from comp.engine.errors import UserError
from comp.engine.run import runner
from comp.engine.store import artifacts, paths

FILE = "seed_noise.json"  # in runs/


class SeedScores(NamedTuple):
    name: str
    oof: NDArray[np.float64]  # (seeds,): over all OOF rows
    folds: NDArray[np.float64]  # (seeds, folds)


def seed_noise(experiment: str, seeds: int) -> dict[str, Any]:
    if seeds < 2:
        raise UserError(
            "seeds-too-few", where=f"--seeds {seeds}", what="one seed has no deviation", remedy="--seeds 5"
        )
    scores, metric = train_seeds(experiment, seeds), current_metric()
    record = {
        "run": f"{experiment}{run_members.SEEDS}",
        "experiment": experiment,
        "metric": metric.name,
        "seeds": seeds,
        "scores": scores.oof.tolist(),
        "mean": float(scores.oof.mean()),
        "std": float(scores.oof.std(ddof=1)),
        "fold_std": float(scores.folds.std(axis=0, ddof=1).mean()),
        "folds": artifacts.manifest_entry(paths.folds_file()),
    }
    artifacts.write_json(paths.path("runs", FILE), record)
    heading = ["", f"{metric.name} OOF", *(f"fold {k}" for k in range(scores.folds.shape[1]))]
    rows = [
        [f"seed {s}", f"{v:.4f}", *(f"{f:.4f}" for f in scores.folds[s])] for s, v in enumerate(scores.oof)
    ]
    print(text_table.render(heading, rows))
    print(summary(record))
    print(f"written: runs/{FILE}\nnext: comp runs, which compares every difference with it")
    return record


def summary(record: dict[str, Any]) -> str:
    return (
        f"seed noise of {record['experiment']}: ± {record['std']:.4f} ({record['seeds']} seeds); "
        f"a difference below {_threshold(record):.4f} between two runs of one seed each is not significant"
    )


def _threshold(record: dict[str, Any]) -> float:
    """Two standard deviations of a difference, which has twice the variance of one score."""
    return float(2 * 2**0.5 * record["std"])


def differences(metric: Metric, scored: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """For comp runs: the difference of each run to the baseline of comp seed-noise. `scored`: (name,
    score.json)."""
    file = paths.path("runs", FILE)
    record = artifacts.read_json(file) if file.exists() else None
    if record is None:
        return ["to compare differences with the noise of seeds: comp seed-noise exp001"]
    if record["metric"] != metric.name or record["folds"] != artifacts.manifest_entry(paths.folds_file()):
        return [
            f"runs/{FILE} is of another metric or other folds: comp seed-noise {record['experiment']} again"
        ]
    lines = [summary(record)]
    for name, score_record in scored:
        gain = metric.sign * (score_record["oof"] - record["mean"])
        if name not in (record["experiment"], record["run"]) and record["std"] > 0:
            verdict = "within seed noise" if abs(gain) < _threshold(record) else "more than seed noise"
            lines.append(f"  {name}: {gain:+.4f} against {record['experiment']}, {verdict}")
    return lines


def train_seeds(experiment: str, seeds: int) -> SeedScores:
    """Trains what is missing, and scores every fold of every seed on its own OOF rows."""
    name = f"{experiment}{run_members.SEEDS}"
    for seed in range(seeds):
        runner.train(experiment, [], name=name, seed=seed, any_seed=True)
    rows = samples.load()
    split = folds.load(rows)
    cfg = resolve.load(paths.root(), "base").config
    oof, by_fold = [], np.zeros((seeds, split.count))
    for seed in range(seeds):
        for fold in range(split.count):
            stored = bank.read(paths.fold_folder(name, seed, fold) / "oof.arrow", rows, split)
            at = stored.row.astype(np.int64)
            of_heads = [
                score.validation_score(cfg, head, stored.heads[head.name], rows, at) for head in rows.heads
            ]
            by_fold[seed, fold] = float(np.mean(of_heads))
        address = f"{name}:seed{seed}" if seeds > 1 else name
        record = score.evaluate(cfg, rows, split, bank.load(address, "oof", rows, split))
        if record["oof"] is None:
            raise UserError("score-undefined", where=address, what=score.summary(record))
        oof.append(record["oof"])
    return SeedScores(experiment, np.array(oof), by_fold)


def current_metric() -> Metric:
    return score.metric_of(resolve.load(paths.root(), "base").config)
