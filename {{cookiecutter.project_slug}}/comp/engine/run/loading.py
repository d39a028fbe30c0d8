"""From a config to the context that all folds share. Torch is imported here, after everything that is refused
without it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from comp.engine import hardware
from comp.engine.config.resolve import Loaded
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.run import fingerprint, validate

if TYPE_CHECKING:
    from comp.engine.run.context import Context


def start_run(name: str, cfg: Config, command: str) -> Context:
    """Starts or resumes runs/<name>, and loads its context. `command`: resumes it."""
    fingerprint.validate_images(name, cfg)
    context = load_context(cfg)
    fingerprint.claim(name, cfg, context.folds, command)
    return context


def load_context(cfg: Config, loaded: Loaded | None = None) -> Context:
    """Call hardware.set_threads first. `loaded`: of an experiment that is about to be trained, to compare its
    folds."""
    with loaded.locating() if loaded else nullcontext():
        return _load_context(cfg, loaded)


def _load_context(cfg: Config, loaded: Loaded | None) -> Context:
    table = samples.load()
    split = folds.load(table)
    validate.tables(cfg, split, loaded)
    import torch

    from comp.engine.run import distributed, validate_network
    from comp.engine.run.context import Context
    from comp.engine.run.data_loader import Loader

    distributed.init()
    validate_network.network(cfg, table)
    device = hardware.device(cfg.machine.device)
    # fp32 excludes TF32: stored predictions are compared to 1e-5
    torch.backends.cudnn.allow_tf32 = cfg.train.amp != "fp32"
    return Context(cfg, table, split, Loader(cfg, table, device), device)
