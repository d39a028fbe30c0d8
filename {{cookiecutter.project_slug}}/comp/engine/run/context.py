"""The configuration and data of an experiment, shared by all of its folds and loaded once per process (see
loading.load_context)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.run.data_loader import Loader


@dataclass(frozen=True)
class Context:
    cfg: Config
    samples: Samples
    folds: Folds
    loader: Loader
    device: torch.device
