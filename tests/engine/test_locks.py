"""Locks and temporary files of processes that see each other, and of those that do not: in two pid
namespaces, which is what two containers are to each other; after a boot; without /proc."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import HERE
from forked import forked

from comp.engine import cli
from comp.engine.errors import UserError
from comp.engine.store import artifacts, locks, paths, process
from comp.engine.tune import study

HOLD = """
import sys
from pathlib import Path
from comp.engine.store import artifacts, locks, process
with locks.lock(Path(sys.argv[1]), "training"), artifacts.atomic(Path(sys.argv[1], "x.arrow")) as temporary:
    temporary.write_text("half")
    print(process.own_id(), flush=True)
    sys.stdin.read()
"""
TAKE = """
import sys
from pathlib import Path
from comp.engine.errors import UserError
from comp.engine.store import locks
try:
    with locks.lock(Path(sys.argv[1]), "training"):
        print("taken")
except UserError as refused:
    print(refused)
    sys.exit(2)
"""
COVERED = """
import os, signal, sys
from pathlib import Path
from comp.engine.errors import UserError
from comp.engine.store import locks, process
folder = Path(sys.argv[1])
assert not Path("/proc/self").exists() and process.PROC == Path("/proc")
def child():
    here, there = os.pipe()
    if (pid := os.fork()) == 0:
        with locks.lock(folder, "training"):
            os.write(there, b"x")
            signal.pause()
    os.read(here, 1)
    return pid
pid = child()
try:
    with locks.lock(folder, "again"):
        print("taken from the living")
except UserError as refused:
    print(refused)
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
with locks.lock(folder, "again"):
    print("taken from the dead")
