"""Metadata for the model (model.metadata): the columns of competition.metadata as numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from comp.engine.data.samples import Samples
from comp.engine.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

MAX_LEVELS = 64  # of a text column; rarer ones share the code of unknown ones, all zeros


def encode_metadata(samples: Samples, device: torch.device) -> torch.Tensor:
    """(samples, features). Means, deviations and levels are those of the training rows; labels are not
    used."""
    names = [str(name) for name in samples.frame.columns if str(name).startswith("meta.")]
    if not names:
        raise UserError(
            "metadata-missing",
            key="model.metadata",
            what="true, and competition.metadata has no column",
            remedy="list columns there, or set it to false",
        )
    train = samples.positions("train")
    blocks = [_block(samples.frame[name], train) for name in names]
    return torch.tensor(np.hstack(blocks), dtype=torch.float32, device=device)


def _block(column: pd.Series, train: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers: standardized, with 0 and a flag where one is missing. Text: one-hot, all zeros where it is
    unknown or missing."""
    if column.dtype.kind in "fiu":
        values = column.to_numpy(np.float64)
        finite = values[train][np.isfinite(values[train])]
        mean, std = (finite.mean(), finite.std()) if len(finite) else (0.0, 1.0)
        scaled = np.clip((values - mean) / (std or 1.0), -5, 5)
        return np.column_stack([np.nan_to_num(scaled), np.isnan(values)])
    levels = column.iloc[train].value_counts(sort=True).index[:MAX_LEVELS]
    return np.column_stack(
        [(column == level).to_numpy(bool, na_value=False) for level in sorted(levels)]
    ).astype(np.float64)
