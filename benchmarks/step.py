"""What the loader costs a training step, and what it keeps in memory.

step     resnet18, 128 px, batch 32 on a CPU: a step through the whole loader (fast recipe, 1 thread beside the training
         thread) over the same step on a batch in memory; 200 steps a side, in blocks of 20 that take turns
memory   private memory (USS) of the loader processes of a set, above those of an empty one, against batch bytes x
         prefetch x workers; 1,000 and 1,000,000 rows, the same files listed again and again; and how long 1 M rows take to start
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from photographs import blocks, in_turns, jpegs, project, ratio, written

BATCH, SIZE, WORKERS = 32, 128, 2


def config(root: Path, recipe: str, size: int, workers: int) -> Any:
    from comp.engine.config import resolve

    overrides = [
        "competition.raw=raw",
        f"data.size={size}",
        "data.channels=3",
        f"augment={recipe}",
        f"machine.num_workers={workers}",
    ]
    return resolve.load(root, "exp001", overrides).config


def step(blocks: int, steps: int) -> dict[str, Any]:
    import timm
    import torch

    from comp import data, transforms
    from comp.engine.run import data_loader, normalize

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        table = project(root, jpegs(root / "raw", 64, 10, side=256))
        cfg = config(root, "fast", SIZE, 1)
        loader = data_loader.Loader(cfg, table, torch.device("cpu"))
        module = timm.create_model("resnet18", num_classes=10)
        optimizer = torch.optim.SGD(module.parameters(), 1e-3)
        seen = transforms.Preprocess(
            normalize.Normalize(torch.full((3, 1, 1), 124.0), torch.full((3, 1, 1), 58.0)),
            transforms.Recipe([]),
        )

        def endless() -> Iterator[data.Batch]:
            epoch = 0
            while True:
                yield from loader.batches(data.training_batches(table.positions("train"), BATCH, 0, epoch, 0))
                epoch += 1

        def train(batch: data.Batch) -> None:
            target = torch.from_numpy(batch.samples % 10)
            images = seen(batch.images.permute(0, 3, 1, 2), batch.seeds)
            torch.nn.functional.cross_entropy(module(images), target).backward()
            optimizer.step()
            optimizer.zero_grad()

        def block(batches: Iterable[data.Batch]) -> None:
            for batch in islice(batches, steps):
                train(batch)

        batches = endless()
        kept = next(batches)
        taken = in_turns(
            {
                "loader": lambda _: block(batches),
                "memory": lambda _: block(repeat(kept)),
            },
            [None],
            blocks,
        )
    return {
        "milliseconds": {name: round(1000 * sorted(s)[len(s) // 2] / steps, 1) for name, s in taken.items()},
        "loader_times_memory": ratio(taken["loader"], taken["memory"]),
    }


def held(rows: int) -> dict[str, float]:
    """In a process of its own: what the loader's processes hold privately after some batches of `rows` samples."""
    done = subprocess.run(
        [sys.executable, __file__, "--rows", str(rows)], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def uss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def measure(rows: int) -> None:
    import multiprocessing

    import torch

    from comp import data
    from comp.engine.run import data_loader

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = jpegs(root / "raw", 50, 10, side=256)
        table = project(root, [files[i % len(files)] for i in range(max(rows, BATCH))])
        cfg = config(root, "medium", 224, WORKERS)
        began = time.perf_counter()
        loader = data_loader.Loader(cfg, table, torch.device("cpu"))
        positions = table.positions("train")
        batches = loader.batches(data.training_batches(positions, BATCH, 0, 0, 0))
        next(batches)
        start = time.perf_counter() - began
        if rows:
            for _, _ in zip(range(30), batches, strict=False):
                pass
        private = sum(uss(child.pid) for child in multiprocessing.active_children() if child.pid)
        print(json.dumps({"private": private, "start": start}))


def memory() -> dict[str, Any]:
    empty, small, large = held(0), held(1000), held(1_000_000)
    batch = BATCH * 224 * 224 * 3
    from comp.engine.run.data_loader import PREFETCH

    room = batch * PREFETCH * WORKERS
    return {
        "megabytes above an empty set": {
            "1,000 rows": round((small["private"] - empty["private"]) / 1e6, 1),
            "1,000,000 rows": round((large["private"] - empty["private"]) / 1e6, 1),
        },
        "batch bytes x prefetch x workers, MB": round(room / 1e6, 1),
        "seconds until 1,000,000 rows give their first batch": round(large["start"], 2),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rows"]:
        measure(int(sys.argv[2]))
    else:
        written({"step": step(*blocks(10, 20)), "memory": memory()})
