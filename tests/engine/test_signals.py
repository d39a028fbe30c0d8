"""SIGTERM (SLURM, Kubernetes, spot machines) and SIGUSR1 end a verb as Ctrl+C does: one line, nothing
half-written, and the same command ends in the bytes of a run that was never disturbed. Real processes,
signalled at an event of theirs."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import studies
from conftest import HERE
from forked import forked

from comp.engine import cli, hardware
from comp.engine.run import checkpoint, launcher, tracking
from comp.engine.store import artifacts, locks, paths

TRAIN = [
    *["train", "exp001", "--as", "run", "--fold", "1", "track=none", "augment=heavy", "train.ema_decay=0.9", "train.epochs=2"],
    *["train.max_samples=48", "train.batch_size=8", "schedule.warmup=0", "machine.num_workers=0", "machine.progress=false"],
]  # fmt: skip


Happened = Callable[[str], None]


def code(work: Callable[[], int | None]) -> int:
    """Of a forked process that ends as `comp` does."""
    return os.waitstatus_to_exitcode(forked(lambda: os._exit(work() or 0)))


def at_event(n: int, act: Callable[[], object], after: str = "") -> Happened:
    """Calls act at the n-th event, counted from the one that contains `after` on."""
    seen = itertools.count(1)
    begun = not after

    def happened(what: str) -> None:
        nonlocal begun
        begun = begun or after in what
        if begun and next(seen) == n:
            act()

    return happened


def at_lines(happened: Happened) -> None:
    """Every line of a run's log is an event, by the name of its axis."""
    log = tracking.RunLogger.log

    def logged(self: tracking.RunLogger, record: Any) -> None:
        log(self, record)
        happened("epoch" if "epoch" in record else "step")

    tracking.RunLogger.log = logged  # type: ignore[method-assign]


def at_renames(happened: Happened) -> None:
    """Every temporary file of artifacts.atomic, when it is written and not yet in its place."""

    def hook(event: str, about: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(about[0]).endswith(".part"):
            happened(str(about[1]))

    sys.addaudithook(hook)


def command(arguments: list[str], watch: Callable[[Happened], None], happened: Happened) -> int:
    watch(happened)
    return cli.main(arguments)


def hit(*numbers: int) -> Callable[[], None]:
    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


def hit_group() -> None:
    """From outside of it, as SLURM and torchrun do."""
    subprocess.run(["kill", "-s", "TERM", "--", f"-{os.getpgid(0)}"], start_new_session=True, check=True)


def left_behind(root: Path) -> list[str]:
    return [
        str(file.relative_to(root))
        for file in root.rglob(".*")
        if file.name == locks.LOCK or file.suffix == ".part"
    ]


def one_line(capfd: pytest.CaptureFixture[str], number: int = signal.SIGTERM) -> str:
    lines = capfd.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("stopped"))
    assert f" by {signal.Signals(number).name}: " in line and "the same command continues" in line
    assert lines == [line]
    return line


def artefacts() -> dict[str, str]:
    folder = paths.fold_folder("run", 0, 1)
    return {
        each: artifacts.sha256(folder / each) for each in ("weights.safetensors", "oof.arrow", "test.arrow")
    }


