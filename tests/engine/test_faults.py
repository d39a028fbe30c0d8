"""Failures during training, and what is saved: NaN, out of memory, killed loader workers, time limits."""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config
from test_training import TINY, refusal

from comp import data, losses
from comp.data import Batch
from comp.engine import cli, hardware, pages
from comp.engine.data import folds, samples
from comp.engine.errors import UserError
from comp.engine.run import data_loader, microbatch, runner, tracking
from comp.engine.store import artifacts


def broken(step: int, value: float, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From this step on, the loss of the second sample of a batch, or only its gradient, is not finite."""
    passes = 0
    whole = losses.build_loss

    def total(*args: Any, **more: Any) -> Any:
        right = whole(*args, **more)

        def wrong(output: torch.Tensor, targets: Any) -> torch.Tensor:
            nonlocal passes
            passes += output.requires_grad
            out = right(output, targets)
            if output.requires_grad and passes == step:
                factor = torch.ones_like(out)
                factor[1] = value
                out = (
                    out * factor
                    if part == "loss"
                    else out + (output.sum(1) - output.sum(1).detach()) * (factor - 1)
                )
            return out

        return wrong

    monkeypatch.setattr(losses, "build_loss", total)


@pytest.mark.parametrize(("part", "clip"), [("loss", "1.0"), ("gradient", "1.0"), ("gradient", "null")])
def test_nan_is_reported_with_step_and_samples_and_never_saved(
    project: Path, monkeypatch: pytest.MonkeyPatch, part: str, clip: str
) -> None:
    broken(3, float("nan"), part, monkeypatch)
    tiny = [*TINY, "train.batch_size=8", "train.checkpoint_every=1", f"optim.clip_grad={clip}"]
    message = refusal(lambda: runner.train("exp001", tiny, fold="0", name="x"))
    folder = project / "runs/x/seed0/fold0"
    assert "step 3" in message and "lower optim.lr" in message, message
    assert message.count(",") >= 1 and (clip == "null" or "samples" in message)
    assert [file.name for file in folder.glob("state-*.pt")] == ["state-00000002.pt"]
    assert not (folder / "weights.safetensors").exists()
    monkeypatch.undo()


class Cramped(torch.nn.Module):
    """A network that runs out of memory above `most` samples, and records its batch sizes."""

    def __init__(self, module: torch.nn.Module, most: int):
        super().__init__()
        self.inside, self.most = module, most
        self.given: list[int] = []

    def forward(self, images: torch.Tensor, **more: Any) -> Any:
        if self.training:
            self.given.append(len(images))
            if len(images) > self.most:
                self.inside(images, **more)  # its batch norm has seen them already
                raise torch.OutOfMemoryError("no room")
        return self.inside(images, **more)


def test_out_of_memory_halves_micro_batches_and_keeps_the_batch_size(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without batch norm the weights are the same up to rounding; the log has the new micro-batch size."""

    def weights(most: int) -> tuple[torch.Tensor, list[int], list[dict[str, Any]]]:
        made: list[Cramped] = []

        def network(cfg: Any, outputs: int) -> torch.nn.Module:
            torch.manual_seed(0)
            flat = torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Linear(32 * 32, 16), torch.nn.Linear(16, outputs)
            )
            made.append(Cramped(flat, most))
            return made[-1]

        monkeypatch.setattr(pages.competition, "model", network, raising=False)
        runner.train(
            "exp001", [*TINY, "train.batch_size=16", "train.grad_accum_steps=2"], fold="0", name=f"x{most}"
        )
        folder = project / f"runs/x{most}/seed0/fold0"
        from safetensors.torch import load_file

        file = load_file(folder / "weights.safetensors")
        given = next(m.given for m in made if m.given)
        return torch.cat([t.flatten() for t in file.values()]), given, tracking.read(folder / "log.jsonl")

    whole, given, _ = weights(16)
    assert given == [16, 16]
    cramped, given, log = weights(5)
    assert given == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4], "halved twice, each time from the step's beginning"
    assert torch.allclose(whole, cramped, rtol=1e-5, atol=1e-7)
    assert [line["micro_batch_size"] for line in log if "micro_batch_size" in line] == [4]
    assert "micro-batch size 16 is halved to 8" in capsys.readouterr().err


