"""What all folds of an experiment share: loaded once a process, by jobs.gather."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from comp.data import Feed
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.hardware import Stop
from comp.engine.run.profiler import Clock


def unwatched(report: dict[str, Any]) -> None:
    """Nobody looks at the epochs of an ordinary run."""


@dataclass(frozen=True)
class Context:
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
