"""torchrun -m comp train exp001: the first process is the run, the others follow it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comp import machine
from comp.config import Config, Refused

if TYPE_CHECKING:
    from comp.train.context import Material

VERBS = ("train", "tune")
GONE = (
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "recv",
    "Socket",
)  # how the first process's end looks from here


def answer(verb: str, work: Callable[[], int | None]) -> int | None:
    """What a verb does in this process of several."""
    if verb not in VERBS:
        if machine.rank():
            return 2
        raise Refused(
            f"torchrun: comp {verb} is work for one process; it shares out {' and '.join(f'comp {v}' for v in VERBS)}"
        )
    if machine.rank():
        return follow()
    from comp.train import distributed

    try:
        status = work()
    except (distributed.Agreed, machine.Stopped):
        distributed.end()
        raise
    distributed.end()
    return status


def follow() -> int:
    """Do what the first process says, until it says nothing more. It is the one to tell how it went."""
    machine.settle(1)
    import torch.distributed as dist

    from comp.train import distributed

    material: Material | None = None
    stop = machine.Stop(quiet=True)
    try:
        distributed.begin()
        with stop.listening():
            while (order := distributed.heard()) is not None:
                material = _do(order, material, stop)
    except KeyboardInterrupt:
        return machine.exit_code()
    except Refused as refused:
        print(*refused.lines, sep="\n", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not any(word in str(error) for word in GONE):
            raise
        return machine.exit_code() if stop.signalled else 1
    dist.destroy_process_group()
    return machine.exit_code() if stop.signalled else 0


def _do(order: dict[str, Any], material: Material | None, stop: machine.Stop) -> Material:
    from comp import jobs, track
    from comp.train import distributed, loop

    cfg = Config.model_validate(order["config"])
    machine.settle(cfg.train.threads)
    if material is None or material.cfg != cfg:
        material = jobs.gather(cfg, stop)
    with tempfile.TemporaryDirectory(prefix="comp-") as scratch:
        folder = Path(scratch)
        log = track.Track(folder, track.NoFeed(), [])
        try:
            with distributed.together():
                loop.fold(material, order["seed"], order["fold"], folder, log)
        except (distributed.Agreed, distributed.Pruned, machine.Stopped):
            stop.asked = False  # the first process knows, and says what comes next
    return material