"""
LONG_AGO = 11 * 60


@pytest.fixture(scope="module")
def namespace() -> list[str]:
    """A command before a command: a pid namespace of its own. Root may always make one, in CI above all;
    elsewhere the kernel's settings decide (kernel.apparmor_restrict_unprivileged_userns,
    user.max_user_namespaces)."""
    return _allowed(["--pid", "--fork", "--mount-proc"])


def _allowed(flags: list[str]) -> list[str]:
    root = os.geteuid() == 0
    command = ["unshare", *([] if root else ["--user", "--map-root-user"]), *flags]
    if sys.platform != "linux":
        pytest.skip("namespaces are Linux's")
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        assert not root, f"namespaces may not be made here, though this is root: {tried.stderr}"
        pytest.skip(f"this user may not make namespaces: {tried.stderr.strip()}")
    return command


@pytest.fixture
def folder(empty: Path) -> Path:
    return empty / "runs" / "x" / "seed0" / "fold0"


@pytest.fixture
def held(namespace: list[str], folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A lock, and a file half-written, of a process in another pid namespace: how it calls itself, and
    `unshare`, its parent."""
    command = [*namespace, "--kill-child", sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        yield started.stdout.readline().strip(), started
        started.kill()


def refusal(folder: Path, **how: Any) -> str:
    with pytest.raises(UserError) as refused, locks.lock(folder, "training", **how):
        pass
    return str(refused.value)


def aged(file: Path, seconds: float = LONG_AGO) -> None:
    stamp = file.stat().st_mtime - seconds
    os.utime(file, (stamp, stamp))


def elsewhere() -> str:
    """A process of the same pid and start on another host."""
    return "-".join(["0" * 8, *process.own_id().split("-")[1:]])


def held_by(folder: Path, name: str, job: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / locks.LOCK).write_text("\n".join(["7", name, "worker-2", "12:00:00", "training", job, ""]))


def test_a_lock_of_another_pid_namespace_is_held_whatever_that_pid_is_here(
    namespace: list[str], folder: Path, held: tuple[str, subprocess.Popen[str]]
) -> None:
    """Two containers over one disk: each sees its own processes only."""
    name, owner = held
    assert name.split("-")[3] == "1", "the first process of its namespace"
    said = refusal(folder)
    for fact in ("process 1 ", f"on host {process.host()}", "heartbeat", "--steal-lock"):
        assert fact in said
    other = [*namespace, sys.executable, "-c", TAKE, str(folder)]
    taken = subprocess.run(other, capture_output=True, text=True, check=False)
    assert (taken.returncode, "process 1 on host" in taken.stdout) == (2, True), taken
    with locks.steal():
        assert "--steal-lock" in refusal(folder), "its heartbeat is young"
    aged(folder / locks.LOCK)
    assert "heartbeat 11 min ago" in refusal(folder), "age alone proves nothing"
    assert "heartbeat 11 min ago" in refusal(folder, wait=True), "nobody will come to release it"
    with locks.steal(), locks.lock(folder, "training"):
        assert locks.owner(folder)
    assert not (folder / locks.LOCK).exists() and owner.poll() is None


def test_clean_deletes_temporary_files_of_dead_processes_only(
    folder: Path, held: tuple[str, subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    name, owner = held
    part = folder / f".x.arrow.{name}.part"
    assert part.read_text() == "half"
    assert name.split("-")[3] == "1" and process.ID.fullmatch(name)
    owner.kill()  # and its child with it
    owner.wait()
    assert forked(lambda: _half_written(folder)) == signal.SIGKILL
    (dead,) = set(folder.glob("*.part")) - {part}
    assert cli.main(["clean", "--trash"]) == 2, "the lock of another namespace is held"
    (folder / locks.LOCK).unlink()
    with artifacts.atomic(folder / "mine") as mine:
        mine.write_text("half")
        assert cli.main(["clean", "--trash"]) == 0
        assert mine.exists() and part.exists() and not dead.exists()
        assert cli.main(["clean", "--trash", "--steal-lock"]) == 0 and part.exists()
        aged(part)
        capsys.readouterr()
        assert cli.main(["clean", "--trash"]) == 0 and part.exists()
        assert "comp clean --trash --steal-lock" in capsys.readouterr().out
        assert cli.main(["clean", "--trash", "--steal-lock"]) == 0
        assert mine.exists() and not part.exists()
    assert cli.main(["clean", "--steal-lock"]) == 2


def _half_written(folder: Path) -> None:
    with artifacts.atomic(folder / "y.arrow") as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_lock_of_a_visible_living_process_is_never_taken_over(folder: Path) -> None:
    with locks.lock(folder, "training"), locks.steal():
        aged(folder / locks.LOCK)
        assert f"process {os.getpid()} is already training" in refusal(folder)


@pytest.mark.parametrize("hidden", [False, True])
def test_the_lock_of_a_visible_dead_process_is_taken_over_at_once(
    folder: Path, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without /proc psutil says who lives."""
    if hidden:
        monkeypatch.setattr(process, "PROC", folder / "no-proc")
    process._id.cache_clear()
    try:
        assert (process.own_id().split("-")[1] == "") == hidden

        def die() -> None:
            with locks.lock(folder, "training"):
                os.kill(os.getpid(), signal.SIGKILL)

        assert forked(die) == signal.SIGKILL
        with locks.lock(folder, "again"):
            assert f"process {os.getpid()} is already again" in refusal(folder)
        # The pid lives, and is another process's by now.
        held_by(folder, re.sub(r"\d+$", lambda start: str(int(start[0]) - 500), process.own_id()))
        with locks.lock(folder, "again"):
            pass
    finally:
        process._id.cache_clear()


def test_with_proc_covered_by_an_empty_folder_a_pid_that_is_gone_is_dead(folder: Path) -> None:
    command = [*_allowed(["--mount"]), "sh", "-c", 'mount -t tmpfs tmpfs /proc && exec "$@"', "sh"]
    done = subprocess.run(
        [*command, sys.executable, "-c", COVERED, str(folder)], capture_output=True, text=True, check=False
    )
    living, dead = done.stdout.splitlines()
    assert "is already training" in living and "--steal-lock" in living
    assert dead == "taken from the dead"


def test_an_owner_from_before_this_machines_boot_is_dead_and_one_of_its_namesake_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "INITIAL_NAMESPACE", process._namespace())
    host, boot, *rest = process.own_id().split("-")
    before, booted = "-".join([host, "0" * 8, *rest]), process._boot_time()
    assert process.state(before, booted - 5) == "dead"
    assert process.state(before, booted + 5) == "unknown", "it lives: another machine of that name"
    assert process.state(before) == "unknown"
    assert process.state("-".join(["0" * 8, boot, *rest]), booted - 5) == "unknown", "another host"
    monkeypatch.setattr(process, "INITIAL_NAMESPACE", "1")
    assert process.state(before, booted - 5) == "unknown", "in a container: its name says little"


@pytest.mark.parametrize("torn", ["", "4711", "7-7", "0" * 8 + "-----"])
def test_an_incomplete_lock_file_is_taken_over(folder: Path, torn: str) -> None:
    folder.mkdir(parents=True)
    (folder / locks.LOCK).write_text(torn)
    with locks.lock(folder, "training"):
        pass


def test_a_job_handed_out_again_waits_until_its_dead_owner_is_silent_for_long(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held_by(folder, elsewhere(), job="j1")
    waits = []

    def later(seconds: float) -> None:
        waits.append(seconds)
        aged(folder / locks.LOCK)

    monkeypatch.setattr("time.sleep", later)
    with locks.lock(folder, "training", job="j1"):
        assert len(waits) == 1 and "waiting for it" in capsys.readouterr().out
    held_by(folder, elsewhere(), job="j1")
    aged(folder / locks.LOCK)
    assert "worker-2" in refusal(folder, job="j2")


def test_an_owner_renews_its_heartbeat_and_ends_when_its_lock_is_another_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.001)

    def owner() -> None:
        with locks.lock(folder, "training"):
            aged(folder / locks.LOCK)
            old = (folder / locks.LOCK).stat().st_mtime
            while (folder / locks.LOCK).stat().st_mtime == old:
                pass
            held_by(folder, elsewhere())
            signal.pause()

    assert os.waitstatus_to_exitcode(forked(owner)) == 1
    assert "was taken over" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("worker", "silent", "dead"),
    [
        (process.own_id, False, False),
        (process.own_id, True, False),  # busy cores: it is seen to live
        (elsewhere, False, False),
        (elsewhere, True, True),
        (lambda: "", False, True),  # asked for and never signed
        (lambda: process.own_id().replace(f"-{os.getpid()}-", "-4194303-"), False, True),
    ],
)
def test_a_study_takes_up_trials_of_the_dead_alone(
    worker: Callable[[], str], silent: bool, dead: bool
) -> None:
    trial: Any = SimpleNamespace(user_attrs={"worker": worker()}, _trial_id=3)
    assert study._is_dead(trial, {3} if silent else set()) == dead


# The modules that take a lock or refuse because of one -> the verbs that come to it.
LOCKING = {
    "comp/engine/extras/clean.py": ["clean"],
    "comp/engine/deliver/download.py": ["download"],
    "comp/engine/deliver/kernel.py": ["kernel"],
    "comp/engine/deliver/push.py": ["kernel"],
    "comp/engine/deliver/rehearse.py": ["kernel"],
    "comp/engine/deliver/submit.py": ["submit"],
    "comp/engine/extras/tta_views.py": ["tta"],
    "comp/engine/ensemble/blend.py": ["ensemble"],
    "comp/engine/run/fingerprint.py": ["train", "tune", "seed-noise", "compare"],
    "comp/engine/run/execute.py": ["train", "tune", "seed-noise", "compare"],
    "comp/engine/run/merge_run.py": ["train", "seed-noise", "compare", "predict"],
    "comp/engine/extras/export.py": ["export"],
    "comp/engine/extras/features.py": ["features"],
    "comp/engine/extras/run_status.py": [],  # comp runs only prints the owner
    "comp/engine/run/repredict.py": ["predict"],
    "comp/engine/extras/pseudo_labels.py": ["pseudo"],
    # whatever looks at a picture, or into an archive
    "comp/engine/data/cache.py": ["cache", "lr-range", "model", "explain", "submit", "audit"],
    "comp/engine/readers/containers.py": ["inspect", "prepare", "check", "folds", "augment", "label-errors"],
    "comp/engine/tune/report.py": ["tune"],
}


def test_every_verb_that_takes_a_lock_has_steal_lock(capsys: pytest.CaptureFixture[str]) -> None:
    asks = re.compile(r"locks\.(lock|owner)\(")
    found = {
        str(file.relative_to(HERE)) for file in (HERE / "comp").rglob("*.py") if asks.search(file.read_text())
    }
    assert found == LOCKING.keys()
    flagged = {name for name, verb in cli.VERBS.items() if verb.locks}
    assert flagged == {name for names in LOCKING.values() for name in names}
    for name in cli.VERBS:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert ("--steal-lock" in capsys.readouterr().out) == (name in flagged), name


def test_the_flag_holds_for_one_call_and_for_what_it_starts(folder: Path) -> None:
    held_by(folder, elsewhere())
    aged(folder / locks.LOCK)
    assert cli.main(["clean", "--trash"]) == 2
    assert cli.main(["clean", "--trash", "--steal-lock"]) == 0
    assert cli.main(["clean", "--trash"]) == 2


def test_windows_is_refused_at_the_first_import() -> None:
    code = "import sys; sys.platform = 'win32'; import comp"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "WSL" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_two_containers_do_not_train_one_fold(project: Path, namespace: list[str]) -> None:
    """Each in a pid namespace of its own, and the second in the middle of the first's training."""
    shutil.copytree(HERE / "comp", project / "comp", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "comp" / "competition.py").write_text("")
    train = [
        *[*namespace, sys.executable, "-m", "comp", "train", "exp001", "--as", "run", "--fold", "0", "track=none"],
        *["machine.num_workers=0", "machine.progress=false", "train.epochs=12", "train.max_samples=64", "schedule.warmup=0"],
    ]  # fmt: skip
    log = paths.fold_folder("run", 0, 0) / "log.jsonl"
    first = subprocess.Popen(train, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while first.poll() is None and not (log.exists() and '"epoch": 2' in log.read_text()):
        pass
    (trainer,) = psutil.Process(first.pid).children()
    trainer.suspend()  # the second shall meet it, however long it takes to start
    second = subprocess.run(train, capture_output=True, text=True, check=False)
    assert second.returncode == 2 and "is already training seed 0 fold 0" in second.stderr
    trainer.resume()
    assert first.wait() == 0, first.communicate()[0]
    epochs = [line["epoch"] for line in map(json.loads, log.read_text().splitlines()) if "epoch" in line]
    assert epochs == list(range(1, 13))
