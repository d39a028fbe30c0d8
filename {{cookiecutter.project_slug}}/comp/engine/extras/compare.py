"""comp seed-noise and comp compare: the same recipe under other seeds, and recipes side by side, paired by seed and fold.

Both train runs of their own, <experiment>-seeds, so that exp001 stays what it was; killed, they go on where they were.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine import hardware, text_table
from comp.engine.bank import bank, nested_cv, score
from comp.engine.config import experiments, resolve
from comp.engine.data import folds, samples
from comp.engine.errors import Refused
from comp.engine.run import runner
from comp.engine.store import artifacts, paths
from comp.metrics import Metric

NOISE = "noise.json"  # runs/noise.json: the yardstick that comp runs prints


class Seeded(NamedTuple):
    name: str
    whole: NDArray[np.float64]  # (seeds,): over all OOF rows
    folds: NDArray[np.float64]  # (seeds, folds)


def noise(experiment: str, seeds: int) -> dict[str, Any]:
    """How far the score of one and the same recipe moves by its seed alone."""
    if seeds < 2:
        raise Refused("--seeds: one seed has no spread; take 5")
    said, metric = scored(experiment, seeds), _metric()
    std = float(said.whole.std(ddof=1))
    record = {
        "run": f"{experiment}-seeds", "experiment": experiment, "metric": metric.name, "seeds": seeds, "scores": said.whole.tolist(),
        "mean": float(said.whole.mean()), "std": std, "fold_std": float(said.folds.std(axis=0, ddof=1).mean()),
        "folds": artifacts.manifest_entry(paths.folds_file()),
    }  # fmt: skip
    artifacts.write_json(paths.path("runs", NOISE), record)
    rows = [[f"seed {s}", f"{v:.4f}", *(f"{f:.4f}" for f in said.folds[s])] for s, v in enumerate(said.whole)]
    print(
        text_table.render(
            ["", f"{metric.name}, all rows", *(f"fold {k}" for k in range(said.folds.shape[1]))], rows
        )
    )
    print(yardstick(record))
    print(f"written: runs/{NOISE}\nnext: comp runs, which now measures every difference by it")
    return record


def yardstick(record: dict[str, Any]) -> str:
    """Two runs of one seed each differ by twice the variance of one."""
    bar = 2 * 2**0.5 * record["std"]
    return (
        f"seeds alone move {record['experiment']} by ± {record['std']:.4f} ({record['seeds']} seeds): "
        f"between two runs of one seed a difference below {bar:.4f} says nothing"
    )


def by_yardstick(metric: Metric, scored: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """For comp runs: differences to the baseline of comp seed-noise, in what seeds alone do. scored: (name, score.json)."""
    file = paths.path("runs", NOISE)
    record = artifacts.read_json(file) if file.exists() else None
    if record is None:
        return ["is a difference more than its seed? comp seed-noise exp001 measures what seeds alone do"]
    if record["metric"] != metric.name or record["folds"] != artifacts.manifest_entry(paths.folds_file()):
        return [
            f"runs/{NOISE} is about another metric or other folds: comp seed-noise {record['experiment']} again"
        ]
    lines, bar = [yardstick(record)], 2 * 2**0.5 * record["std"]
    for name, each in scored:
        gain = metric.sign * (each["oof"] - record["mean"])
        if name not in (record["experiment"], record["run"]) and record["std"] > 0:
            says = "within seed noise" if abs(gain) < bar else "more than seed noise"
            lines.append(f"  {name}: {gain:+.4f} against {record['experiment']}, {says}")
    return lines


def scored(experiment: str, seeds: int) -> Seeded:
    """Train what is missing, and score every (seed, fold) by its own OOF rows."""
    name = f"{experiment}-seeds"
    for seed in range(seeds):
        runner.train(experiment, [], name=name, seed=seed)
    rows = samples.load()
    split = folds.load(rows)
    cfg = resolve.load(paths.root(), "base").config
    whole, table_ = [], np.zeros((seeds, split.count))
    for seed in range(seeds):
        for number in range(split.count):
            said = bank.read(paths.fold_folder(name, seed, number) / "oof.arrow", rows, split)
            at = said.row.astype(np.int64)
            each = [score.validation_score(cfg, head, said.heads[head.name], rows, at) for head in rows.heads]
            table_[seed, number] = float(np.mean(each))
        address = f"{name}:seed{seed}" if seeds > 1 else name
        record = score.evaluate(cfg, rows, split, bank.load(address, "oof", rows, split))
        if record["oof"] is None:
            raise Refused(f"{address}: {score.summary(record)}")
        whole.append(record["oof"])
    return Seeded(experiment, np.array(whole), table_)


def _metric() -> Metric:
    return score.metric_of(resolve.load(paths.root(), "base").config)


# --- recipes side by side ------------------------------------------------------------------------------------------------


def compare(names: list[str], seeds: int) -> list[dict[str, Any]]:
    if len(names) < 2 or len(set(names)) < len(names):
        raise Refused("comp compare takes two or more different experiments, like exp001 exp002")
    hardware.set_threads(experiments.load(names[0]).config.train.threads)
    said = [scored(each, seeds) for each in names]
    metric = _metric()
    lines = [
        [
            s.name,
            f"{s.whole.mean():.4f}" + (f" ± {s.whole.std(ddof=1):.4f}" if seeds > 1 else ""),
            f"{s.folds.mean():.4f}",
        ]
        for s in said
    ]
    print(
        text_table.render(["experiment", f"{metric.name}, all rows, {seeds} seeds", "mean of folds"], lines)
    )
    records = []
    for a, b in itertools.combinations(said, 2):
        found = difference(metric.sign * (b.folds - a.folds))
        records.append({"a": a.name, "b": b.name, "metric": metric.name, **found})
        print(f"{b.name} against {a.name}: {found['text']}")
    name = "-".join(names)
    folder = paths.path("runs", "comparisons")
    artifacts.write_json(folder / f"{name}.json", records)
    plot(said, metric, folder / f"{name}.png")
    best = max(said, key=lambda s: metric.sign * s.folds.mean())
    print(f"written: runs/comparisons/{name}.json, {name}.png\nnext: comp train {best.name}")
    return records


def difference(gains: NDArray[np.float64]) -> dict[str, Any]:
    """gains: (seeds, folds), above 0 where the second is better. Pairs of one seed or of one fold go together, so both means
    are looked at and the larger error is believed: folds share rows, seeds share everything else."""
    from scipy.stats import t

    seeds, count = gains.shape
    mean = float(gains.mean())
    errors = [float(gains.mean(axis=0).std(ddof=1) / np.sqrt(count))]
    if seeds > 1:
        errors.append(float(gains.mean(axis=1).std(ddof=1) / np.sqrt(seeds)))
    error = max(errors)
    freedom = (count if error == errors[0] else seeds) - 1
    reach = float(t.ppf(0.95, freedom)) * error
    share = float(t.cdf(mean / error, freedom)) if error > 0 else float((np.sign(mean) + 1) / 2)
    low, high = mean - reach, mean + reach
    pair = nested_cv.Paired(mean, error, share, low, high, gains.size)
    return {
        "difference": mean, "error": error, "low": low, "high": high, "share": share, "significant": pair.significant,
        "wins": int((gains > 0).sum()), "pairs": gains.size,
        "text": f"{pair}, 90 % interval {low:+.4f} to {high:+.4f}, better in {int((gains > 0).sum())} of {gains.size} pairs",
    }  # fmt: skip


def plot(said: list[Seeded], metric: Metric, file: Path) -> None:
    """A line for every (seed, fold): what recipes share rises and falls together."""
    from comp.engine.report import plots

    figure, axes = plots.new_figure(1.6 * len(said) + 3, 4.5)
    values = np.stack([s.folds.ravel() for s in said])  # (experiments, pairs)
    axes.plot(range(len(said)), values, color="grey", linewidth=0.6, alpha=0.6, marker="o", markersize=3)
    axes.plot(range(len(said)), values.mean(axis=1), color="black", linewidth=2, marker="o")
    axes.set_xticks(range(len(said)), [s.name for s in said])
    axes.set(ylabel=metric.name)
    axes.set_title(f"{len(said[0].folds)} seeds x {said[0].folds.shape[1]} folds, paired", fontsize=10)
    plots.save(figure, file)
