"""The learning-rate range test and the plotted schedule: their numbers, and that they leave no other
files."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config
from PIL import Image

from comp.engine import cli
from comp.engine.errors import UserError
from comp.engine.run import loading, lr_range, runner
from comp.engine.run.lr_range import Point
from comp.engine.store import artifacts

QUICK = [
    "track=none",
    "machine.num_workers=0",
    "machine.progress=false",
    "train.epochs=1",
    "schedule.warmup=0",
    "train.max_samples=64",
]


def files(root: Path) -> dict[str, str]:
    return {str(file.relative_to(root)): artifacts.sha256(file) for file in root.rglob("*") if file.is_file()}


def states() -> tuple[object, list[int], list[int]]:
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return random.getstate(), numpy["state"]["key"].tolist(), torch.get_rng_state().tolist()


def test_a_range_test_changes_neither_runs_nor_random_states(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.train("exp001", QUICK, fold="0", name="exp001r")
    before = files(project)
    drawn = states()
    capsys.readouterr()
    arguments = [
        "--low",
        "1e-4",
        "--high",
        "1e6",
        "--steps",
        "60",
        *QUICK,
        "train.batch_size=16",
        "optim.name=sgd",
    ]
    assert cli.main(["lr-range", "exp001", *arguments]) == 0
    assert drawn == states()
    after = files(project)
    assert {k: after[k] for k in before} == before
    assert after.keys() - before.keys() == {"runs/exp001-lr-range.png", "runs/exp001-lr-range.csv"}
    out = capsys.readouterr().out
    rate = float(out.split("optim.lr=")[1].split()[0])
    assert 1e-4 < rate < 100 and out.splitlines()[-1].startswith("next: comp train exp001 --as")
    with Image.open(project / "runs/exp001-lr-range.png") as image:
        assert image.size[0] > 500
    lines = (project / "runs/exp001-lr-range.csv").read_text().splitlines()
    rates = [float(line.split(",")[1]) for line in lines[1:]]
    assert rates == pytest.approx([1e-4 * (1e10) ** (step / 59) for step in range(len(rates))])
    assert len(rates) < 60, "at rate 1e6 the loss has diverged on any machine, and it ended before"


def test_a_linear_range_with_a_scaled_learning_rate(project: Path) -> None:
    cfg = config(*QUICK, "train.batch_size=16", "optim.lr_base_size=64")
    context = loading.load_context(cfg)
    points = lr_range.sweep(context, 1e-5, 1e-3, 12, linear=True)
    assert [point.lr for point in points] == pytest.approx(np.linspace(1e-5, 1e-3, 12).tolist())
    assert lr_range.to_base_lr(context, 1e-3) == pytest.approx(4e-3), (
        "a quarter of the images, a quarter of what the knob says"
    )


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    rates = np.geomspace(1e-6, 10, 100)
    place = np.log10(rates)
    losses = 2 - 1.5 / (1 + np.exp(-4 * (place + 3))) + np.exp(3 * (place + 0.5))
    points = [Point(float(r), float(v)) for r, v in zip(rates, losses, strict=True)]
    assert lr_range.suggest(points) == pytest.approx(1e-3, rel=0.2)
    with pytest.raises(UserError, match="start lower, with --low"):
        lr_range.suggest([Point(float(r), float(r)) for r in rates])


@pytest.mark.parametrize("arguments", [["--low", "1", "--high", "0.1"], ["--steps", "3"]])
def test_an_empty_range_is_an_error(project: Path, arguments: list[str]) -> None:
    assert cli.main(["lr-range", "exp001", *arguments]) == 2


def test_a_schedule_is_plotted_without_images_and_torch(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for image in (project / "data/raw").rglob("*.png"):
        image.unlink()
    monkeypatch.setitem(__import__("sys").modules, "comp.data", None)  # what needs torch cannot be imported
    arguments = ["schedule=one_cycle", "train.grad_accum_steps=2", "optim.lr_base_size=256"]
    assert cli.main(["schedule", "exp001", *arguments]) == 0
    out = capsys.readouterr().out
    assert "one_cycle: 270 steps, 18 per epoch, 64 images each (32 x 2)" in out
    assert "linear scaling makes it 0.00125" in out and "momentum: 0.85 at the peak" in out
    assert "written: runs/exp001-schedule.png" in out and out.splitlines()[-1] == "next: comp train exp001"
    with Image.open(project / "runs/exp001-schedule.png") as drawn:
        assert drawn.size[0] > 500
    assert cli.main(["schedule", "exp001", "schedule=cosine_restarts", "schedule.cycles=3"]) == 0
    assert "cycles end after step" in capsys.readouterr().out
