"""Metadata beside the pictures: columns of competition.metadata as numbers, for model.metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from comp.engine.data.samples import Samples
from comp.engine.errors import Refused

if TYPE_CHECKING:
    import pandas as pd

LEVELS = 64  # of a text column; rarer ones are all one


def encode_metadata(samples: Samples, device: torch.device) -> torch.Tensor:
    """(samples, features). Means, deviations and levels come from the training rows; no label is looked at."""
    names = [str(name) for name in samples.frame.columns if str(name).startswith("meta.")]
    if not names:
        raise Refused("model.metadata: true, and competition.metadata names no column")
    train = samples.positions("train")
    blocks = [_block(samples.frame[name], train) for name in names]
    return torch.tensor(np.hstack(blocks), dtype=torch.float32, device=device)


def _block(column: pd.Series, train: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number: standardised, 0 and a flag where it is missing. Text: one column a level, none where it is new or missing."""
    if column.dtype.kind in "fiu":
        values = column.to_numpy(np.float64)
        known = values[train][np.isfinite(values[train])]
        middle, spread = (known.mean(), known.std()) if len(known) else (0.0, 1.0)
        scaled = np.clip((values - middle) / (spread or 1.0), -5, 5)
        return np.column_stack([np.nan_to_num(scaled), np.isnan(values)])
    levels = column.iloc[train].value_counts(sort=True).index[:LEVELS]
    return np.column_stack(
        [(column == level).to_numpy(bool, na_value=False) for level in sorted(levels)]
    ).astype(np.float64)
