"""A run that was killed and resumed ends in the same bytes as one that was not: real processes, real SIGKILL,
at given events.

Children are forked from this process, which has imported torch, so that twenty kills do not cost twenty
imports. An event is a line of the log, or before or after a rename.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import forked

from comp import data
from comp import train as loop
from comp.engine.errors import UserError
from comp.engine.run import checkpoint, runner, tracking
from comp.engine.store import artifacts, locks, paths

# Everything that has a state: momentum, averaged weights, dropout, random crops, accumulation, a schedule.
RECIPE = [
    "track=none", "augment=heavy", "model.drop_rate=0.3", "train.ema_decay=0.9", "train.epochs=2", "train.max_samples=96", "train.batch_size=8",
    "train.grad_accum_steps=2", "train.checkpoint_every=2", "machine.num_workers=0", "machine.progress=false",
]  # fmt: skip


def artefacts(root: Path) -> dict[str, str]:
    folder = root / "runs" / "run" / "seed0" / "fold1"
    return {
        name: artifacts.sha256(folder / name) for name in ("weights.safetensors", "oof.arrow", "test.arrow")
    }


def train(*overrides: str) -> None:
    runner.train("exp001", [*RECIPE, *overrides], fold="1", name="run")


def killed_at(event: int, work: Callable[[], None], after: str = "") -> Callable[[], None]:
    """The same in a process that kills itself with SIGKILL at the n-th event after a file was renamed."""

    def run() -> None:
        count, begun = 0, not after

        def happened() -> None:
            nonlocal count
            count += begun
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **named: Any) -> Any:
                nonlocal begun
                happened()
                out = function(*args, **named)
                begun |= str(args[-1]).endswith(after)
                happened()
                return out

            return call

        os.replace = counted(os.replace)
        tracking.RunLogger.log = counted(tracking.RunLogger.log)  # type: ignore[method-assign]
        work()

    return run


@pytest.fixture(scope="module")
def whole(practice: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A project, and what the uninterrupted run leaves in it."""
    root = tmp_path_factory.mktemp("whole") / "project"
    shutil.copytree(practice, root)
    os.environ["COMP_ROOT"] = str(root)
    paths.root.cache_clear()
    assert forked(train) == 0
    yield root, artefacts(root)
    del os.environ["COMP_ROOT"]
    paths.root.cache_clear()


@pytest.fixture
def fresh(whole: tuple[Path, dict[str, str]]) -> dict[str, str]:
    shutil.rmtree(whole[0] / "runs")
    return whole[1]


def events(seed: int, n: int) -> list[int]:
    return random.Random(seed).sample(range(1, 60), n)


@pytest.mark.parametrize("event", events(1, 4))
def test_killed_at_an_event_it_resumes_to_the_same_bytes(fresh: dict[str, str], event: int) -> None:
    status = forked(killed_at(event, train))
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "the kill must have happened"
    assert forked(train) == 0
    assert artefacts(paths.root()) == fresh


@pytest.mark.slow
def test_killed_at_twenty_events_in_a_row_and_one_by_one(fresh: dict[str, str]) -> None:
    for number, event in enumerate(events(2, 20)):
        shutil.rmtree(paths.root() / "runs", ignore_errors=True)
        assert os.WIFSIGNALED(forked(killed_at(event, train)))
        if number % 4 == 0:  # and once more on the way
            assert os.WIFSIGNALED(forked(killed_at(7, train)))
        assert forked(train) == 0
        assert artefacts(paths.root()) == fresh, f"killed at event {event}"


@pytest.mark.parametrize(
    "workers", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_the_same_bytes_for_any_number_of_workers(fresh: dict[str, str], workers: int) -> None:
    assert forked(lambda: train(f"machine.num_workers={workers}")) == 0
    assert artefacts(paths.root()) == fresh


def test_the_same_bytes_without_the_cache(fresh: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only as its own run: data.cache is a knob of the run, but its pixels are the same."""
    assert forked(lambda: runner.train("exp001", [*RECIPE, "data.cache=false"], fold="1", name="run")) == 0
    assert artefacts(paths.root())["weights.safetensors"] == fresh["weights.safetensors"]


def forget(part: str) -> Callable[..., Any]:
    """A checkpoint that lacks one part."""
    original = checkpoint.load_latest

    def newest(folder: Path, device: Any) -> Any:
        state = original(folder, device)
        if state is None:
            return None
        if part == "optimizer":
            for values in state["optimizer"]["state"].values():
                for name in ("exp_avg", "exp_avg_sq"):
                    values[name].zero_()
        if part == "averaged":
            state["weight_sets"]["ema"] = {k: v.clone() for k, v in state["model"].items()}
        if part == "schedule":
            state["step"] -= 1
        return state

    return newest


def careless(part: str) -> None:
    if part == "random":
        loop.derive_seed = lambda *numbers: random.SystemRandom().getrandbits(62)
    elif part == "sampler":
        whole_epoch = data.training_batches

        def from_its_start(rows: Any, size: int, seed: int, epoch: int, first: int, draw: Any) -> Any:
            return whole_epoch(rows, size, seed, epoch, 0, draw)

        vars(loop)["training_batches"] = from_its_start
    else:
        checkpoint.load_latest = forget(part)
    train()


@pytest.mark.parametrize("part", ["optimizer", "averaged", "schedule", "random", "sampler"])
def test_a_checkpoint_without_any_part_gives_other_bytes(fresh: dict[str, str], part: str) -> None:
    """So the tests above would notice a part that is not restored."""
    # In the second epoch, and not at its start: the place in the epoch's list must show too.
    assert os.WIFSIGNALED(forked(killed_at(4, train, after="state-00000008.pt")))
    assert (paths.root() / "runs/run/seed0/fold1/state-00000008.pt").exists()
    assert forked(lambda: careless(part)) == 0
    assert artefacts(paths.root())["weights.safetensors"] != fresh["weights.safetensors"]


def test_two_processes_do_not_train_one_fold(fresh: dict[str, str]) -> None:
    folder = paths.fold_folder("run", 0, 1)
    with locks.lock(folder, "training"):
        assert os.WEXITSTATUS(forked(train)) == 1
    assert forked(train) == 0


def test_a_dead_owners_lock_is_taken_over(tmp_path: Path, empty: Path) -> None:
    def die() -> None:
        with locks.lock(tmp_path, "training"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.WIFSIGNALED(forked(die))
    message = f"process {os.getpid()} is already training"
    with (
        locks.lock(tmp_path, "training"),
        pytest.raises(UserError, match=message),
        locks.lock(tmp_path, "again"),
    ):
        pass


def test_a_damaged_state_is_an_error_with_a_remedy(
    fresh: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert os.WIFSIGNALED(forked(killed_at(4, train, after="state-00000008.pt")))
    state = paths.root() / "runs/run/seed0/fold1/state-00000008.pt"
    data_ = bytearray(state.read_bytes())
    data_[len(data_) // 3] ^= 4
    state.write_bytes(data_)
    assert forked(train) != 0
    message = capfd.readouterr().err
    assert "state-00000008.pt: damaged" in message and "--fresh" in message
