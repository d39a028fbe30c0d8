"""The loader of a process: opened once, it serves every fold, training and inference. `batches` tells it what
to read next.

Where examples are made follows from the recipe and from what fits into memory, and changes no byte:
  processes  the recipe holds albumentations or a policy, which keep Python's lock (GIL)
  threads    every op on a sample is one of run/cv2_ops.py: no copies between processes, nothing to start
  GPU cache  no op on a sample at all, and the set fits into machine.gpu_cache_mb
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from comp import transforms
from comp.data import Batch, Batches, ImageDataset, Index, collate
from comp.engine.config.schema import Config
from comp.engine.data import cache
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.run import tabular
from comp.engine.run.device import to_device

PREFETCH = 4  # batches that each worker has ready
LONGEST_TMPDIR = (
    75  # characters; the path of a socket has at most 107, and with more the processes wait for ever
)

Indices = TypeVar("Indices", bound=list[Any])
Collated = TypeVar("Collated")


class Loader:
    """Workers stay alive over epochs and folds."""

    def __init__(self, cfg: Config, samples: Samples, device: torch.device):
        paths = samples.frame["images"].map(lambda images: images[: cfg.data.max_images])
        start = np.concatenate([[0], np.cumsum(paths.map(len).to_numpy())]).astype(np.int64)
        codes, unique = paths.explode().factorize()
        images = cache.open_images(cfg, list(unique), cfg.machine.progress)
        self.dataset = ImageDataset(cfg, images, codes.astype(np.int64), start)
        self.multi_image = samples.multi_image and cfg.data.max_images > 1
        if len(codes) > len(paths) and not self.multi_image:
            raise UserError(
                "images-per-sample",
                key="data.max_images",
                what="some samples have several images, and the model was trained on one image a sample",
                remedy="data.max_images=1 takes the first",
            )
        self.metadata = tabular.encode_metadata(samples, device) if cfg.model.metadata else None
        self.cfg, self.device = cfg, device
        self.gpu_cache = GpuCache(self.dataset, device, cfg.machine.gpu_cache_mb * 10**6)

    def extras(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The model's keyword arguments besides the images: `owner` and `metadata`, where there are any."""
        extras = {} if batch.owner is None else {"owner": batch.owner.to(self.device, non_blocking=True)}
        if self.metadata is not None:
            extras["metadata"] = self.metadata[to_device(batch.samples, self.device)]
        return extras

    def batches(
        self, sampler: Batches, epoch_augment: transforms.EpochAugment | None = None
    ) -> Iterator[Batch]:
        """Batches on the device, the next one being copied while one is in use. `epoch_augment`: the
        augmentation of indices with a seed."""
        if epoch_augment is not None:
            sampler = (
                [index._replace(epoch_augment=epoch_augment) for index in indices] for indices in sampler
            )
        if self.gpu_cache.usable:
            return self.gpu_cache.batches(sampler)
        return prefetched(self._loaded(sampler), self.device)

    def _loaded(self, sampler: Batches) -> Iterator[Batch]:
        if self.cfg.machine.num_workers == 0:
            return map(self.dataset.batch, sampler)
        if all(augment.threads for augment in self.dataset.augment.values()):
            return self._by_threads(sampler)
        return self.processes.batches(sampler)

    def _by_threads(self, sampler: Batches) -> Iterator[Batch]:
        pinned = self.device.type == "cuda"

        def load(indices: list[Index]) -> Batch:
            batch = self.dataset.batch(indices)
            return batch.pin_memory() if pinned else batch

        waiting: deque[Any] = deque()
        for indices in sampler:
            waiting.append(self.threads.submit(load, indices))
            if len(waiting) > PREFETCH * self.cfg.machine.num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        cv2.setNumThreads(0)
        return ThreadPoolExecutor(self.cfg.machine.num_workers, "images")

    @cached_property
    def processes(self) -> WorkerPool[list[Index], Batch]:
        return WorkerPool(self.dataset, collate, self.cfg.machine.num_workers, self.device.type == "cuda")


def prefetched(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """On a GPU, the next batch is copied on a stream of its own while this one is computed on."""
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)
    ready: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            following = batch.to(device)
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(copying)
        following.images.record_stream(torch.cuda.current_stream(device))
        ready = following
    if ready is not None:
        yield ready


