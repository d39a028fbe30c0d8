"""What the training loop costs over bare forward, backward and step.

resnet18, 64 px, batch 32, one thread, 200 steps a side in blocks of 20 that take turns in one process.
  loop   comp/train/loop.py itself, all of it on: averaged weights, clipping, schedule, metrics, W&B offline, JSONL, progress bar; pictures lie
         in memory (what loading them costs is in step.py)
  bare   the same network and optimizer on a batch in memory: forward, backward, step, nothing else

The loop asks for its batches, and between two of its blocks the feed runs a bare block before it answers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from photographs import blocks, jpegs, project, ratio, written

BATCH, SIZE, CLASSES = 32, 64, 10
MOST = 1.10  # what the loop may cost


class Enough(Exception):
    """All blocks are measured."""


def bare(module: Any, optimizer: Any, steps: int) -> Callable[[], None]:
    import torch

    pictures, target = torch.randn(BATCH, 3, SIZE, SIZE), torch.arange(BATCH) % CLASSES

    def block() -> None:
        for _ in range(steps):
            torch.nn.functional.cross_entropy(module(pictures), target).backward()
            optimizer.step()
            optimizer.zero_grad()

    return block


def main() -> None:
    count_of_blocks, steps = blocks(10, 20)
    import timm
    import torch
    from comp import config, machine, track
    from comp.train import data, loop, optim
    from comp.train.clock import Clock

    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {"loop": [], "bare": []}

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = jpegs(root / "raw", 64, 1, side=SIZE)
        count = BATCH * steps * (count_of_blocks + 2)
        table = project(root, [files[i % len(files)] for i in range(count)], CLASSES)
        said = [
            "competition.raw=raw", "model.name=resnet18", "model.pretrained=false", f"data.size={SIZE}", "data.channels=3",
            "data.margin=1.0", "augment=none", f"train.batch_size={BATCH}", "train.ema=0.999", "train.epochs=1", "schedule.warmup=10%",
            "optim.clip=1.0", "machine.progress=true", "machine.workers=0", "track=offline",
        ]  # fmt: skip
        cfg = config.load(root, "exp001", said).config
        module = timm.create_model("resnet18", num_classes=CLASSES).train()
        block = bare(module, optim.optimizer(cfg, module), steps)

        class Paused(data.Feed):
            """A bare block stands before every block of the loop. The first of each warms up."""

            def batches(self, plan: Any, *more: Any) -> Iterator[Any]:
                began = 0.0
                for number, batch in enumerate(super().batches(plan, *more)):
                    if number % steps == 0:
                        if number >= 2 * steps:
                            taken["loop"].append(time.perf_counter() - began)
                        if len(taken["loop"]) == count_of_blocks:
                            raise Enough
                        before = time.perf_counter()
                        block()
                        if number >= steps:
                            taken["bare"].append(time.perf_counter() - before)
                        began = time.perf_counter()
                    yield batch

        class Split:
            def split(self, number: object) -> tuple[Any, Any]:
                rows = table.positions("train")
                return rows, rows[:0]

        loop._quiet = lambda cfg: False  # the bar is drawn although nobody watches
        device = torch.device("cpu")
        split: Any = Split()
        material = loop.Material(
            cfg, table, split, Paused(cfg, table, device), device, machine.Stop(), Clock(device)
        )
        fold = root / "runs" / "exp001" / "seed0" / "fold0"
        fold.mkdir(parents=True)
        log = track.open_run(
            fold, run_id="loop", name="loop", group="loop", job_type="fold", config=cfg.model_dump(), settings=cfg.track, resume_at=None
        )  # fmt: skip
        try:
            with log:
                loop.fold(material, 0, 0, fold, log)
        except Enough:
            pass
    times = ratio(taken["loop"], taken["bare"])
    written(
        {
            "milliseconds a step": {
                name: round(1000 * sorted(s)[len(s) // 2] / steps, 1) for name, s in taken.items()
            },
            "loop_times_bare": times,
            "allowed": MOST,
            "blocks": [round(a / b, 3) for a, b in zip(taken["loop"], taken["bare"], strict=True)],
        },
    )


if __name__ == "__main__":
    main()
