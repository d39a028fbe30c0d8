"""One fold trained by several processes, with real torchrun over gloo, against one process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import banked
import numpy as np
import optuna
import pytest
import torch
from conftest import config
from forked import all_forked
from safetensors.torch import load_file

from comp.data import Index
from comp.engine import cli
from comp.engine.bank import bank
from comp.engine.data import folds, samples
from comp.engine.errors import UserError
from comp.engine.run import distributed, runner, tracking
from comp.engine.store import artifacts, paths
from comp.engine.tune.open_study import open_study

# All random operations except dropout, including mixup, a network without batch norm, and an optimizer that
# does not amplify rounding errors.
SHARED = [
    "track=none", "machine.num_workers=0", "machine.progress=false", "model.name=test_convnext", "augment=heavy", "optim.name=sgd",
    "optim.lr=0.05", "augment.mixup=0.4", "augment.mosaic=0.3", "train.ema_decay=0.9", "train.epochs=2", "train.max_samples=100", "keep.optimizer_state=true",
]  # fmt: skip

WITH_TEACHER = [*SHARED, "distill.teacher=teacher", "data.pseudo_labels=teacher"]


def torchrun(*arguments: str, n: int = 2) -> subprocess.Popen[str]:
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return subprocess.Popen(
        [*starter, "-m", "comp", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ,
    )


def forked_twice(*arguments: str, before: Callable[[int], None] = lambda rank: None) -> list[int]:
    """The same without torchrun: forks of this process, which need not import torch again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        before(rank)
        assert cli.main([*arguments]) == 0

    return all_forked(*(partial(work, rank) for rank in range(2)))


def trained(name: str, fold: int) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    folder = paths.fold_folder(name, 0, fold)
    weights = load_file(folder / "weights.safetensors")
    return torch.cat([weights[key].double().flatten() for key in sorted(weights)]), tracking.read(
        folder / "log.jsonl"
    )


