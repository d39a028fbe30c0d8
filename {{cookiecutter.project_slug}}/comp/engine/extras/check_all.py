"""comp check: tables, images and declaration (data/check.py), the submission format (deliver/dummy_submission.py), and an experiment's network."""

from __future__ import annotations

from collections.abc import Sequence

from comp.engine import hardware
from comp.engine.config import experiments, resolve
from comp.engine.data import check as checks
from comp.engine.deliver import dummy_submission
from comp.engine.store import paths


def check(experiment: str | None = None, overrides: Sequence[str] = ()) -> int:
    """Exit code 2 if there is a fault. Without an experiment images are decoded small, and torch is not imported."""
    if experiment is None:
        return (
            2
            if checks.check(resolve.load(paths.root(), "base").config, dummy_submission.validate_dummy)
            else 0
        )
    cfg = experiments.load(experiment, overrides).config
    hardware.set_threads(cfg.train.threads)
    from comp import models

    return (
        2
        if checks.check(cfg, dummy_submission.validate_dummy, exact=True, network=models.check_report)
        else 0
    )
