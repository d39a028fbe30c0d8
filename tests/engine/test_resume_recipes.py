"""Resume is exact with every training recipe: killed at a random event and run again, it gives the same
bytes. A new knob that has a state gets a line in RECIPES."""

from __future__ import annotations

import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import banked
import pytest
from forked import forked
from test_resume import killed_at
from test_target_scaler import declare_values

from comp.engine.run import runner
from comp.engine.store import artifacts

# Few steps, a state every second of them, and nothing that the line itself does not ask for.
PLAIN = [
    "track=none", "machine.num_workers=0", "machine.progress=false", "augment=light", "train.ema_decay=null", "train.epochs=4", "train.max_samples=48",
    "train.batch_size=8", "train.checkpoint_every=2", "schedule.warmup=0",
]  # fmt: skip

STAGES = (
    "train.stages=[{train: head, epochs: 1, lr: 1e-2}, {train: last 2 blocks, epochs: 1, lr: 2e-3}, "
    "{train: everything, epochs: 2, lr: 1e-3}]"
)
RECIPES = {  # what does not touch each other shares a line
    "ema": ["train.ema_decay=0.9"],
    "accumulation, balanced draws, hardest samples": ["train.grad_accum_steps=3", "model.drop_rate=0.3", "sampling.balance=weighted", "loss.ohem=0.5"],
    "one-cycle, sgd without clipping, bf16": ["schedule.name=one_cycle", "optim.name=sgd", "optim.lr=0.02", "optim.clip_grad=null", "train.amp=bf16"],
    "fp16, whose scaler has a state, gradient checkpointing": ["train.amp=fp16", "train.grad_checkpointing=true", "model.drop_rate=0.3"],
    "plateau, normalised by the data": ["schedule.name=plateau", "schedule.patience=0", "schedule.factor=0.5", "data.normalize=data"],
    "cosine restarts, growing pictures": ["schedule.name=cosine_restarts", "schedule.cycles=2", "augment.progressive_sizes=[16, 32]"],
    "swa beside raw, whitened": ["average.predict_with=swa", "average.members=[raw]", "average.swa_start=0.4", "data.whiten=zca"],
    "snapshots, channels_last": ["snapshots.cycles=2", "average.members=[uniform]", "train.channels_last=true"],
    "greedy soup of the tail, chosen on inner rows": ["average.predict_with=greedy", "average.tail_epochs=3", "select.validation_fraction=0.3"],
    "best epoch": ["select.name=best", "select.patience=2", "train.ema_decay=0.9"],
    "mixup, cutmix and mosaic, off at the end": ["augment.mixup=0.4", "augment.cutmix=1.0", "augment.mosaic=0.3", "augment.disable_last_epochs=1"],
    "views that agree, policy and erasing": ["augment.jsd_views=2", "augment.auto_augment=rand-m9-n2-mstd0.5", "augment.random_erasing=0.3"],
    "stages": [STAGES],
    "kron": ["optim.name=kron", "optim.lr=1e-3"],
    "a teacher and pseudo-labels": ["distill.teacher=teacher", "data.pseudo_labels=teacher"],
}  # fmt: skip
QUICK = ("ema",)


@pytest.fixture
def root(practice: Path, tmp_path: Path, enter: Callable[[Path], Path]) -> Path:
    """A project whose data are shared: only runs/ and pseudo-labels are its own."""
    (tmp_path / "configs").symlink_to(practice / "configs")
    (tmp_path / "data").mkdir()
    for each in (practice / "data").iterdir():
        (tmp_path / "data" / each.name).symlink_to(each)
    return enter(tmp_path)


def left(root: Path) -> dict[str, str]:
    """Every artefact of the fold, snapshots and members included."""
    folder = root / "runs" / "run" / "seed0" / "fold1"
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*.arrow")]
    assert {"weights.safetensors", "oof.arrow", "test.arrow"} <= {file.name for file in files}
    assert not list(folder.rglob("state-*.pt"))
    return {str(file.relative_to(folder)): artifacts.sha256(file) for file in files}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
def test_killed_and_run_again_gives_the_same_bytes(root: Path, name: str) -> None:
    def train() -> None:
        runner.train("exp001", [*PLAIN, *RECIPES[name]], fold="1", name="run")

    if "optim.name=kron" in RECIPES[name]:
        pytest.importorskip("opt_einsum")
    if "distill.teacher=teacher" in RECIPES[name]:
        banked.teacher(root)
    assert forked(train) == 0
    whole = left(root)
    shutil.rmtree(root / "runs" / "run")
    event = random.Random(zlib.crc32(name.encode())).randrange(10, 50)
    assert os.WIFSIGNALED(forked(killed_at(event, train))), f"there are fewer than {event} events"
    assert forked(train) == 0
    assert left(root) == whole, f"killed at event {event}"


ON_VALUES = {
    "ema": ["train.ema_decay=0.9", "train.epochs=2"],
    "snapshots, swa beside raw, mixup": ["snapshots.cycles=2", "average.predict_with=swa", "average.members=[raw]", "average.swa_start=0.4", "augment.mixup=0.4"],
    "stages, fp16, accumulation": [STAGES, "train.amp=fp16", "train.grad_accum_steps=3"],
    "plateau, huber, best epoch": ["schedule.name=plateau", "schedule.patience=0", "loss.name=huber", "select.name=best"],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ON_VALUES]
)
def test_a_run_on_values_killed_and_run_again_gives_the_same_bytes(project: Path, name: str) -> None:
    """Of 5,000 to 14,000, learned standardised: killed once early and once late."""

    def train() -> None:
        runner.train("exp001", [*PLAIN, *ON_VALUES[name]], fold="1", name="run")

    declare_values(project, 1000.0, 9500.0)
    assert forked(train) == 0
    whole = left(project)
    shutil.rmtree(project / "runs" / "run")
    for event, state in ((1, "state-00000004.pt"), (2, "state-00000008.pt")):
        assert os.WIFSIGNALED(forked(killed_at(event, train, after=state)))
        assert (project / "runs/run/seed0/fold1" / state).exists(), "it is resumed, not begun again"
    assert forked(train) == 0
    assert left(project) == whole
