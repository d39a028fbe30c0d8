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
    """A project with nothing but scripts, and a bin with a comp, a python that counts five folds and no GPU."""
    shutil.copytree(CHECKOUT / PROJECT / "scripts", tmp_path / "scripts")
    program(tmp_path, "comp", NOTE)
    program(tmp_path, "python", "echo 5")
    program(tmp_path, "nvidia-smi", "exit 9")
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
            ["train exp001 train.epochs=2 --as x y"],
        ),
        ("predict_and_blend.sh", ["b1", "e1", "e2"], ["predict e1", "predict e2", "ensemble b1", "runs"]),
        ("submit.sh", ["b1"], ["submit b1 --dry-run"]),
    ],
)
def test_calls_the_verbs_and_prints_them(place, script, arguments, expected):
    done = run(place, script, *arguments)
    assert done.returncode == 0, done.stderr
    assert calls(place) == [f"all comp {call}" for call in expected]
    assert done.stdout.splitlines() == [f"+ comp {call}" for call in expected]


@pytest.mark.parametrize("script", ["train_folds.sh", "predict_and_blend.sh", "submit.sh"])
def test_says_what_it_needs(place, script):
    done = run(place, script)
    assert (done.returncode, calls(place)) == (2, [])
    assert f"scripts/{script}" in done.stderr


@pytest.mark.parametrize("script", ["make_folds.sh", "train_folds.sh", "predict_and_blend.sh", "submit.sh"])
def test_a_failing_verb_ends_the_script(place, script):
    program(place, "comp", NOTE + "; exit 2")
    assert run(place, script, "a", "b").returncode == 2
    assert len(calls(place)) == 1


@pytest.mark.parametrize("gpus", ["0,2", None], ids=["CUDA_VISIBLE_DEVICES", "nvidia-smi"])
def test_each_fold_on_one_gpu_then_the_join(place, gpus):
    program(place, "nvidia-smi", "printf '0\\n2\\n'")
    done = run(place, "train_folds.sh", "exp001", "--seed", "1", gpus=gpus)
    assert done.returncode == 0, done.stderr
    made = calls(place)
    assert sorted(made[:5]) == [
        *(f"0 comp train exp001 --seed 1 --fold {fold}" for fold in (0, 2, 4)),
        *(f"2 comp train exp001 --seed 1 --fold {fold}" for fold in (1, 3)),
    ]
    assert made[5:] == [f"{gpus or 'all'} comp train exp001 --seed 1"]
    assert all(f"+ CUDA_VISIBLE_DEVICES={call}" in done.stdout for call in made[:5])


@pytest.mark.parametrize("gpus", ["", "3"])
def test_one_gpu_or_none_leaves_the_order_to_comp(place, gpus):
    assert run(place, "train_folds.sh", "exp001", gpus=gpus).returncode == 0
    assert calls(place) == [f"{gpus} comp train exp001"]


def test_a_failed_fold_fails_the_whole_and_is_not_joined(place):
    program(place, "comp", NOTE + '; [[ "$*" != *"--fold 1"* ]] || exit 3')
    done = run(place, "train_folds.sh", "exp001", gpus="0,1")
    assert done.returncode == 3
    assert not any(call.endswith("train exp001") for call in calls(place))
    assert "goes on where it stopped" in done.stderr


# A signal held back until it is waited for cannot come too early; it then takes its time, as a checkpoint does.
STOPPABLE = """
import os, signal
asked = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, asked)
open("ready" + os.environ["CUDA_VISIBLE_DEVICES"], "w").close()
number = signal.sigwait(asked)
for _ in range(10**6):
    pass
with open(os.environ["CALLS"], "a") as calls:
    calls.write(f"{int(number)}\\n")
raise SystemExit(128 + number)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_every_gpu(place, number):
    """Children of a script ignore SIGINT in the background, unless it takes care."""
    for name in ("ready0", "ready1"):
        os.mkfifo(place / name)
    (place / "comp.py").write_text(STOPPABLE)
    program(place, "comp", f"cd {place}; exec {sys.executable} comp.py")
    # Whoever runs the tests in the background of a shell has them ignore SIGINT; a child would inherit that, and bash cannot
    # undo it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    script = subprocess.Popen(
        [str(place / "scripts" / "train_folds.sh"), "exp001"],
        env=environment(place, "0,1"),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    for gpu in range(2):
        (place / f"ready{gpu}").read_text()
    script.send_signal(number)
    assert script.wait() == 128 + number
    assert calls(place) == [str(int(number))] * 2


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
