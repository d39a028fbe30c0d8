"""Runs jobs in parallel: on this machine, one a GPU or several on the CPU, or on a Ray cluster.

A job is a call of comp/engine/worker.py in a process of its own. It may run twice (a machine dies, its job
starts elsewhere), so it has to write its "done" last. The project's folder must have the same path on all
machines, on a disk that they share.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from comp.engine import hardware
from comp.engine.errors import UserError, joined
from comp.engine.store import locks, paths, process

POLL = 0.3  # seconds between two checks for Ctrl+C
LAST_LINES = 20  # of a failed job's output that are shown: all of a traceback, or the one line of a UserError


class Job(NamedTuple):
    name: str
    function: str  # of worker.FUNCTIONS
    arguments: dict[str, Any]  # JSON


class JobResult(NamedTuple):
    code: int
    last_lines: list[str]


class Executor(Protocol):
    size: int  # jobs that run at a time
    machines: int

    def submit(self, job: Job) -> Future[JobResult]: ...
    def interrupt(self) -> None:
        """Send the signal that this process received to every running job; waiting jobs do not start."""


def validate_options(on: str | None, *, profile: bool, limited: bool) -> None:
    """`limited`: --time-limit"""
    if on is None:
        return
    local_count(on)
    exclusive = {"--profile": profile, "--time-limit": limited, "torchrun": hardware.world_size() > 1}
    for option in [option for option, given in exclusive.items() if given]:
        what = "cannot be combined with --on, which trains folds in parallel"
        raise UserError("options-exclusive", where=option, what=what, remedy="leave --on out")


def new_queue() -> str:
    """An id for jobs of one call: a job that starts again takes over its own lock (see locks.lock)."""
    return f"{process.own_id()}-{time.time_ns()}"


def print_line(line: str) -> None:
    """Above the progress bar, if there is one."""
    tqdm.write(line, end="")


def run_jobs_with_progress(
    jobs: list[Job], executor: Executor, stop: hardware.Stop, title: str, unit: str, progress: bool
) -> None:
    quiet = None if progress else True
    with tqdm(total=len(jobs), desc=title, unit=unit, disable=quiet, leave=False) as bar:
        run_jobs(jobs, executor, stop, lambda left: bar.update(len(jobs) - left - bar.n))


def run_jobs(
    jobs: list[Job], executor: Executor, stop: hardware.Stop, on_progress: Callable[[int], object]
) -> None:
    """All of them. `on_progress` is called every POLL seconds with the number of unfinished jobs. When one
    fails, the others are interrupted, which save their state."""
    with stop.listening():
        _run_jobs(jobs, executor, stop, on_progress)


def _run_jobs(
    jobs: list[Job], executor: Executor, stop: hardware.Stop, on_progress: Callable[[int], object]
) -> None:
    running = {executor.submit(job): job for job in jobs}
    failed: list[UserError] = []
    interrupted = False
    while running:
        try:
            done, _ = wait(running, POLL, FIRST_COMPLETED)
        except KeyboardInterrupt:  # for the second time
            executor.interrupt()
            raise
        on_progress(len(running))
        for future in done:
            job = running.pop(future)
            if (
                future.cancelled()
                or (result := future.result()).code in (0, *hardware.STOP_EXIT_CODES)
                or stop.requested
            ):
                continue
            if not failed:
                lines = [UserError("job-failed", what=line) for line in result.last_lines]
                failed = [UserError("job-failed", where=job.name, what="failed"), *lines]
        if (stop.requested or failed) and not interrupted:
            interrupted = True
            executor.interrupt()
    if failed:
        raise joined(failed)
    if stop.requested:
        raise hardware.Stopped("every job has saved its state")


def run_job(
    job: Job,
    root: str,
    environment: dict[str, str],
    on_line: Callable[[str], None] = print_line,
    on_start: Callable[[subprocess.Popen[str]], None] = lambda process: None,
) -> JobResult:
    """Starts a process for a job, passes its output on, and waits for it. This process holds the other end of
    its standard input: when it dies, for whatever reason, the job ends as well and may start elsewhere."""
    with subprocess.Popen(
        [sys.executable, "-m", "comp.engine.worker", job.function, json.dumps(job.arguments)],
        cwd=root,
        env=os.environ | {"COMP_ROOT": root} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # the terminal's Ctrl+C reaches this process alone, which passes it on
    ) as process:
        on_start(process)
        last_lines: list[str] = []
        assert process.stdout is not None
        while True:
            try:
                for line in process.stdout:
                    on_line(line)
                    last_lines = [*last_lines, line.rstrip()][-LAST_LINES:]
                break
            except KeyboardInterrupt:  # how Ray cancels a task
                process.send_signal(signal.SIGINT)
        return JobResult(process.wait(), last_lines)


def make_executor(on: str, threads: int, on_line: Callable[[str], None] = print_line) -> Executor:
    """`on`: local, local:4 or ray. `on_line` gets the output of local jobs; that of other machines Ray prints
    itself."""
    count = local_count(on)
    return RayExecutor(threads) if on == "ray" else LocalExecutor(threads, count, on_line)


def local_count(on: str) -> int | None:
    """4 of local:4; None of local and ray. Raises for anything else."""
    kind, colon, count = on.partition(":")
    if on == "ray" or (kind == "local" and (not colon or (count.isdigit() and int(count) > 0))):
        return int(count) if count else None
    what = "must be local (one job a GPU, or as many as the cores allow), local:N, or ray"
    raise UserError("option-invalid", where=f"--on {on}", what=what)


class LocalExecutor:
    """Each job has a GPU of its own, or `threads` cores."""

    machines = 1

    def __init__(self, threads: int, count: int | None, on_line: Callable[[str], None]):
        import torch

        gpus = torch.cuda.device_count()
        self.size = count or gpus or max(1, hardware.cores() // threads)
        self._on_line = on_line
        self._environments: queue.Queue[dict[str, str]] = queue.Queue()  # of the jobs that may run now
        for i in range(self.size):
            self._environments.put({"CUDA_VISIBLE_DEVICES": _gpu(i % gpus)} if gpus else {})
        self._pool = ThreadPoolExecutor(self.size)
        self._processes: list[subprocess.Popen[str]] = []
        self._futures: list[Future[JobResult]] = []
        self._stopped = False

    def submit(self, job: Job) -> Future[JobResult]:
        self._futures.append(self._pool.submit(self._run, job))
        return self._futures[-1]

    def _run(self, job: Job) -> JobResult:
        environment = self._environments.get()
        try:
            return run_job(job, str(paths.root()), environment, self._on_line, self._started)
        finally:
            self._environments.put(environment)

    def _started(self, process: subprocess.Popen[str]) -> None:
        self._processes.append(process)
        if self._stopped:
            process.send_signal(hardware.received_signal())

    def interrupt(self) -> None:
        self._stopped = True
        for future in self._futures:
            future.cancel()
        for started in self._processes:
            if started.poll() is None:
                started.send_signal(hardware.received_signal())


class RayExecutor:
    """Ray picks the machine, and starts a job again when its machine dies."""

    def __init__(self, threads: int):
        try:
            import ray
        except ImportError:
            what, remedy = "the package ray is not installed", "pip install ray"
            raise UserError("package-missing", where="--on ray", what=what, remedy=remedy) from None
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address=os.environ.get("RAY_ADDRESS", "auto"), logging_level=logging.ERROR, log_to_driver=True
            )
        except ConnectionError:
            remedy = "ray start --head here, and ray start --address=… on the other machines"
            raise UserError("no-cluster", where="--on ray", what="no Ray cluster", remedy=remedy) from None
        signal.signal(signal.SIGTERM, before)  # ray.init installs a handler that exits with 15
        self._ray = ray
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self.machines = len({node["NodeManagerAddress"] for node in nodes})
        gpus, cpus = (int(sum(n["Resources"].get(kind, 0) for n in nodes)) for kind in ("GPU", "CPU"))
        self.size = max(1, gpus or cpus // threads)
        needs = {"num_cpus": 1 if gpus else threads, "num_gpus": 1 if gpus else 0}
        # Jobs of a machine that died start again without limit; a job that fails by itself does not.
        self._options = {**needs, "max_retries": -1}
        self._run_job = ray.remote(run_job)
        self._tasks: list[Any] = []

    def submit(self, job: Job) -> Future[JobResult]:
        environment = {locks.STEAL: os.environ.get(locks.STEAL, "")}
        task = self._run_job.options(name=job.name, **self._options).remote(
            job, str(paths.root()), environment
        )
        self._tasks.append(task)
        future: Future[JobResult] = Future()
        task.future().add_done_callback(lambda finished: future.set_result(self._result(finished)))
        return future

    def _result(self, finished: Future[JobResult]) -> JobResult:
        error = finished.exception()
        if error is None:
            return finished.result()
        cancelled = isinstance(error, self._ray.exceptions.TaskCancelledError)
        return JobResult(130 if cancelled else 1, str(error).splitlines()[-LAST_LINES:])

    def interrupt(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task, force=False)


def _gpu(index: int) -> str:
    """The name of the index-th GPU that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)
