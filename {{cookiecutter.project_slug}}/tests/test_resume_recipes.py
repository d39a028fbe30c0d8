"""Resume stays exact with every recipe: killed at a random event and run again, the same bytes as if never killed. A new knob
that holds a state of its own is a new line of RECIPES."""

from __future__ import annotations

import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import forked
from test_resume import killed_at

from comp import jobs, store

# Few steps, a state every second of them, and nothing that the line itself does not ask for.
PLAIN = [
    "track=none", "machine.workers=0", "machine.progress=false", "augment=light", "train.ema=null", "train.epochs=4", "train.limit=48",
    "train.batch_size=8", "train.checkpoint_every=2", "schedule.warmup=0",
]  # fmt: skip

RECIPES = {
    "ema": ["train.ema=0.9"],
    "accumulation": ["train.accumulate=3", "model.drop_rate=0.3"],
    "sgd without clipping": ["optim.name=sgd", "optim.rate=0.02", "optim.clip=null"],
    "bf16": ["train.amp=bf16"],
    "fp16, whose scaler has a state": ["train.amp=fp16"],
    "balanced draws": ["sampling.balance=weighted"],
    "one-cycle": ["schedule.name=one_cycle", "optim.name=sgd", "optim.rate=0.02"],
    "plateau": ["schedule.name=plateau", "schedule.patience=0", "schedule.factor=0.5"],
    "cosine restarts": ["schedule.name=cosine_restarts", "schedule.cycles=2"],
    "swa beside raw": ["average.predicts=swa", "average.beside=[raw]", "average.swa_from=0.4"],
    "snapshots": ["snapshots.cycles=2", "average.beside=[uniform]"],
    "greedy soup of the tail, chosen on inner rows": [
        "average.predicts=greedy",
        "average.tail=3",
        "select.share=0.3",
    ],
    "best epoch": ["select.name=best", "select.patience=2", "train.ema=0.9"],
    "mixup and cutmix, off at the end": ["augment.mixup=0.4", "augment.cutmix=1.0", "augment.off_last=1"],
    "mosaic": ["augment.mosaic=0.5", "train.accumulate=2"],
    "growing pictures": ["augment.sizes=[16, 32]"],
    "policy and erasing": ["augment.policy=rand-m9-n2-mstd0.5", "augment.erase=0.3"],
    "normalised by the data": ["data.normalise=data"],
    "whitened": ["data.whiten=zca"],
    "hardest samples": ["loss.hardest=0.5"],
    "gradient checkpointing": ["train.grad_checkpointing=true", "model.drop_rate=0.3"],
    "channels_last": ["train.channels_last=true"],
}
QUICK = ("ema",)


@pytest.fixture
def root(practice: Path, tmp_path: Path, enter: Callable[[Path], Path]) -> Path:
    """A project whose data are shared: only runs/ is its own."""
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(practice / name)
    return enter(tmp_path)


def left(root: Path) -> dict[str, str]:
    """Every artefact of the fold, snapshots and members included."""
    folder = root / "runs" / "run" / "seed0" / "fold1"
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*.arrow")]
    assert {"weights.safetensors", "oof.arrow", "test.arrow"} <= {file.name for file in files}
    assert not list(folder.rglob("state-*.pt"))
    return {str(file.relative_to(folder)): store.sha256(file) for file in files}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
def test_killed_and_run_again_gives_the_same_bytes(root: Path, name: str) -> None:
    def train() -> None:
        jobs.train("exp001", [*PLAIN, *RECIPES[name]], fold="1", name="run")

    assert forked(train) == 0
    whole = left(root)
    draw = random.Random(zlib.crc32(name.encode()))
    for _ in range(1 if name in QUICK else 2):
        shutil.rmtree(root / "runs")
        event = draw.randrange(10, 50)
        assert os.WIFSIGNALED(forked(killed_at(event, train))), f"there are fewer than {event} events"
        assert forked(train) == 0
        assert left(root) == whole, f"killed at event {event}"
