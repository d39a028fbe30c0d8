"""One fold on several processes: torchrun --nproc-per-node 2 -m comp train exp001, on one machine or on several.

How many there are is a matter of the machine, not of the run: a step is batch_size x accumulate samples however many share
it, drawn and augmented as one process would, so the gradient is the same to rounding. Whole passes are dealt out where
they divide by the processes; otherwise each pass is cut.

The first process is the run: it decides, locks, logs, prints and writes as if it were alone. The others do what it says
(comp/engine/run/torchrun.py), and what they write goes into a folder that is thrown away. Alone, every function here does nothing.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from comp.data import Batches, Index
from comp.engine import hardware
from comp.engine.config.schema import Config
from comp.engine.errors import Refused
from comp.engine.run.microbatch import active_batch_norm
from comp.engine.store import artifacts

Value = TypeVar("Value")
BUCKET = 2**23  # numbers that travel together
TIMEOUT = datetime.timedelta(days=2)  # the others wait while the first predicts, merges, uploads


class Pruned(Exception):
    """Raised by the epoch callback of a search to end an unpromising trial."""


class CollectiveError(Refused):
    """Raised by all processes at the same place, so that they can go on together with something else."""


class _Now:
    together = False  # all processes are inside the same piece of work
    lost = False  # one left it alone: nothing can be done together any more


def init() -> None:
    if hardware.world_size() == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)


def shutdown() -> None:
    """The first process lets the others go."""
    if hardware.world_size() > 1 and not _Now.lost:
        init()
        broadcast(None)
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


@contextmanager
def collective(order: Any = None) -> Iterator[None]:
    """All processes do what is inside. The first says what it is; the others come here once they have heard it."""
    if world_size() == 1:
        yield
        return
    if _Now.lost:
        raise KeyboardInterrupt("the other processes were lost; what was saved is kept")
    if is_main():
        broadcast(order)
    _Now.together = True
    try:
        yield
    except (CollectiveError, Pruned, hardware.Stopped):
        raise
    except BaseException:
        _Now.lost = True
        raise
    finally:
        _Now.together = False


# --- what is said between them -------------------------------------------------------------------------------------------


def broadcast(value: Value) -> Value:
    """What the first process has, in all of them."""
    if world_size() == 1:
        return value
    box = [value if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def receive() -> Any:
    """What the first process says next; None: it is done."""
    return broadcast(None)


def any_reduce(flag: bool) -> bool:
    if world_size() == 1:
        return flag
    raised = torch.tensor([int(flag)])
    dist.all_reduce(raised, dist.ReduceOp.MAX)  # on the CPU, over gloo: the device is not waited for
    return bool(raised)


def all_reduce(values: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(value: Value) -> list[Value]:
    """What each process has, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def call_on_epoch(on_epoch: Callable[[dict[str, Any]], None] | None, report: dict[str, Any]) -> None:
    """When the callback of one process raises Pruned, all processes raise it. Only rank 0 has a callback."""
    pruned: Pruned | None = None
    try:
        if on_epoch is not None:
            on_epoch(report)
    except Pruned as raised:
        pruned = raised
    if any_reduce(pruned is not None):
        raise pruned or Pruned


# --- the work, shared ----------------------------------------------------------------------------------------------------


def local_passes(accumulate: int) -> int:
    """Forward passes of a step that are this process's, whole or cut."""
    return accumulate // world_size() if accumulate % world_size() == 0 else accumulate


def shard(plan: Batches, accumulate: int, whole: int = 1) -> Iterator[list[Index]]:
    """This process's part of the passes of an epoch. `whole` neighbours belong together."""
    for number, draws in enumerate(plan):
        if accumulate % world_size() == 0:
            if number % world_size() == rank():
                yield draws
        else:
            ends = [len(draws) // whole * r // world_size() * whole for r in range(world_size())] + [
                len(draws)
            ]
            yield draws[ends[rank()] : ends[rank() + 1]]


def sum_gradients(module: nn.Module) -> None:
    if world_size() == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if any(gradient.requires_grad for gradient in gradients):
        raise CollectiveError(
            "optim.name: it differentiates gradients, which a sum over processes ends; train it in one"
        )
    buckets: list[list[Tensor]] = [[]]
    for gradient in gradients:
        if sum(each.numel() for each in buckets[-1]) > BUCKET:
            buckets.append([])
        buckets[-1].append(gradient)
    flat = [_flatten_dense_tensors(bucket) for bucket in buckets if bucket]
    for work in [dist.all_reduce(each, async_op=True) for each in flat]:
        work.wait()
    for each, bucket in zip(flat, buckets, strict=False):
        torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(each, bucket)))


def broadcast_tensors(*tensors: Tensor) -> None:
    """In place, in all processes what the first has."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def broadcast_module(module: nn.Module) -> None:
    broadcast_tensors(*module.parameters(), *module.buffers())


def broadcast_buffers(module: nn.Module) -> None:
    """Before all predict with it: the first process's batch norm is that of the run."""
    broadcast_tensors(*module.buffers())


def broadcast_files(folder: Path) -> None:
    """Weights that a fold has put aside so far: the first process reads them on its disk, which may be no other's."""
    if world_size() == 1:
        return
    there = sorted(file for file in folder.rglob("*.safetensors") if artifacts.manifest_entry(file))
    for name in broadcast([str(file.relative_to(folder)) for file in there]):
        content = broadcast((folder / name).read_bytes() if is_main() else b"")
        if not is_main():
            with artifacts.atomic(folder / name) as temporary:
                temporary.write_bytes(content)
            artifacts.add_to_manifest(folder / name)


def is_collective() -> bool:
    """Whether rows to predict are dealt out: all processes are here, and will ask for the same."""
    return _Now.together


def validate(cfg: Config, batch_size: int, accumulate: int, module: nn.Module) -> None:
    """Refuse what cannot be shared, and say what is no longer the same."""
    n = world_size()
    if n == 1:
        return
    whole = accumulate % n == 0
    if not whole and batch_size < n * (those := cfg.augment.group_size):
        together = f", {those} at least each" if those > 1 else ""
        raise CollectiveError(
            f"train.batch_size: {batch_size} pictures a pass cannot be shared by {n} processes{together}"
        )
    part = batch_size if whole else batch_size // n
    told = (
        [f"loss.ohem chooses among {part} pictures, not {batch_size}"]
        if cfg.loss.ohem < 1 and not whole
        else []
    )
    if norm := active_batch_norm(module):
        told += [
            f"batch norm ({norm}) normalises over {part} pictures, and keeps the statistics of the first process"
        ]
    if told and is_main():
        better = "" if whole else f"; train.grad_accum_steps={n} would deal out whole passes"
        print(f"{n} processes are not quite one: {'; '.join(told)}{better}", file=sys.stderr)


def validate_resume(state: dict[str, Any] | None) -> None:
    """Sums are added in another order by another number of processes: the bytes would differ."""
    if state is not None and state["processes"] != world_size():
        n = state["processes"]
        how = "torchrun --nproc-per-node " + str(n) + " -m comp train" if n > 1 else "comp train"
        raise CollectiveError(
            f"this fold was begun by {n} process{'es' if n > 1 else ''} and goes on with as many only: {how} …; or start it again "
            "with --fresh"
        )