class GpuCache:
    """The whole set on the device, read at first use; a batch is then one gather."""

    def __init__(self, dataset: ImageDataset, device: torch.device, max_bytes: int):
        side = dataset.size
        pixels = len(dataset.images) * side * side * dataset.channels
        self.usable = (
            not any(augment.steps or augment.size != side for augment in dataset.augment.values())
            and pixels * np.dtype(dataset.images.reader.dtype).itemsize <= max_bytes
            and len(dataset.image_of) == len(dataset.first_image)  # one image a sample
        )
        self.dataset, self.device = dataset, device
        self.damaged: dict[int, str] = {}  # image -> reason

    @cached_property
    def tensor(self) -> torch.Tensor:
        """(images, height, width, channels)"""
        image_of = self.dataset.first_image
        sample_of = {int(image): sample for sample, image in reversed(list(enumerate(image_of)))}
        parts = []
        for start in range(0, len(sample_of), 1024):
            end = min(start + 1024, len(sample_of))
            part = self.dataset.batch([Index(sample_of[image], None) for image in range(start, end)])
            self.damaged |= {int(image_of[sample]): reason for sample, reason in part.damaged.items()}
            parts.append(part.images)
        return torch.cat(parts).to(self.device)

    def batches(self, sampler: Batches) -> Iterator[Batch]:
        for indices in sampler:
            rows = np.array([index.sample for index in indices], np.int64)
            images = self.dataset.first_image[rows]
            seeds = None if indices[0].seed is None else np.array([index.seed for index in indices], np.int64)
            pixels = self.tensor[to_device(images, self.device)]
            damaged = {
                int(row): self.damaged[int(image)]
                for row, image in zip(rows, images, strict=True)
                if int(image) in self.damaged
            }
            yield Batch(rows, pixels, seeds, damaged)


# --- processes ----------------------------------------------------------------------------------------------


class WorkerPool(Generic[Indices, Collated]):
    """Loader processes that stay alive over epochs and folds. One that dies is replaced once."""

    def __init__(
        self,
        dataset: Dataset[Any],
        collate_fn: Callable[[list[Any]], Collated],
        num_workers: int,
        pin_memory: bool,
    ):
        self.dataset, self.collate_fn = dataset, collate_fn
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.restarted = False

    def batches(self, sampler: Iterable[Indices]) -> Iterator[Collated]:
        """When a worker is killed, mostly for lack of memory, the pool restarts once with half as many, at
        the batch that is due."""
        if self.num_workers == 0:
            for indices in sampler:
                yield self.collate_fn([self.dataset[index] for index in indices])
            return
        rest, pending = iter(sampler), deque[Indices]()

        def recorded() -> Iterator[Indices]:
            for indices in rest:
                pending.append(indices)
                yield indices

        self.loader.batch_sampler.sampler = recorded()  # type: ignore[union-attr]
        try:
            for batch in without_signal_handler(self.loader):
                pending.popleft()
                yield batch
            return
        except (RuntimeError, EOFError, ConnectionError) as error:
            if not _worker_died(error):
                raise
            reason = str(error).strip().partition("\n")[0] or "a loader process died"
        if self.restarted:
            raise UserError(
                "workers-died",
                key="machine.num_workers",
                what=f"loader processes died twice ({reason})",
                remedy="free memory, or machine.num_workers=0",
            )
        self.restarted = True
        del self.loader  # ends the processes that are left
        self.num_workers //= 2
        print(
            f"{reason}: restarted with num_workers={self.num_workers} at the batch that was due",
            file=sys.stderr,
            flush=True,
        )
        yield from self.batches(itertools.chain(list(pending), rest))

    @cached_property
    def loader(self) -> DataLoader[Any]:
        if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR:
            raise UserError(
                "tmpdir-too-long",
                where="TMPDIR",
                what=f"{tempfile.gettempdir()} is too long for the sockets of loader processes",
                remedy=f"{LONGEST_TMPDIR} characters at most; set a shorter one, or machine.num_workers=0",
            )
        return DataLoader(
            self.dataset,
            batch_sampler=_ReplaceableSampler(),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            persistent_workers=True,
            prefetch_factor=PREFETCH,
            worker_init_fn=_init_worker,
        )


def without_signal_handler(loader: DataLoader[Any]) -> Iterator[Any]:
    """torch's SIGCHLD handler would raise a worker's death in the middle of any statement; without it the
    wait for the next batch raises it."""
    if threading.current_thread() is not threading.main_thread():
        yield from loader
        return
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    yield from batches


def _worker_died(error: Exception) -> bool:
    """torch names a worker that was killed between two batches. One that was killed while it sent a batch
    only leaves a broken pipe. What a dataset raises is wrapped in text of torch's own."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    return "in DataLoader worker process" not in str(error)


class _ReplaceableSampler:
    """A batch sampler whose batches can be replaced, so that one DataLoader serves every epoch and fold."""

    sampler: Iterable[list[Any]] = ()

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.sampler)


def _init_worker(worker: int) -> None:
    """OpenCV and torch would start a pool of threads in every worker."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl+C, SLURM and torchrun signal the whole process group. The trainer decides when to stop, and needs
    # its workers till then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where a worker that ends of it is restarted
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent() -> None:
    """torch sends SIGTERM from the trainer to a worker that does not end by itself. From any other sender it
    is for the trainer."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