@pytest.fixture(scope="module")
def whole(practice: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A project, and what the undisturbed run leaves in it."""
    root = tmp_path_factory.mktemp("whole") / "project"
    shutil.copytree(practice, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMP_ROOT", str(root))
        paths.root.cache_clear()
        assert code(lambda: cli.main(TRAIN)) == 0
        yield root, artefacts()
    paths.root.cache_clear()


@pytest.fixture
def fresh(whole: tuple[Path, dict[str, str]], capfd: pytest.CaptureFixture[str]) -> dict[str, str]:
    shutil.rmtree(whole[0] / "runs")
    capfd.readouterr()
    return whole[1]


def states() -> list[Path]:
    return list(paths.fold_folder("run", 0, 1).glob("state-*.pt"))


def test_sigusr1_saves_and_ends(fresh: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    """Further signals, to the process and to its group, change nothing."""
    numbers = (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM)
    assert code(lambda: command(TRAIN, at_lines, at_event(1, hit(*numbers), after="epoch"))) == 138
    assert "saved at step" in one_line(capfd, signal.SIGUSR1)
    assert states() and not left_behind(paths.root())


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_second_signal_while_saving_loses_nothing_and_the_resumed_run_has_the_same_bytes(
    fresh: dict[str, str], capfd: pytest.CaptureFixture[str], number: int, expected: int
) -> None:
    """A second SIGTERM waits for the state, a second Ctrl+C does not."""

    def twice() -> int:
        save = checkpoint.save

        def saving(*given: Any) -> None:
            at_renames(at_event(1, hit(number)))
            save(*given)

        checkpoint.save = saving  # type: ignore[assignment]
        at_lines(at_event(1, hit(number), after="epoch"))
        return cli.main(TRAIN)

    assert code(twice) == expected
    if number == signal.SIGTERM:
        assert "saved at step" in one_line(capfd)
    assert len(states()) == (number == signal.SIGTERM)
    assert not left_behind(paths.root())
    assert code(lambda: cli.main(TRAIN)) == 0
    assert artefacts() == fresh


def test_loader_processes_ignore_signals(fresh: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    """SLURM and torchrun signal the whole process group: a loader that died would be restarted while the run
    saves its state."""
    two = [*TRAIN, "machine.num_workers=2"]

    def work() -> int:
        os.setpgid(0, 0)
        at_lines(at_event(1, hit_group, after="epoch"))
        return cli.main(two)

    assert code(work) == 143
    assert "saved at step" in one_line(capfd)
    assert code(lambda: cli.main(two)) == 0
    assert artefacts() == fresh


# Verb -> arguments, and the file whose complete temporary file is not yet renamed when the signal arrives.
VERBS = {
    "prepare": ([], "samples.parquet"),
    "folds": (["--remake"], "folds.parquet"),
    "cache": (["exp002", "data.size=24"], "index.arrow"),
    "predict": (["exp001", "--tta", "identity,vflip"], "oof.arrow"),
    "ensemble": (["blend001"], "oof.arrow"),
    "kernel": (["blend001"], "bundle.json"),
    "pseudo": (["exp001", "--share", "0.2"], "exp001.parquet"),
    "slices": (["exp001"], "slices"),
    "submit": (["blend001", "--dry-run"], "blend001.csv"),
}


@pytest.mark.parametrize(
    "verb",
    [pytest.param(verb, marks=pytest.mark.slow) if verb in ("predict", "submit") else verb for verb in VERBS],
)
def test_no_verb_leaves_temporary_files(trained: Path, capfd: pytest.CaptureFixture[str], verb: str) -> None:
    arguments, file = VERBS[verb]
    given = [verb, *arguments]
    capfd.readouterr()
    assert code(lambda: command(given, at_renames, at_event(1, hit(signal.SIGTERM), after=file))) == 143
    one_line(capfd)
    assert not left_behind(trained)
    assert code(lambda: cli.main(given)) == 0


def test_a_job_of_the_launcher_ends_with_the_signal_of_its_parent(project: Path) -> None:
    hold = (
        "import sys, threading, types; from comp.engine import worker; sys.argv = ['', 'hold', '{}']\n"
        "module = sys.modules['comp.engine.hold'] = types.ModuleType('hold')\n"
        "module.hold = lambda: (print('on', flush=True), threading.Event().wait())\n"
        "worker.FUNCTIONS['hold'] = 'hold:hold'; sys.exit(worker.main())"
    )
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with subprocess.Popen(
            [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as job:
            assert job.stdout is not None and job.stdout.readline() == "on\n"
            job.send_signal(number)
            assert job.wait() == 128 + number


def test_the_signal_handler_of_ray_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """ray.init installs one that exits with 15 and saves nothing."""

    class Fake:
        remote = staticmethod(lambda function: function)
        nodes = staticmethod(list[Any])

        @staticmethod
        def init(**_: Any) -> None:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))

    monkeypatch.setitem(sys.modules, "ray", Fake)
    with hardware.stop_on_signals():
        before = signal.getsignal(signal.SIGTERM)
        launcher.RayExecutor(1)
        assert signal.getsignal(signal.SIGTERM) is before


def test_signal_handlers_are_restored(empty: Path) -> None:
    before = [signal.getsignal(number) for number in hardware.STOP_SIGNALS]
    assert cli.main(["runs"]) == 0
    stop = hardware.Stop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.requested and [signal.getsignal(number) for number in hardware.STOP_SIGNALS] == before


@pytest.mark.slow
def test_a_search_saves_its_trial_and_resumes_it(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    studies.with_space(project)
    given = ["tune", "exp001", "--space", "s", "--trials", "2", *studies.SMALL]
    assert code(lambda: command(given, at_lines, at_event(1, hit(signal.SIGTERM), after="epoch"))) == 143
    assert "saved at step" in capfd.readouterr().err
    assert not left_behind(project)
    assert code(lambda: cli.main(given)) == 0
    trials = studies.join(2).study.get_trials(deepcopy=False)
    assert [t.state.name for t in trials].count("COMPLETE") == 2
    assert trials[0].user_attrs["stopped"] and "deaths" in trials[-1].user_attrs | trials[1].user_attrs


def started(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture
def alone(project: Path) -> Path:
    """With a package of its own, for processes that are started in it."""
    shutil.copytree(HERE / "comp", project / "comp", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "comp" / "competition.py").write_text("")
    return project


LONG = [
    *["exp001", "track=none", "machine.num_workers=0", "machine.progress=false", "train.max_samples=64", "schedule.warmup=0"],
    "train.epochs=30",
]  # fmt: skip


def in_the_middle(process: subprocess.Popen[str], name: str, folds: int) -> None:
    """Waits until so many folds have logged an epoch."""
    logs = [paths.fold_folder(name, 0, number) / "log.jsonl" for number in range(folds)]
    while process.poll() is None and not all(
        log.exists() and '"epoch": 1' in log.read_text() for log in logs
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_parallel_jobs_save_their_state(alone: Path, number: int, expected: int) -> None:
    run = started("-m", "comp", "train", *LONG, "--as", "run", "--on", "local:2")
    in_the_middle(run, "run", 2)
    run.send_signal(number)
    output = run.communicate()[0]
    assert run.returncode == expected, output
    assert "every job has saved its state" in output
    assert all(list(paths.fold_folder("run", 0, fold).glob("state-*.pt")) for fold in range(2))
    assert not left_behind(alone)


@pytest.mark.slow
def test_processes_of_torchrun_save_their_state_and_resume_with_the_same_bytes(alone: Path) -> None:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "comp", "train"]
    assert started(*ranks, *LONG, "--fold", "0", "--as", "whole").wait() == 0
    run = started(*ranks, *LONG, "--fold", "0", "--as", "again")
    in_the_middle(run, "again", 1)
    run.send_signal(signal.SIGTERM)
    output = run.communicate()[0]
    assert "stopped by SIGTERM: saved at step" in output and not left_behind(alone), output
    assert started(*ranks, *LONG, "--fold", "0", "--as", "again").wait() == 0
    assert (
        len(
            {
                artifacts.sha256(paths.fold_folder(name, 0, 0) / "weights.safetensors")
                for name in ("whole", "again")
            }
        )
        == 1
    )
