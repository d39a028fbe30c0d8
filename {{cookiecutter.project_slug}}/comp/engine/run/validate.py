"""Everything that can be refused before torch is imported. Each check is a function of the module that it
concerns.

Checks of one step are independent of each other: all of them run, and their faults are raised together.
Checks that need torch follow in validate_network.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from comp.engine.bank import score
from comp.engine.config.resolve import Loaded
from comp.engine.config.schema import Config
from comp.engine.data import folds as fold_table
from comp.engine.data import samples
from comp.engine.data.folds import Folds
from comp.engine.errors import UserError, joined
from comp.engine.run import fingerprint, pretrained, pseudo_rows, teachers, unused_knobs
from comp.engine.tasks import loss_knobs


def run_all(*checks: Callable[[], Any]) -> None:
    """Calls every check, and raises the faults of all, each once."""
    faults: dict[str, UserError] = {}
    for check in checks:
        try:
            check()
        except UserError as error:
            faults.setdefault(str(error), error)
    if len(faults) == 1:
        raise next(iter(faults.values()))
    if faults:
        raise joined(list(faults.values()))


def training(loaded: Loaded, name: str, replaced: Sequence[Path]) -> None:
    """Before training, in this order: 1. knobs without effect are reported; 2. the name; 3. teachers and
    pseudo-labels, which are needed to train and not to predict; 4. the image files of a run that is
    resumed."""
    cfg = loaded.config
    for message in unused_knobs.messages(loaded):
        print(message, file=sys.stderr)
    fingerprint.validate_name(name)
    if cfg.data.pseudo_labels is not None or cfg.distill.teacher is not None:
        folds = fold_table.load(samples.load())
        run_all(partial(pseudo_rows.validate, cfg, folds), partial(teachers.validate, cfg, folds))
    fingerprint.validate_images(name, cfg, replaced)


def tables(cfg: Config, folds: Folds, loaded: Loaded | None = None) -> None:
    """A config against samples and folds. `loaded`: of an experiment that is about to be trained, whose folds
    must be as it declares."""
    run_all(
        *([partial(fold_table.validate_plan, folds, loaded)] if loaded is not None else []),
        partial(pretrained.validate, cfg, folds),
        partial(score.metric_of, cfg),
        partial(loss_knobs.head_losses, cfg, folds.samples.heads),
    )
