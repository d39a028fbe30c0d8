"""The last look: what a run scores on the rows that were locked away. Every look makes the next one worth less, so each is
written down beside the run."""

from __future__ import annotations

import numpy as np

from comp import predict
from comp.engine.bank import predictions, score
from comp.engine.config import experiments
from comp.engine.errors import Refused
from comp.engine.run.context import Context
from comp.engine.store import artifacts, paths


def score_holdout(context: Context, run: str) -> str:
    cfg, samples, folds = context.cfg, context.samples, context.folds
    rows = folds.holdout_rows()
    if not len(rows):
        raise Refused(
            "data/folds.parquet: no row is locked away; folds.holdout in configs/competition.yaml says how many are"
        )
    parts = [
        (seed, number)
        for seed in experiments.seeds(run)
        for number in experiments.finished_folds(run, seed, range(folds.count))
    ]
    if not parts:
        raise experiments.missing_predictions(run, "weights to look with")
    said = []
    for seed, number in parts:
        weights = paths.fold_folder(run, seed, number) / "weights.safetensors"
        said.append(predict.predict(context, weights, rows, f"locked rows, seed {seed} fold {number}")[0])
    lines = []
    metric = score.metric_of(cfg)
    for head in samples.heads:
        stored = predictions.average([each[head.name] for each in said], head, cfg.predict.averaging_space)
        value = score.validation_score(cfg, head, np.asarray(stored), samples, rows)
        lines.append(f"{head.name}: {metric.name} {value:.4f}")
    looks = paths.run_folder(run) / "last_looks.txt"
    count = 1 + (len(looks.read_text().splitlines()) if looks.exists() else 0)
    line = f"{', '.join(lines)} on {len(rows)} locked rows, look number {count}"
    artifacts.write_text(looks, (looks.read_text() if looks.exists() else "") + line + "\n")
    return line
