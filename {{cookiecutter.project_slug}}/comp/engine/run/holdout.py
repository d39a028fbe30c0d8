"""Score a run on the held-out rows (folds.holdout). Each look makes the next one less trustworthy, so each is
recorded in runs/<run>/last_looks.txt."""

from __future__ import annotations

import numpy as np

from comp import predict
from comp.engine.bank import predictions, score
from comp.engine.config import experiments
from comp.engine.errors import UserError
from comp.engine.run.context import Context
from comp.engine.store import artifacts, paths


def score_holdout(context: Context, run: str) -> str:
    """Returns the scores as one line. The prediction is the mean of all finished seeds and folds."""
    cfg, samples, folds = context.cfg, context.samples, context.folds
    rows = folds.holdout_rows()
    if not len(rows):
        raise UserError(
            "holdout-missing",
            where="data/folds.parquet",
            what="no row is held out",
            remedy="set folds.holdout in configs/competition.yaml",
        )
    parts = [
        (seed, fold)
        for seed in experiments.seeds(run)
        for fold in experiments.finished_folds(run, seed, range(folds.count))
    ]
    if not parts:
        raise experiments.missing_predictions(run, "trained weights")
    outputs = []
    for seed, fold in parts:
        weights = paths.fold_folder(run, seed, fold) / "weights.safetensors"
        outputs.append(predict.predict(context, weights, rows, f"held-out rows, seed {seed} fold {fold}")[0])
    scores = []
    metric = score.metric_of(cfg)
    for head in samples.heads:
        mean = predictions.average([each[head.name] for each in outputs], head, cfg.predict.averaging_space)
        value = score.validation_score(cfg, head, np.asarray(mean), samples, rows)
        scores.append(f"{head.name}: {metric.name} {value:.4f}")
    record = paths.run_folder(run) / "last_looks.txt"
    before = record.read_text() if record.exists() else ""
    line = f"{', '.join(scores)} on {len(rows)} held-out rows, look {len(before.splitlines()) + 1}"
    artifacts.write_text(record, before + line + "\n")
    return line
