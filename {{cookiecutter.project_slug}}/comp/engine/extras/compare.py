"""comp compare: experiments trained on the same seeds and folds, and compared in pairs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine import hardware, text_table
from comp.engine.bank import nested_cv
from comp.engine.bank.metric import Metric
from comp.engine.config import experiments
from comp.engine.errors import UserError
from comp.engine.extras import seed_noise
from comp.engine.extras.seed_noise import SeedScores
from comp.engine.store import artifacts, paths


def compare(names: list[str], seeds: int) -> list[dict[str, Any]]:
    """Trains experiments x seeds x folds, each fold only once; a killed call continues where it was."""
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(
            "experiments-too-few",
            where=f"comp compare {' '.join(names)}",
            what="needs two or more different experiments",
            remedy="comp compare exp001 exp002",
        )
    configs = [experiments.load(name).config for name in names]
    hardware.set_threads(configs[0].train.threads)
    folds = experiments.fold_count(configs[0])
    print(
        f"{len(names) * seeds * folds} folds to train, less those that are finished "
        f"({len(names)} experiments x {seeds} seeds x {folds} folds)",
        flush=True,
    )
    scores = [seed_noise.train_seeds(name, seeds) for name in names]
    metric = seed_noise.current_metric()
    lines = [
        [
            s.name,
            f"{s.oof.mean():.4f}" + (f" ± {s.oof.std(ddof=1):.4f}" if seeds > 1 else ""),
            f"{s.folds.mean():.4f}",
        ]
        for s in scores
    ]
    heading = ["experiment", f"{metric.name} OOF, mean of {seeds} seeds", "mean of folds"]
    print(text_table.render(heading, lines))
    records = []
    for a, b in itertools.combinations(scores, 2):
        result = difference(metric.sign * (b.folds - a.folds))
        records.append({"a": a.name, "b": b.name, "metric": metric.name, **result})
        print(f"{b.name} against {a.name}: {result['text']}")
    name = "-".join(names)
    folder = paths.path("runs", "comparisons")
    artifacts.write_json(folder / f"{name}.json", records)
    plot(scores, metric, folder / f"{name}.png")
    best = max(scores, key=lambda s: metric.sign * s.folds.mean())
    print(f"written: runs/comparisons/{name}.json, {name}.png\nnext: comp train {best.name}")
    return records


def difference(gains: NDArray[np.float64]) -> dict[str, Any]:
    """The mean gain with its error, a t interval and whether it is significant.

    `gains`: (seeds, folds), above 0 where the second is better. Gains of one seed, and of one fold, are
    correlated, so the standard error is the larger of those over folds and over seeds: folds share rows,
    seeds share everything else.
    """
    from scipy.stats import t

    seeds, folds = gains.shape
    mean = float(gains.mean())
    errors = [float(gains.mean(axis=0).std(ddof=1) / np.sqrt(folds))]
    if seeds > 1:
        errors.append(float(gains.mean(axis=1).std(ddof=1) / np.sqrt(seeds)))
    error = max(errors)
    degrees = (folds if error == errors[0] else seeds) - 1
    half_width = float(t.ppf(0.95, degrees)) * error
    share = float(t.cdf(mean / error, degrees)) if error > 0 else float((np.sign(mean) + 1) / 2)
    low, high = mean - half_width, mean + half_width
    pair = nested_cv.Paired(mean, error, share, low, high, gains.size)
    wins = int((gains > 0).sum())
    return {
        "difference": mean,
        "error": error,
        "low": low,
        "high": high,
        "share": share,
        "significant": pair.significant,
        "wins": wins,
        "pairs": gains.size,
        "text": f"{pair}, 90 % CI {low:+.4f} to {high:+.4f}, better in {wins} of {gains.size} pairs",
    }


def plot(scores: list[SeedScores], metric: Metric, file: Path) -> None:
    """A grey line for every (seed, fold), a black one for their mean. Parallel grey lines: the difference is
    the same everywhere."""
    from comp.engine.report import plots

    figure, axes = plots.new_figure(1.6 * len(scores) + 3, 4.5)
    values = np.stack([s.folds.ravel() for s in scores])  # (experiments, pairs)
    axes.plot(range(len(scores)), values, color="grey", linewidth=0.6, alpha=0.6, marker="o", markersize=3)
    axes.plot(range(len(scores)), values.mean(axis=1), color="black", linewidth=2, marker="o")
    axes.set_xticks(range(len(scores)), [s.name for s in scores])
    axes.set(ylabel=metric.name)
    axes.set_title(f"{len(scores[0].folds)} seeds x {scores[0].folds.shape[1]} folds, paired", fontsize=10)
    plots.save(figure, file)
