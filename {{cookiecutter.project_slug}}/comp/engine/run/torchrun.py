"""torchrun -m comp train exp001: rank 0 runs the command, the other ranks train the folds that it
broadcasts."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comp.engine import hardware
from comp.engine.config.schema import Config
from comp.engine.errors import UserError

if TYPE_CHECKING:
    from comp.engine.run.context import Context

VERBS = ("train", "tune")
# Parts of torch's messages when rank 0 has ended.
DISCONNECTED = ("Connection closed", "Connection reset", "Broken pipe", "recv", "Socket")


def run_command(verb: str, work: Callable[[], int | None]) -> int | None:
    """Run a verb as one process of several."""
    if verb not in VERBS:
        if hardware.rank():
            return 2
        raise UserError(
            "verb-unsupported",
            where="torchrun",
            what=f"comp {verb} runs in one process",
            remedy=f"torchrun is for {' and '.join(f'comp {v}' for v in VERBS)}",
        )
    if hardware.rank():
        return run_worker()
    from comp.engine.run import distributed

    try:
        status = work()
    except (distributed.CollectiveError, hardware.Stopped):
        distributed.shutdown()
        raise
    distributed.shutdown()
    return status


def run_worker() -> int:
    """Train the folds that rank 0 broadcasts until it ends. Results and errors are reported by rank 0."""
    hardware.set_threads(1)
    import torch.distributed as dist

    from comp.engine.run import distributed

    context: Context | None = None
    stop = hardware.Stop(quiet=True)
    try:
        distributed.init()
        with stop.listening():
            while (task := distributed.receive()) is not None:
                context = _train(task, context, stop)
    except KeyboardInterrupt:
        return hardware.exit_code()
    except UserError as error:
        print(*error.lines, sep="\n", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not any(text in str(error) for text in DISCONNECTED):
            raise
        return hardware.exit_code() if stop.signalled else 1
    dist.destroy_process_group()
    return hardware.exit_code() if stop.signalled else 0


def _train(task: dict[str, Any], context: Context | None, stop: hardware.Stop) -> Context:
    """Train one fold into a temporary folder. Returns the context, which is kept for the next fold of the
    same config."""
    from comp import train
    from comp.engine.run import distributed, loading, pseudo_rows, tracking

    cfg = Config.model_validate(task["config"])
    hardware.set_threads(cfg.train.threads)
    if context is None or context.cfg != cfg:
        context = loading.load_context(cfg)
    with tempfile.TemporaryDirectory(prefix="comp-") as scratch:
        folder = Path(scratch)
        log = tracking.RunLogger(folder, tracking.NoWandb(), [])
        try:
            with distributed.collective():
                fold_context = pseudo_rows.fold_context(context, task["fold"])
                train.train_fold(fold_context, task["seed"], task["fold"], folder, log, stop=stop)
        except (distributed.CollectiveError, distributed.Pruned, hardware.Stopped):
            stop.requested = False  # rank 0 has the same exception and decides what follows
    return context
