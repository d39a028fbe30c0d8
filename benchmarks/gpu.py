"""On a GPU: images a second of the training loop, everything on, beside those of bare steps on a batch that lies on the device.

For each precision and each way of the pictures to the device, as a share of that limit: resident (the set lies there), fast (crops in
threads, color on the device) and medium (albumentations in processes). And what the loader brings when nothing computes. Not part of
make bench: python benchmarks/gpu.py [--network resnet50] [--side 224] [--batch 128] [--workers 8]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from loop import CLASSES, compared, settings
from photographs import jpegs, project, ratio, spread, written

BLOCKS, STEPS = 3, 50  # what the loader has ready when a block begins must not be most of it
CASES = [
    ("bf16", "resident"), ("bf16", "fast"), ("bf16", "medium"), ("fp16", "resident"), ("fp32", "resident"),
]  # fmt: skip


def loader(said: list[str], batch: int, side: int) -> dict[str, float]:
    """Images a second that arrive on the device."""
    import torch

    from comp import data
    from comp.engine import hardware
    from comp.engine.config import resolve
    from comp.engine.run import data_loader

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = jpegs(root / "raw", 32, 1, side=side)
        count = batch * 20 * (BLOCKS + 1)
        table = project(root, [files[i % len(files)] for i in range(count)], CLASSES)
        cfg = resolve.load(root, "exp001", said).config
        device = hardware.device(cfg.machine.device)
        loader = data_loader.Loader(cfg, table, device)
        rates, began = [], time.perf_counter()
        plan = data.training_batches(table.positions("train"), batch, 0, 0, 0)
        for number, _ in enumerate(loader.batches(plan), 1):
            if number % 20 == 0:
                torch.cuda.synchronize(device)
                rates.append(20 * batch / (time.perf_counter() - began))
                began = time.perf_counter()
        return spread(rates[1:], 0)


def main() -> None:
    import torch

    asked = argparse.ArgumentParser()
    asked.add_argument("--network", default="resnet50")
    asked.add_argument("--side", type=int, default=224)
    asked.add_argument("--batch", type=int, default=128)
    asked.add_argument("--workers", type=int, default=8)
    said = asked.parse_args()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), **vars(said)}

    def words(recipe: str, amp: str) -> list[str]:
        more = (
            f"train.amp={amp}",
            "train.channels_last=true",
            f"machine.num_workers={said.workers}",
            "track=none",
        )
        return settings(said.network, said.side, said.batch, recipe, *more)

    for amp, recipe in CASES:
        taken = compared(words(recipe, amp), said.batch, (32, 512), BLOCKS, STEPS)
        images = STEPS * said.batch
        result[f"{amp} {recipe}"] = {
            "images a second, bare": spread([images / s for s in taken["bare"]], 0),
            "images a second, loop": spread([images / s for s in taken["loop"]], 0),
            "share of the limit": ratio(taken["bare"], taken["loop"]),
        }
        print(amp, recipe, result[f"{amp} {recipe}"], flush=True)
    for recipe in ("fast", "medium"):
        result[f"loader alone, {recipe}"] = loader(words(recipe, "bf16"), said.batch, 512)
    written(result)


if __name__ == "__main__":
    main()
