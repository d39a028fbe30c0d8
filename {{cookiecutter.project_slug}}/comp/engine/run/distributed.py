"""One fold on several processes: torchrun --nproc-per-node 2 -m comp train exp001, on one machine or on
several.

The number of processes belongs to the machine, not to the run: a step is batch_size x grad_accum_steps
samples on however many processes, drawn and augmented as in one, so gradients are equal up to rounding.
Whole batches are distributed where grad_accum_steps divides by the number of processes; otherwise each
batch is split.

Rank 0 runs the command: it alone locks, logs, prints and writes. The other ranks take part in its collective
work (comp/engine/run/torchrun.py), and what they write goes into a temporary folder. With one process, every
function here does nothing.
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
from comp.engine.errors import UserError
from comp.engine.run.microbatch import active_batch_norm
from comp.engine.store import artifacts

Value = TypeVar("Value")
BUCKET = 2**23  # gradient elements per all_reduce
TIMEOUT = datetime.timedelta(days=2)  # the other ranks wait while rank 0 predicts, merges, uploads


class Pruned(Exception):
    """Raised by the epoch callback of a search to end an unpromising trial."""


class CollectiveError(UserError):
    """Raised by all processes at the same place, so that the process group stays usable."""


class _State:
    collective = False  # all processes are inside the same collective work
    lost = False  # a process left it alone: nothing collective is possible any more


def init() -> None:
    if hardware.world_size() == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)


def shutdown() -> None:
    """On rank 0: ends the loops of the other ranks."""
    if hardware.world_size() > 1 and not _State.lost:
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
def collective(task: Any = None) -> Iterator[None]:
    """Work that all processes do together. Rank 0 broadcasts the task; the other ranks enter after they have
    received it."""
    if world_size() == 1:
        yield
        return
    if _State.lost:
        raise KeyboardInterrupt("the other processes were lost; what was saved is kept")
    if is_main():
        broadcast(task)
    _State.collective = True
    try:
        yield
    except (CollectiveError, Pruned, hardware.Stopped):
        raise
    except BaseException:
        _State.lost = True
        raise
    finally:
        _State.collective = False


def is_collective() -> bool:
    """Whether all processes are inside the same work, so that rows to predict can be shared among them."""
    return _State.collective


# --- communication -----------------------------------------------------------------------------------


def broadcast(value: Value) -> Value:
    """Rank 0's value, on all ranks."""
    if world_size() == 1:
        return value
    box = [value if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def receive() -> Any:
    """On the other ranks: the next task of rank 0; None at the end."""
    return broadcast(None)


def any_reduce(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if world_size() == 1:
        return flag
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, dist.ReduceOp.MAX)  # on the CPU, over gloo: does not wait for the GPU
    return bool(flags)


def all_reduce(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(value: Value) -> list[Value]:
    """The values of all ranks, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_tensors(*tensors: Tensor) -> None:
    """In place: all ranks get the tensors of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def broadcast_module(module: nn.Module) -> None:
    broadcast_tensors(*module.parameters(), *module.buffers())


def broadcast_buffers(module: nn.Module) -> None:
    """Before all ranks predict: batch norm statistics of the run are those of rank 0."""
    broadcast_tensors(*module.buffers())


def broadcast_files(folder: Path) -> None:
    """Weights saved so far (epoch files, snapshots). Rank 0 reads them; the other ranks may not see its
    disk."""
    if world_size() == 1:
        return
    files = sorted(file for file in folder.rglob("*.safetensors") if artifacts.manifest_entry(file))
    for name in broadcast([str(file.relative_to(folder)) for file in files]):
        content = broadcast((folder / name).read_bytes() if is_main() else b"")
        if not is_main():
            with artifacts.atomic(folder / name) as temporary:
                temporary.write_bytes(content)
            artifacts.add_to_manifest(folder / name)


def call_on_epoch(on_epoch: Callable[[dict[str, Any]], None] | None, report: dict[str, Any]) -> None:
    """When the callback of one process raises Pruned, all processes raise it. Only rank 0 has a callback."""
    pruned: Pruned | None = None
    try:
        if on_epoch is not None:
            on_epoch(report)
    except Pruned as error:
        pruned = error
    if any_reduce(pruned is not None):
        raise pruned or Pruned


# --- sharing the work of a step ----------------------------------------------------------------------


def local_batches(grad_accum_steps: int) -> int:
    """Batches per step on this rank, whole or split."""
    if grad_accum_steps % world_size() == 0:
        return grad_accum_steps // world_size()
    return grad_accum_steps


def shard(plan: Batches, grad_accum_steps: int, group_size: int = 1) -> Iterator[list[Index]]:
    """This rank's part of an epoch's batches. `group_size` neighboring samples stay together."""
    n = world_size()
    for number, batch in enumerate(plan):
        if grad_accum_steps % n == 0:
            if number % n == rank():
                yield batch
        else:
            ends = [len(batch) // group_size * r // n * group_size for r in range(n)] + [len(batch)]
            yield batch[ends[rank()] : ends[rank() + 1]]


def sum_gradients(module: nn.Module) -> None:
    if world_size() == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if any(gradient.requires_grad for gradient in gradients):
        raise CollectiveError(
            "optimizer-second-order",
            key="optim.name",
            what="differentiates gradients, which is not possible after a sum over processes",
            remedy="train in one process",
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


def validate(cfg: Config, batch_size: int, grad_accum_steps: int, module: nn.Module) -> None:
    """An error if a batch cannot be split among the processes; a warning about what changes when it is."""
    n, group_size = world_size(), cfg.augment.group_size
    if n == 1:
        return
    whole_batches = grad_accum_steps % n == 0
    if not whole_batches and batch_size < n * group_size:
        at_least = f", at least {group_size} each" if group_size > 1 else ""
        raise CollectiveError(
            "batch-too-small",
            key="train.batch_size",
            what=f"a batch of {batch_size} images cannot be split among {n} processes{at_least}",
            remedy=f"set it to {n * group_size} or more, or train.grad_accum_steps={n}",
        )
    local = batch_size if whole_batches else batch_size // n
    differences = []
    if cfg.loss.ohem < 1 and not whole_batches:
        differences.append(f"loss.ohem selects among {local} images, not {batch_size}")
    if layer := active_batch_norm(module):
        differences.append(
            f"batch norm ({layer}) normalizes over {local} images, and keeps the statistics of rank 0"
        )
    if differences and is_main():
        advice = "" if whole_batches else f"; train.grad_accum_steps={n} would distribute whole batches"
        print(f"{n} processes differ from one: {'; '.join(differences)}{advice}", file=sys.stderr)


def validate_resume(state: dict[str, Any] | None) -> None:
    """With another number of processes, sums are added in another order: the weights would differ."""
    if state is None or state["world_size"] == world_size():
        return
    n = state["world_size"]
    command = f"torchrun --nproc-per-node {n} -m comp train" if n > 1 else "comp train"
    raise CollectiveError(
        "world-size-differs",
        what=f"this fold was started with {n} process{'es' if n > 1 else ''}, now {world_size()}",
        remedy=f"resume with {command} …, or start it again with --fresh",
    )