def test_a_repeated_step_restores_batch_norm_statistics() -> None:
    network = torch.nn.BatchNorm1d(3)
    micro_batches = microbatch.MicroBatches(network, 4)
    batch = Batch(torch.arange(4).numpy(), torch.randn(4, 3), None, {})
    micro_batches.start_step([batch], seed=1)
    restarts: list[int] = []
    cramped = Cramped(network.train(), 3)
    with micro_batches.retry_on_oom(lambda: restarts.append(1)):
        cramped(micro_batches.pending.popleft().images)
    assert restarts == [1] and micro_batches.size == 2
    assert [len(piece.samples) for piece in micro_batches.pending] == [2, 2]
    assert (
        not network.state_dict()["running_mean"].any()
        and int(network.state_dict()["num_batches_tracked"]) == 0
    )


def test_micro_batches_keep_the_owner_of_each_image() -> None:
    owner = torch.tensor([0, 0, 1, 2, 2, 2])
    batch = Batch(
        torch.tensor([7, 8, 9]).numpy(), torch.arange(6)[:, None], torch.arange(6).numpy(), {}, owner
    )
    one, two = batch.split(2)
    assert (
        one.images.flatten().tolist() == [0, 1, 2]
        and one.owner is not None
        and one.owner.tolist() == [0, 0, 1]
    )
    assert two.samples.tolist() == [9] and two.owner is not None and two.owner.tolist() == [0, 0, 0]
    assert two.seeds is not None and two.seeds.tolist() == [3, 4, 5]