def away(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_two_processes_give_the_results_of_one(project: Path) -> None:
    """Weights to 1e-5, losses and validation; every row is predicted once; rank 1 leaves no file."""
    assert distributed.world_size() == 1
    banked.teacher(project)
    runner.train("exp001", [*WITH_TEACHER, "train.batch_size=32"], fold="1", name="one")
    runner.train(
        "exp001", [*WITH_TEACHER, "train.batch_size=8", "train.grad_accum_steps=4"], fold="1", name="cut"
    )
    both = torchrun("train", "exp001", *WITH_TEACHER, "train.batch_size=32", "--fold", "1", "--as", "two")
    output = both.communicate()[0]
    assert both.returncode == 0, output
    assert output.count("1 of 1 folds to train") == 1, output
    (one, log), (cut, _), (two, log_of_two) = trained("one", 1), trained("cut", 1), trained("two", 1)
    assert away(cut, one) < 1e-5 and away(two, one) < 1e-5 and not torch.equal(two, torch.zeros_like(two))
    for key in ("loss", "valid_loss"):
        values = [[line[key] for line in lines if key in line] for lines in (log, log_of_two)]
        assert values[0] == pytest.approx(values[1], rel=1e-4) and len(values[0]) == (
            6 if key == "loss" else 2
        )
    table = samples.load()
    split = folds.load(table)
    oof = bank.read(paths.fold_folder("two", 0, 1) / "oof.arrow", table, split)
    assert sorted(oof.row.tolist()) == sorted(split.split(1)[1][:100].tolist())
    state = paths.fold_folder("two", 0, 1)
    for file in ("weights.safetensors", "oof.arrow", "test.arrow"):
        (state / file).unlink()
    with pytest.raises(UserError, match="torchrun --nproc-per-node 2 -m comp train") as caught:
        runner.train("exp001", [*WITH_TEACHER, "train.batch_size=32"], fold="1", name="two")
    assert caught.value.code == "world-size-differs" and "2 processes, now 1" in caught.value.what


@pytest.mark.slow
def test_ctrl_c_stops_all_and_the_same_command_ends_in_the_same_bytes(project: Path) -> None:
    """With whole batches per process, and batch norm, whose statistics are those of rank 0."""
    arguments = [
        *SHARED,
        "model.name=test_resnet",
        "train.batch_size=16",
        "train.grad_accum_steps=2",
        "train.epochs=4",
        "--fold",
        "0",
        "--as",
    ]
    assert forked_twice("train", "exp001", *arguments, "whole") == [0, 0]
    stopped = torchrun("train", "exp001", *arguments, "again")
    log = paths.fold_folder("again", 0, 0) / "log.jsonl"
    while stopped.poll() is None and not (log.exists() and b'"epoch": 1' in log.read_bytes()):
        time.sleep(0.01)  # until the event, not for a time
    stopped.send_signal(signal.SIGINT)
    output = stopped.communicate()[0]
    assert "saved at step" in output and "batch norm (" in output, output
    assert forked_twice("train", "exp001", *arguments, "again") == [0, 0]
    for file in ("weights.safetensors", "oof.arrow"):
        hashes = {artifacts.sha256(paths.fold_folder(name, 0, 0) / file) for name in ("whole", "again")}
        assert len(hashes) == 1 or file == "oof.arrow", file  # the run's name is in oof.arrow
    assert not list(Path(paths.root()).glob("**/comp-*")), "the second process keeps nothing"
    shutil.rmtree(paths.run_folder("whole"))


def test_a_trial_pruned_on_rank_0_ends_on_all_ranks(project: Path) -> None:
    """Otherwise rank 1 would wait forever, and the third trial would not start."""
    (project / "configs" / "tune").mkdir()
    (project / "configs" / "tune" / "p.yaml").write_text(
        "search:\n  optim.lr: {low: 1e-3, high: 2e-2, log: true}\nfolds: 2\nsampler: random\n"
    )
    arguments = [
        "track=none",
        "machine.num_workers=0",
        "train.epochs=3",
        "train.max_samples=32",
        "schedule.warmup=0",
    ]

    def judge(rank: int) -> None:
        optuna.trial.Trial.should_prune = lambda trial: rank == 0 and trial.number == 1  # type: ignore[assignment, method-assign]

    assert forked_twice("tune", "exp001", "--space", "p", "--trials", "3", *arguments, before=judge) == [0, 0]
    trials = open_study("exp001", arguments, "p", None, 3).study.get_trials(deepcopy=False)
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert trials[1].user_attrs["pruned_at"] == {"fold": 0, "step": 1}
    assert [len(t.intermediate_values) for t in trials] == [6, 1, 6]
    assert not list(Path(paths.root()).glob("**/comp-*"))


def pretend_rank(count: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: count)
    monkeypatch.setattr(distributed, "rank", lambda: rank)


@pytest.mark.parametrize(("accumulate", "batches"), [(1, 1), (2, 1), (3, 3), (4, 2)])
def test_each_sample_of_a_step_is_computed_by_one_rank(
    monkeypatch: pytest.MonkeyPatch, accumulate: int, batches: int
) -> None:
    plan = [[Index(8 * number + i, i) for i in range(8)] for number in range(2 * accumulate)]
    shares = []
    for rank in range(2):
        pretend_rank(2, rank, monkeypatch)
        assert distributed.local_batches(accumulate) == batches
        shares.append(list(distributed.shard(plan, accumulate, 4)))
        assert all(part[0].sample % 4 == 0 and len(part) % 4 == 0 for part in shares[-1]), (
            "fours stay together"
        )
        assert len(shares[-1]) == 2 * batches
    for step in range(2):  # the same step in all processes
        mine = [
            draw for share in shares for part in share[step * batches : (step + 1) * batches] for draw in part
        ]
        assert sorted(mine) == sorted(
            draw for part in plan[step * accumulate : (step + 1) * accumulate] for draw in part
        )


def test_batches_too_small_to_split_are_errors_and_differences_are_warnings(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_rank(4, 0, monkeypatch)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    with pytest.raises(UserError, match=r"batch of 2 images .* 4 processes") as caught:
        distributed.validate(config(), 2, 1, network)
    assert (caught.value.code, caught.value.key) == ("batch-too-small", "train.batch_size")
    distributed.validate(config("loss.ohem=0.5"), 32, 1, network)
    output = capsys.readouterr().err
    assert "batch norm (1) normalizes over 8 images" in output and "among 8 images, not 32" in output
    assert "train.grad_accum_steps=4" in output
    distributed.validate(config("loss.ohem=0.5"), 32, 4, network)
    output = capsys.readouterr().err
    assert "over 32 images" in output and "ohem" not in output and "train.grad_accum_steps" not in output
    distributed.validate(config(), 32, 1, network[:1])
    assert not capsys.readouterr().err


def test_verbs_for_one_process_are_errors_under_torchrun(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from comp.engine import cli

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["runs"]) == 2 and "comp train and comp tune" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["runs"]) == 2 and not capsys.readouterr().err


def test_the_rows_of_all_processes_are_interleaved_in_their_order() -> None:
    from comp.engine.run.forward import _interleaved

    whole = np.arange(2 * 7 * 3, dtype=np.float32).reshape(2, 7, 3)
    opened, damaged = _interleaved(7, [(whole[:, rank::3], {rank: "x"}) for rank in range(3)])
    assert np.array_equal(opened, whole) and damaged == {0: "x", 1: "x", 2: "x"}
