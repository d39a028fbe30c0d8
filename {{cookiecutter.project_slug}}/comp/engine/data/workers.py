"""Loader processes that stay alive over epochs and folds, and what happens when one of them does not."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, Generic, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from comp.engine.errors import Refused

AHEAD = 4  # batches that each worker has ready
LONGEST = (
    75  # characters of a temporary folder; a socket's path has 107, and with more the processes wait for ever
)

Asked = TypeVar("Asked", bound=list[Any])
Made = TypeVar("Made")


class WorkerPool(Generic[Asked, Made]):
    def __init__(
        self, items: Dataset[Any], together: Callable[[list[Any]], Made], workers: int, pinned: bool
    ):
        self.items, self.together, self.workers, self.pinned = items, together, workers, pinned
        self.died = False

    def batches(self, plan: Iterable[Asked]) -> Iterator[Made]:
        """A process that dies, for lack of memory as a rule, costs one new start with half as many, from where it stopped."""
        if self.workers == 0:
            for asked in plan:
                yield self.together([self.items[one] for one in asked])
            return
        rest, waiting = iter(plan), deque[Asked]()

        def noted() -> Iterator[Asked]:
            for asked in rest:
                waiting.append(asked)
                yield asked

        self.loader.batch_sampler.plan = noted()  # type: ignore[union-attr]
        try:
            for made in undisturbed(self.loader):
                waiting.popleft()
                yield made
            return
        except (RuntimeError, EOFError, ConnectionError) as error:
            if not _death(error):
                raise
            died = str(error).strip().partition("\n")[0] or "a loader process died"
        if self.died:
            raise Refused(
                f"loader processes die again and again ({died}); free memory, or machine.num_workers=0"
            )
        self.died = True
        del self.loader  # what is left of it ends
        self.workers //= 2
        print(f"{died}: on with {self.workers or 'none'} from where it stopped", file=sys.stderr, flush=True)
        yield from self.batches(itertools.chain(list(waiting), rest))

    @cached_property
    def loader(self) -> DataLoader[Any]:
        if len(os.fsencode(tempfile.gettempdir())) > LONGEST:
            raise Refused(
                f"TMPDIR: {tempfile.gettempdir()} is too long for the sockets of loader processes; {LONGEST} characters at most, or machine.num_workers=0"
            )
        return DataLoader(
            self.items,
            batch_sampler=_Plan(),
            num_workers=self.workers,
            collate_fn=self.together,
            pin_memory=self.pinned,
            persistent_workers=True,
            prefetch_factor=AHEAD,
            worker_init_fn=_alone,
        )


def undisturbed(loader: DataLoader[Any]) -> Iterator[Any]:
    """torch would raise a worker's death out of a signal, in the middle of anything; here it is met where a batch is waited for."""
    if threading.current_thread() is not threading.main_thread():
        yield from loader
        return
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    yield from batches


def _death(error: Exception) -> bool:
    """Killed between two batches a worker is named by torch; killed while it hands one over, only its pipe ends. What an item
    raises comes with torch's own words around it."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    return "in DataLoader worker process" not in str(error)


class _Plan:
    """A batch sampler whose batches are set from outside, so that one DataLoader can read anything."""

    plan: Iterable[list[Any]] = ()

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.plan)


def _alone(worker: int) -> None:
    """OpenCV and torch start a pool in every worker otherwise, and they fight for two cores."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Signals reach the whole group: the trainer decides when to stop, and a batch of it may be under way here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it: a worker that ends there is started anew
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    """SIGTERM from the trainer is how torch ends a worker that does not end by itself; from anybody else it is meant for the trainer."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
