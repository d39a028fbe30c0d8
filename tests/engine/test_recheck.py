"""The recheck: eight rows predicted again with at most ten checkpoints."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_submission import refusal

from comp.engine.deliver.recheck import Checkpoint, compare

# --- predict again ------------------------------------------------------------------------------------------


def stored(folds: int = 15, rows: int = 40) -> dict[Checkpoint, tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0)
    return {Checkpoint("exp001", 0, fold): (np.arange(rows), draw.random((rows, 3))) for fold in range(folds)}


def test_the_same_eight_rows_and_ten_checkpoints_each_time() -> None:
    ids, values = [f"id{i}" for i in range(40)], stored()
    asked: dict[Checkpoint, list[int]] = {}

    def again(checkpoint: Checkpoint, rows: np.ndarray) -> np.ndarray:
        asked[checkpoint] = rows.tolist()
        return values[checkpoint][1][rows] + 5e-6

    line = compare("blend", values, again, lambda checkpoint: 1e-5, ids)
    assert "8 rows" in line and "10 of 15" in line
    assert len(asked) == 10 and all(rows == next(iter(asked.values())) for rows in asked.values())
    assert len(set(next(iter(asked.values())))) == 8
    first = dict(asked)
    compare("blend", values, again, lambda checkpoint: 1e-5, ids)
    assert asked == first
    asked.clear()
    compare("other", values, again, lambda checkpoint: 1e-5, ids)
    assert asked != first


@pytest.mark.parametrize("off", [2e-5, 0.3, math.nan, math.inf])
def test_a_difference_names_run_fold_id_and_both_values(off: float) -> None:
    ids, by_checkpoint = [f"id{i}" for i in range(40)], stored(folds=3)
    culprit: dict[str, int] = {}

    def again(checkpoint: Checkpoint, rows: np.ndarray) -> np.ndarray:
        values = by_checkpoint[checkpoint][1][rows].copy()
        if checkpoint.fold == 2:
            culprit["row"] = int(rows[5])
            values[5, 1] += off
        return values

    line = refusal(lambda: compare("exp001", by_checkpoint, again, lambda checkpoint: 1e-5, ids))
    value = by_checkpoint[Checkpoint("exp001", 0, 2)][1][culprit["row"], 1]
    for word in ("exp001", "fold 2", f"'id{culprit['row']}'", f"{value:.9g}", f"{value + off:.9g}"):
        assert word in line
    if off == 2e-5:
        compare("exp001", by_checkpoint, again, lambda checkpoint: 1e-3, ids)


def test_no_checkpoint_is_an_error() -> None:
    assert "checkpoints is on this machine" in refusal(
        lambda: compare("exp001", {}, lambda c, rows: np.zeros((0, 1)), lambda c: 1e-5, [])
    )
