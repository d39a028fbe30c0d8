"""What the training loop costs over bare forward, backward and step.

resnet18, 64 px, batch 32, one thread, 200 steps a side in blocks of 20 that take turns in one process.
  loop   comp/train.py itself, all of it on: averaged weights, clipping, schedule, metrics, W&B offline, JSONL, progress bar; pictures lie
         in memory (what loading them costs is in step.py)
  bare   the same network and optimizer on a batch in memory: forward, backward, step, nothing else

The loop asks for its batches, and between two of its blocks the loader runs a bare block before it answers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from photographs import blocks, jpegs, project, ratio, written

CLASSES = 10
MOST = 1.10  # what the loop may cost


class Enough(Exception):
    """All blocks are measured."""


def settings(network: str, side: int, batch: int, recipe: str, *more: str) -> list[str]:
    return [
        "competition.raw=raw", f"model.name={network}", "model.pretrained=false", f"data.size={side}", "data.channels=3",
        f"augment={recipe}", f"train.batch_size={batch}", "train.ema_decay=0.999", "train.epochs=1", "schedule.warmup=10%",
        "optim.clip_grad=1.0", "machine.progress=true", *more,
    ]  # fmt: skip


def compared(
    said: list[str], batch: int, photographs: tuple[int, int], blocks: int, steps: int
) -> dict[str, list[float]]:
    """Seconds of each block of the loop and of each bare one, over `photographs` JPEGs of some side."""
    import timm
    import torch

    from comp import optim, train
    from comp.engine import hardware
    from comp.engine.config import resolve
    from comp.engine.run import data_loader, torch_compile, tracking
    from comp.engine.run.context import Context
    from comp.engine.run.device import AMP_DTYPES

    taken: dict[str, list[float]] = {"loop": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        count, side = photographs
        files = jpegs(root / "raw", count, 1, side=side)
        listed = batch * steps * (blocks + 2)
        table = project(root, [files[i % len(files)] for i in range(listed)], CLASSES)
        cfg = resolve.load(root, "exp001", said).config
        device = hardware.device(cfg.machine.device)

        def now() -> float:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter()

        module = timm.create_model(cfg.model.name, num_classes=CLASSES).train().to(device)
        network, optimizer = torch_compile.prepare(cfg, module), optim.optimizer(cfg, module)
        half = AMP_DTYPES[cfg.train.amp]
        scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
        images = torch.randn(batch, 3, cfg.data.size, cfg.data.size, device=device)
        if cfg.train.channels_last:
            images = images.to(memory_format=torch.channels_last)
        target = torch.arange(batch, device=device) % CLASSES

        def bare() -> None:
            for _ in range(steps):
                with torch.autocast(device.type, half, enabled=half is not None):
                    output = network(images)
                scaler.scale(torch.nn.functional.cross_entropy(output.float(), target)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

        class Paused(data_loader.Loader):
            """A bare block stands before every block of the loop. The first of each warms up."""

            def batches(self, plan: Any, *more: Any) -> Iterator[Any]:
                began = 0.0
                for number, given in enumerate(super().batches(plan, *more)):
                    if number % steps == 0:
                        if number >= 2 * steps:
                            taken["loop"].append(now() - began)
                        if len(taken["loop"]) == blocks:
                            raise Enough
                        before = now()
                        bare()
                        if number >= steps:
                            taken["bare"].append(now() - before)
                        began = now()
                    yield given

        class Split:
            def split(self, number: object) -> tuple[Any, Any]:
                rows = table.positions("train")
                return rows, rows[:0]

        real_bar = train.tqdm
        train.tqdm = lambda **how: real_bar(**how | {"disable": False})  # although stderr is no terminal
        split: Any = Split()
        context = Context(cfg, table, split, Paused(cfg, table, device), device)
        fold = root / "runs" / "exp001" / "seed0" / "fold0"
        fold.mkdir(parents=True)
        log = tracking.open_log(
            fold, run_id="loop", name="loop", group="loop", job_type="fold", config=cfg.model_dump(), settings=cfg.track, resume_at=None
        )  # fmt: skip
        try:
            with log:
                train.train_fold(context, 0, 0, fold, log)
        except Enough:
            pass
    return taken


def main() -> None:
    count_of_blocks, steps = blocks(10, 20)
    import torch

    torch.set_num_threads(1)
    batch = 32
    said = settings(
        "resnet18", 64, batch, "none", "data.cache_scale=1.0", "machine.num_workers=0", "track=offline"
    )
    taken = compared(said, batch, (64, 64), count_of_blocks, steps)
    written(
        {
            "milliseconds a step": {
                name: round(1000 * sorted(s)[len(s) // 2] / steps, 1) for name, s in taken.items()
            },
            "loop_times_bare": ratio(taken["loop"], taken["bare"]),
            "allowed": MOST,
            "blocks": [round(a / b, 3) for a, b in zip(taken["loop"], taken["bare"], strict=True)],
        },
    )


if __name__ == "__main__":
    main()