def test_a_loader_that_dies_is_started_once_more_with_fewer_and_gives_the_same_bytes(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = samples.load().positions("train")[:64]

    def drawn(workers: int, victim: int | None = None) -> list[bytes]:
        cfg = config(f"machine.num_workers={workers}", "machine.progress=false", "augment=heavy")
        loader = data_loader.Loader(cfg, samples.load(), torch.device("cpu"))
        out = []
        for number, batch in enumerate(loader.batches(data.training_batches(rows, 2, 7, 0, 0))):
            out.append(batch.images.numpy().tobytes())
            if number == victim:
                for worker in loader.processes.loader._iterator._workers:  # type: ignore[union-attr]
                    os.kill(worker.pid, signal.SIGKILL)
        return out

    assert drawn(2, victim=3) == drawn(0) and len(drawn(0)) == 32
    assert "restarted with num_workers=1" in capsys.readouterr().err


def test_loader_processes_stay_over_epochs_and_folds(project: Path) -> None:
    table = samples.load()
    loader = data_loader.Loader(
        config("machine.num_workers=1", "machine.progress=false", "augment=heavy"), table, torch.device("cpu")
    )
    seen = set()
    for number in range(3):
        rows = folds.load(table).split(number)[0][:16]
        assert len(list(loader.batches(data.training_batches(rows, 4, 0, 0, 0)))) == 4
        seen |= {worker.pid for worker in loader.processes.loader._iterator._workers}  # type: ignore[union-attr]
    assert len(seen) == 1


def test_a_loader_that_dies_again_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a worker raises is no death."""
    loader = data_loader.Loader(
        config("machine.num_workers=2", "machine.progress=false"), samples.load(), torch.device("cpu")
    )

    def dying(loader: Any) -> Any:
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    monkeypatch.setattr(data_loader, "without_signal_handler", dying)
    plan = data.training_batches(samples.load().positions("train"), 8, 0, 0, 0)
    assert "machine.num_workers=0" in refusal(lambda: list(loader.batches(plan)))


# --- no time ------------------------------------------------------------------------------------------------


def test_a_temporary_folder_too_long_for_sockets_is_refused(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (long := tmp_path / ("x" * 80)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    loader = data_loader.WorkerPool[list[int], list[int]](
        data.ImageDataset.__new__(data.ImageDataset), list, 1, False
    )
    with pytest.raises(UserError, match=r"TMPDIR: .* is too long for the sockets"):
        next(loader.batches([[0]]))


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(arguments: list[str]) -> int:
        with open("/dev/full", "w") as opened:
            opened.write("x")
        return 0

    monkeypatch.setattr(cli, "run", full)
    assert cli.main(["runs"]) == 2
    assert capsys.readouterr().err.startswith("the disk is full; free some space")


def test_a_time_is_read_as_people_write_it() -> None:
    for text, seconds in {"8h30m": 30600, "90s": 90, "1.5h": 5400, "45m": 2700, "1h1m1s": 3661}.items():
        assert hardware.parse_duration("--time-limit", text) == seconds
    for text in ("", "8", "0h", "-1h", "8h30", "soon"):
        assert "8h30m" in refusal(lambda text=text: hardware.parse_duration("--time-limit", text))  # type: ignore[misc]


def test_the_clock_stops_where_one_more_stretch_might_not_end() -> None:
    """1000 s, of which 10 are reserved for the end; a step may take 1.2 times as long as the longest so
    far."""
    ticks = iter([0, 10, 20, 320, 330, 340, 629, 631])
    stop = hardware.Stop(1000, clock=lambda: float(next(ticks)))
    assert [stop.requested for _ in range(7)] == [False] * 6 + [True]
    assert stop.longest == 300 and stop.out_of_time


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], hardware.Stop]:
    """A clock that goes on by a second at every look, so that a limit of n is n steps."""

    def limited(limit: float) -> hardware.Stop:
        clock = itertools.count()
        return hardware.Stop(limit, clock=lambda: float(next(clock)))

    monkeypatch.setattr(hardware.Stop, "MARGIN", 1.0)
    return limited


def test_a_time_limit_leaves_a_state_and_the_predictions_of_what_is_done(
    project: Path, ticking: Callable[[float], hardware.Stop], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [*TINY, "train.batch_size=8", "train.epochs=2"]  # 6 steps an epoch
    whole = [*tiny, "train.seeds=[0]"]
    runner.train("exp001", whole, fold="1", name="whole")
    capsys.readouterr()
    runner.train("exp001", whole, name="x", stop=ticking(20))
    message = capsys.readouterr().out
    assert "time limit: saved at step" in message and message.strip().splitlines()[-1].startswith(
        "next: comp train exp001"
    )
    assert "missing: seed 0 fold 1, 2, 3, 4" in message
    assert (project / "runs/x/seed0/fold0/test.arrow").exists() and list(
        (project / "runs/x/seed0/fold1").glob("state-*.pt")
    )
    runner.train("exp001", whole, fold="1", name="x")
    ends = {
        artifacts.sha256(project / f"runs/{name}/seed0/fold1/weights.safetensors") for name in ("whole", "x")
    }
    assert len(ends) == 1


def test_predictions_that_the_limit_cut_are_made_at_the_next_start(
    project: Path, ticking: Callable[[float], hardware.Stop], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [*TINY, "train.batch_size=8", "predict.batch_size=8"]
    runner.train("exp001", tiny, fold="0", name="x", stop=ticking(11))
    folder = project / "runs/x/seed0/fold0"
    assert "time limit: oof of seed 0 fold 0" in capsys.readouterr().out
    assert (folder / "weights.safetensors").exists() and not (folder / "oof.arrow").exists()
    runner.train("exp001", tiny, fold="0", name="x")
    assert (folder / "oof.arrow").exists() and (folder / "test.arrow").exists()
