"""Jobs in parallel: the same bytes as one after the other, here and on a cluster that loses a machine; no job
outlives its parent."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE

from comp.engine import cli, hardware
from comp.engine.bank import bank
from comp.engine.data import folds, samples
from comp.engine.errors import UserError
from comp.engine.run import launcher, runner
from comp.engine.store import artifacts, paths

SMALL = ["track=none", "machine.num_workers=0", "train.max_samples=64", "schedule.warmup=0"]


@pytest.fixture
def alone(project: Path) -> Path:
    """A project with its own copy of comp/, since the jobs import comp/competition.py from there."""
    shutil.copytree(HERE / "comp", project / "comp", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "comp" / "competition.py").write_text("")
    return project


def weights(name: str) -> dict[str, str]:
    return {
        str(file.relative_to(paths.run_folder(name))): artifacts.sha256(file)
        for file in paths.run_folder(name).rglob("weights.safetensors")
    }


def scores(name: str) -> dict[str, object]:
    record = artifacts.read_json(paths.run_folder(name) / "score.json")
    return {key: record[key] for key in ("oof", "mean", "std", "folds")}


def test_folds_in_parallel_have_the_bytes_of_folds_one_after_the_other(
    alone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    two = [*SMALL, "train.epochs=1", "train.seeds=[0,1]"]
    runner.train("exp001", two, name="alone", fold="0")
    arguments = ["train", "exp001", *two, "--as", "beside", "--fold", "0", "--on", "local:2"]
    assert cli.main(arguments) == 0
    assert weights("alone") == weights("beside") and len(weights("beside")) == 2
    assert "beside seed 1 fold 0: " in capfd.readouterr().out
    assert cli.main(arguments) == 0, "what is done is not begun again"


@pytest.mark.parametrize("on", ["local:0", "local:x", "ray:3", "spark"])
def test_an_invalid_executor_is_refused(project: Path, on: str) -> None:
    with pytest.raises(UserError, match=r"--on .*: must be local"):
        launcher.make_executor(on, 1)


def test_the_output_of_a_failed_job_is_shown_and_the_others_stop(project: Path) -> None:
    lost = [launcher.Job(f"n{i}", "fold", {"name": f"n{i}", "seed": 0, "fold": 0}) for i in range(3)]
    with pytest.raises(UserError) as refused:
        launcher.run_jobs(
            lost, launcher.LocalExecutor(1, 1, launcher.print_line), hardware.Stop(), lambda left: None
        )
    assert refused.value.lines[0] == "n0: failed"
    assert "n0: no such run" in refused.value.lines[1]


class WaitingExecutor:
    """An executor whose jobs run until they are interrupted."""

    size, machines = 2, 1

    def __init__(self) -> None:
        self.futures: list[Future[launcher.JobResult]] = []

    def submit(self, job: launcher.Job) -> Future[launcher.JobResult]:
        self.futures.append(Future())
        return self.futures[-1]

    def interrupt(self) -> None:
        for future in self.futures:
            future.set_result(launcher.JobResult(130, []))


def test_ctrl_c_interrupts_every_job_once(project: Path) -> None:
    executor, stop = WaitingExecutor(), hardware.Stop()
    stop.requested = True
    with pytest.raises(KeyboardInterrupt, match="every job has saved its state"):
        launcher.run_jobs(
            [launcher.Job("a", "fold", {}), launcher.Job("b", "fold", {})], executor, stop, lambda left: None
        )
    assert len(executor.futures) == 2


def test_a_job_ends_with_the_process_that_started_it(project: Path) -> None:
    code = (
        "import sys, threading, types; from comp.engine import worker; sys.argv = ['', 'hold', '{}']\n"
        "module = sys.modules['comp.engine.hold'] = types.ModuleType('hold')\n"
        "module.hold = lambda: (print('on', flush=True), threading.Event().wait())\n"
        "worker.FUNCTIONS['hold'] = 'hold:hold'; worker.main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None and job.stdout.readline() == "on\n"
        assert job.stdin is not None
        job.stdin.close()  # as the kernel does for a process that is killed
        assert job.wait() == 1


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """One core, no dashboard; more nodes with add_node. Started once: that takes longer than what runs on
    it."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_agent_register_timeout_ms", "600000")  # a busy machine takes its time
        patch.setenv("RAY_worker_register_timeout_seconds", "600")
        started = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 10**8},
        )
        patch.setenv("RAY_ADDRESS", started.address)
        yield started
        started.shutdown()


@pytest.fixture
def cluster(machines: Any) -> Iterator[Any]:
    yield machines
    import ray

    ray.shutdown()  # leaves it


def text(file: Path) -> str:
    """Empty if the file, or the process, is gone."""
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def above(pid: str) -> Iterator[str]:
    """The parents of a process."""
    while stat := text(Path("/proc", pid, "stat")):
        pid = stat.rpartition(")")[2].split()[1]
        yield pid


@pytest.mark.slow
def test_a_cluster_that_loses_a_machine_gives_the_same_bytes(alone: Path, cluster: Any) -> None:
    run = [*SMALL, "train.epochs=12"]
    runner.train("exp001", run, name="here")
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
    raylets = {str(process.pid) for _, process in nodes[0].live_processes()}
    owners: dict[Path, set[str]] = {}
    over, lost = threading.Event(), set[Path]()

    def lose_one() -> None:
        """As soon as a fold on the first of the machines is in the middle."""
        while not over.wait(0.05):
            for log in paths.run_folder("far").glob("seed*/fold*/log.jsonl"):
                if not (held := text(log.parent / ".lock").split("\n")[0]):
                    continue
                owners.setdefault(log.parent, set()).add(held)
                begun = text(log).count('"valid_metric"') in (1, 2)  # epochs, of twelve
                if begun and not lost and raylets & set(above(held)):
                    lost.add(log.parent)
                    cluster.remove_node(nodes[0], allow_graceful=False)

    watcher = threading.Thread(target=lose_one)
    watcher.start()
    try:
        runner.train("exp001", run, name="far", on="ray")
    finally:
        over.set()
        watcher.join()
    assert lost and all(len(owners[fold]) == 2 for fold in lost), "it began again elsewhere"
    assert weights("here") == weights("far") and len(weights("far")) == 5
    assert scores("here") == scores("far")
    table = samples.load()
    here, far = (
        bank.read(paths.run_folder(n) / "oof.arrow", table, folds.load(table)) for n in ("here", "far")
    )
    assert here.heads.keys() == far.heads.keys()
    assert all(here.heads[head].tobytes() == far.heads[head].tobytes() for head in here.heads)


@pytest.mark.slow
def test_a_study_on_a_cluster(tuned: Path, cluster: Any) -> None:
    from comp.engine.tune.open_study import open_study

    small = [*SMALL, "train.epochs=1"]
    assert cli.main(["tune", "exp001", "--space", "s", "--trials", "4", "--on", "ray", *small]) == 0
    opened = open_study("exp001", small, "s", None)
    trials = opened.study.get_trials()
    assert sorted(t.number for t in trials) == list(range(len(trials))) and len(trials) >= 4
    assert (opened.folder / "report.html").is_file()


@pytest.fixture
def tuned(alone: Path) -> Path:
    (alone / "configs" / "tune").mkdir()
    (alone / "configs" / "tune" / "s.yaml").write_text(
        "search:\n  optim.lr: {low: 1e-3, high: 2e-2, log: true}\nfolds: 2\n"
    )
    return alone
