"""Jobs side by side: on this machine, one a GPU or several on the CPU, or over a Ray cluster. What a job is, and how it is begun,
followed and stopped, is the same for both; they differ in who starts it.

A job is a call of `leashed.py` in a process of its own. It may run twice (a machine dies, its job starts elsewhere), so whatever
it does says "done" last. The project's folder must lie at the same place on all machines, on a disk that they share.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from comp.engine import hardware
from comp.engine.errors import Refused
from comp.engine.store import locks, paths

LOOK = 0.3  # seconds between two looks whether Ctrl+C was pressed
LAST = 20  # lines of a job that failed which are shown: all of a traceback, or the one line of a refusal


class Job(NamedTuple):
    name: str
    call: str  # one of leashed.CALLS
    given: dict[str, Any]


class JobResult(NamedTuple):
    code: int
    last: list[str]


class Executor(Protocol):
    size: int  # jobs that run at a time
    machines: int

    def begin(self, job: Job) -> Future[JobResult]: ...
    def interrupt(self) -> None:
        """The signal that we got, for every job; those that wait do not begin."""


def print_line(line: str) -> None:
    """Above a bar, if there is one."""
    tqdm.write(line, end="")


def run_jobs(jobs: list[Job], executor: Executor, stop: hardware.Stop, look: Callable[[int], object]) -> None:
    """All of them; `look` hears again and again how many are left. The first that fails stops the others, which keep what they have."""
    with stop.listening():
        _out(jobs, executor, stop, look)


def _out(jobs: list[Job], executor: Executor, stop: hardware.Stop, look: Callable[[int], object]) -> None:
    running = {executor.begin(job): job for job in jobs}
    failed: list[str] = []
    told = False
    while running:
        try:
            done, _ = wait(running, LOOK, FIRST_COMPLETED)
        except KeyboardInterrupt:  # for the second time
            executor.interrupt()
            raise
        look(len(running))
        for future in done:
            job = running.pop(future)
            if future.cancelled() or (ended := future.result()).code in (0, *hardware.STOPPED) or stop.asked:
                continue
            failed = failed or [f"{job.name} failed:", *ended.last]
        if (stop.asked or failed) and not told:
            told = True
            executor.interrupt()
    if failed:
        raise Refused(*failed)
    if stop.asked:
        raise hardware.Stopped("every job keeps what it has")


def run_job(
    job: Job,
    root: str,
    extra: dict[str, str],
    say: Callable[[str], None] = print_line,
    begun: Callable[[subprocess.Popen[str]], None] = lambda process: None,
) -> JobResult:
    """Start one job's process, show what it says, wait for it. It holds on to our end of its standard input: when this
    process dies, by whatever, the job dies too, and may begin elsewhere."""
    with subprocess.Popen(
        [sys.executable, "-m", "comp.engine.worker", job.call, json.dumps(job.given)],
        cwd=root,
        env=os.environ | {"COMP_ROOT": root} | extra,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # the terminal's Ctrl+C reaches us alone, and we pass it on
    ) as process:
        begun(process)
        last: list[str] = []
        assert process.stdout is not None
        while True:
            try:
                for line in process.stdout:
                    say(line)
                    last = [*last, line.rstrip()][-LAST:]
                break
            except KeyboardInterrupt:  # how Ray cancels
                process.send_signal(signal.SIGINT)
        return JobResult(process.wait(), last)


def make_executor(on: str, threads: int, say: Callable[[str], None] = print_line) -> Executor:
    """`local`, `local:4` or `ray`. What jobs say goes to `say`; from other machines Ray brings it here by itself."""
    kind, colon, count = on.partition(":")
    if kind == "ray" and not colon:
        return RayExecutor(threads)
    if kind != "local" or (colon and not (count.isdigit() and int(count) > 0)):
        raise Refused(
            f"--on {on}: wants local (one job a GPU, or as many as the cores allow), local:N, or ray"
        )
    return LocalExecutor(threads, int(count) if count else None, say)


class LocalExecutor:
    """Each job has a GPU of its own, or `threads` cores."""

    machines = 1

    def __init__(self, threads: int, count: int | None, say: Callable[[str], None]):
        import torch

        gpus = torch.cuda.device_count()
        self.size = count or gpus or max(1, hardware.cores() // threads)
        self._say = say
        self._slots: queue.Queue[dict[str, str]] = queue.Queue()
        for i in range(self.size):
            self._slots.put({"CUDA_VISIBLE_DEVICES": _visible(i % gpus)} if gpus else {})
        self._pool = ThreadPoolExecutor(self.size)
        self._processes: list[subprocess.Popen[str]] = []
        self._waiting: list[Future[JobResult]] = []
        self._stopped = False

    def begin(self, job: Job) -> Future[JobResult]:
        self._waiting.append(self._pool.submit(self._carry, job))
        return self._waiting[-1]

    def _carry(self, job: Job) -> JobResult:
        slot = self._slots.get()
        try:
            return run_job(job, str(paths.root()), slot, self._say, self._begun)
        finally:
            self._slots.put(slot)

    def _begun(self, process: subprocess.Popen[str]) -> None:
        self._processes.append(process)
        if self._stopped:
            process.send_signal(hardware.received())

    def interrupt(self) -> None:
        self._stopped = True
        for future in self._waiting:
            future.cancel()
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(hardware.received())


class RayExecutor:
    """Ray picks the machine, and begins a job again when its machine dies."""

    def __init__(self, threads: int):
        try:
            import ray
        except ImportError:
            raise Refused("--on ray: needs the extra ray: pip install ray") from None
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address=os.environ.get("RAY_ADDRESS", "auto"), logging_level=logging.ERROR, log_to_driver=True
            )
        except ConnectionError:
            raise Refused(
                "--on ray: no cluster found; ray start --head here, and ray start --address=… on the other machines"
            ) from None
        signal.signal(signal.SIGTERM, before)  # ray.init puts its own handler there, which exits with 15
        self._ray = ray
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self.machines = len({node["NodeManagerAddress"] for node in nodes})
        gpus, cpus = (int(sum(n["Resources"].get(kind, 0) for n in nodes)) for kind in ("GPU", "CPU"))
        self.size = max(1, gpus or cpus // threads)
        # A dead machine's jobs begin again without end; a job that fails by itself does not.
        needs = {"num_cpus": 1 if gpus else threads, "num_gpus": 1 if gpus else 0}
        self._options = {**needs, "max_retries": -1}
        self._carry = ray.remote(run_job)
        self._begun: list[Any] = []

    def begin(self, job: Job) -> Future[JobResult]:
        passed = {locks.STEAL: os.environ.get(locks.STEAL, "")}
        self._begun.append(
            self._carry.options(name=job.name, **self._options).remote(job, str(paths.root()), passed)
        )
        future: Future[JobResult] = Future()
        self._begun[-1].future().add_done_callback(lambda found: future.set_result(self._ended(found)))
        return future

    def _ended(self, found: Future[JobResult]) -> JobResult:
        error = found.exception()
        if error is None:
            return found.result()
        cancelled = isinstance(error, self._ray.exceptions.TaskCancelledError)
        return JobResult(130 if cancelled else 1, str(error).splitlines()[-LAST:])

    def interrupt(self) -> None:
        for reference in self._begun:
            self._ray.cancel(reference, force=False)


def _visible(number: int) -> str:
    """Of the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[number] if named else str(number)
