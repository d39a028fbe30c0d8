"""torchrun -m comp train exp001: the first process is the run, the others follow it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comp.engine import hardware
from comp.engine.config.schema import Config
from comp.engine.errors import Refused, UserError

if TYPE_CHECKING:
    from comp.engine.run.context import Context

VERBS = ("train", "tune")
GONE = (
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "recv",
    "Socket",
)  # how the first process's end looks from here


def run_command(verb: str, work: Callable[[], int | None]) -> int | None:
    """What a verb does in this process of several."""
    if verb not in VERBS:
        if hardware.rank():
            return 2
        raise Refused(
            f"torchrun: comp {verb} is work for one process; it shares out {' and '.join(f'comp {v}' for v in VERBS)}"
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
    """Do what the first process says, until it says nothing more. It is the one to tell how it went."""
    hardware.set_threads(1)
    import torch.distributed as dist

    from comp.engine.run import distributed

    context: Context | None = None
    stop = hardware.Stop(quiet=True)
    try:
        distributed.init()
        with stop.listening():
            while (order := distributed.receive()) is not None:
                context = _do(order, context, stop)
    except KeyboardInterrupt:
        return hardware.exit_code()
    except UserError as refused:
        print(*refused.lines, sep="\n", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not any(word in str(error) for word in GONE):
            raise
        return hardware.exit_code() if stop.signalled else 1
    dist.destroy_process_group()
    return hardware.exit_code() if stop.signalled else 0


def _do(order: dict[str, Any], context: Context | None, stop: hardware.Stop) -> Context:
    from comp import train
    from comp.engine.run import distributed, loading, pseudo_rows, tracking

    cfg = Config.model_validate(order["config"])
    hardware.set_threads(cfg.train.threads)
    if context is None or context.cfg != cfg:
        context = loading.load_context(cfg)
    with tempfile.TemporaryDirectory(prefix="comp-") as scratch:
        folder = Path(scratch)
        log = tracking.RunLogger(folder, tracking.NoWandb(), [])
        try:
            with distributed.collective():
                fold_context = pseudo_rows.fold_context(context, order["fold"])
                train.fold(fold_context, order["seed"], order["fold"], folder, log, stop=stop)
        except (distributed.CollectiveError, distributed.Pruned, hardware.Stopped):
            stop.requested = False  # the first process knows, and says what comes next
    return context
