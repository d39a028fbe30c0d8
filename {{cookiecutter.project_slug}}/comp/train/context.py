"""What all folds of an experiment share: loaded once a process, by jobs.gather."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from comp.config import Config
from comp.folds import Folds
from comp.machine import Stop
from comp.samples import Samples
from comp.train.clock import Clock
from comp.train.data import Feed


def unwatched(report: dict[str, Any]) -> None:
    """Nobody looks at the epochs of an ordinary run."""


@dataclass(frozen=True)
class Material:
    cfg: Config
    samples: Samples
    folds: Folds
    feed: Feed
    device: torch.device
    stop: Stop
    clock: Clock
    watch: Callable[[dict[str, Any]], None] = (
        unwatched  # sees every epoch; a search ends a fold here with distributed.Pruned
    )
