"""For comp audit: the score of a fold against its log."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from comp.engine.bank import bank, score
from comp.engine.config import run_members
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.extras.findings import EPOCH, Leak
from comp.engine.store import paths


def selected_epoch(folder: Path, cfg: Config, rows: Samples, split: Folds) -> list[Leak]:
    """The score of the OOF rows must be what the log has for the last epoch, not for a better one before
    it."""
    log = folder / "log.jsonl"
    if (
        not log.exists()
        or cfg.predict.tta != ["identity"]
        or len(rows.heads) > 1
        or run_members.selected_by_score(cfg)
    ):
        return []  # a selection by config was made on other rows, or is marked
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"valid_metric"' in line]
    by_epoch = {line["epoch"]: line["valid_metric"] for line in lines if "epoch" in line}
    if len(by_epoch) < 2:
        return []
    stored = bank.read(folder / "oof.arrow", rows, split)
    now = score.validation_score(
        cfg, rows.heads[0], stored.heads[rows.heads[0].name], rows, stored.row.astype(np.int64)
    )
    *before, last = sorted(by_epoch)
    metric = score.metric_of(cfg)
    best = max(by_epoch, key=lambda e: metric.sign * by_epoch[e])
    near = 1e-6 + 1e-3 * abs(now)
    if best in before and abs(now - by_epoch[best]) < near < abs(now - by_epoch[last]):
        where = f"{paths.relative(folder)}: the score of epoch {best}, not of the last, {last}"
        return [Leak(EPOCH, where, "provenance")]
    return []
