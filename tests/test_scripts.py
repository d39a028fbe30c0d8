"""The shell scripts, with a `comp` that only notes how it was called."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bake import CHECKOUT, PROJECT

NOTE = 'echo "${CUDA_VISIBLE_DEVICES-all} comp $*" >> "$CALLS"'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A project with nothing but scripts and a `comp` that records its calls."""
    shutil.copytree(CHECKOUT / PROJECT / "scripts", tmp_path / "scripts")
    program(tmp_path, "comp", NOTE)
    return tmp_path


def program(place: Path, name: str, text: str) -> None:
    file = place / ".venv" / "bin" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{text}\n")
    file.chmod(0o755)


def environment(place: Path, gpus: str | None) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    return kept | {"CALLS": str(place / "calls")} | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})


def run(
    place: Path, script: str, *arguments: str, gpus: str | None = None
) -> subprocess.CompletedProcess[str]:
    command = [str(place / "scripts" / script), *arguments]
    return subprocess.run(
        command, env=environment(place, gpus), cwd="/", capture_output=True, text=True, check=False
    )


def calls(place: Path) -> list[str]:
    return (place / "calls").read_text().splitlines() if (place / "calls").exists() else []


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("make_folds.sh", [], ["prepare", "check", "folds"]),
        (
            "train_folds.sh",
            ["exp001", "train.epochs=2", "--as", "x y"],
            ["train exp001 train.epochs=2 --as x y --on local"],
        ),
        ("submit.sh", ["b1"], ["submit b1 --dry-run"]),
    ],
)
def test_calls_the_verbs_and_prints_them(place, script, arguments, expected):
    done = run(place, script, *arguments)
    assert done.returncode == 0, done.stderr
    assert calls(place) == [f"all comp {call}" for call in expected]
    assert done.stdout.splitlines() == [f"+ comp {call}" for call in expected]


@pytest.mark.parametrize("script", ["train_folds.sh", "submit.sh"])
def test_says_what_it_needs(place, script):
    done = run(place, script)
    assert (done.returncode, calls(place)) == (2, [])
    assert f"scripts/{script}" in done.stderr


@pytest.mark.parametrize("script", ["make_folds.sh", "train_folds.sh", "submit.sh"])
def test_a_failing_verb_ends_the_script(place, script):
    program(place, "comp", NOTE + "; exit 2")
    assert run(place, script, "a", "b").returncode == 2
    assert len(calls(place)) == 1


# A signal held back until it is waited for cannot come too early; it then takes its time, as a checkpoint
# does.
STOPPABLE = """
import os, signal
signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
open("ready" + os.environ["CUDA_VISIBLE_DEVICES"], "w").close()
number = signal.sigwait(signals)
for _ in range(10**6):
    pass
with open(os.environ["CALLS"], "a") as calls:
    calls.write(f"{int(number)}\\n")
raise SystemExit(128 + number)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_only_process(place, number):
    """SLURM signals the shell of a batch job, which would die of it and leave comp alone."""
    os.mkfifo(place / "readyall")
    (place / "comp.py").write_text(STOPPABLE)
    program(place, "comp", f"cd {place}; exec {sys.executable} comp.py")
    script = subprocess.Popen(
        [str(place / "scripts" / "train_folds.sh"), "exp001"],
        env=environment(place, None) | {"CUDA_VISIBLE_DEVICES": "all"},
        stdout=subprocess.DEVNULL,
    )
    (place / "readyall").read_text()
    script.send_signal(number)
    assert script.wait() == 128 + number
    assert calls(place) == [str(int(number))]
