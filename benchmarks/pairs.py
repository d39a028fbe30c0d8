"""Training, loader and inference of two commits, in turns: python benchmarks/pairs.py compare BASE [--pairs 15]

Each side is a process of its own checkout that stays alive and runs a block whenever it is asked to. A block of BASE, a block of
this checkout and a block of BASE in a second process take turns; the ratio to the first BASE block of the same turn is the
measurement, the one of the second BASE process shows the noise of the machine. Each commit runs its own copy of `serve`.

  training   20 steps of the training loop, resnet18 at 64 px, batches of 32, EMA, clipping and offline tracking on
  loader     8 epochs of 512 cached images of 256 px through the recipe medium into batches of 224 px, in the training process
  inference  a forward pass over 512 cached images with two views, resnet18 at 64 px
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
KINDS = ("training", "loader", "inference")
PAIRS, STEPS, EPOCHS, BATCH, ALLOWED = 15, 20, 8, 32, 1.03


# --- one side ------------------------------------------------------------------------------------------------------------


def turns() -> Iterator[None]:
    """Each step waits for a line on standard input, and prints how long the block since the last one took."""
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        yield
        print(time.perf_counter() - began, flush=True)


def serve(kind: str) -> None:
    import torch
    from photographs import jpegs, project

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        side = 256 if kind == "loader" else 64
        files = jpegs(root / "raw", 64, side=side)
        count = 4096 * BATCH if kind == "training" else 512
        table = project(root, [files[i % len(files)] for i in range(count)])
        {"training": training, "loader": loading, "inference": inference}[kind](root, table)


def config(*overrides: str) -> Any:
    from comp.engine.config import resolve
    from comp.engine.store import paths

    shared = (
        "competition.raw=raw",
        "data.channels=3",
        "machine.num_workers=0",
        "machine.progress=false",
        "model.pretrained=false",
    )
    return resolve.load(paths.root(), "exp001", [*shared, *overrides]).config


def training(root: Path, table: Any) -> None:
    import torch

    from comp import train
    from comp.engine.run import data_loader, tracking
    from comp.engine.run.context import Context

    cfg = config(
        "model.name=resnet18", "data.size=64", "augment=none", f"train.batch_size={BATCH}", "train.ema_decay=0.999", "train.epochs=1",
        "schedule.warmup=10%", "track=offline",
    )  # fmt: skip
    device = torch.device("cpu")
    waiting = turns()

    class InTurns(data_loader.Loader):
        def batches(self, plan: Any, *more: Any) -> Iterator[Any]:
            for number, batch in enumerate(super().batches(plan, *more)):
                if number % STEPS == 0 and next(waiting, self) is self:
                    sys.exit()
                yield batch

    class Split:
        def split(self, fold: object) -> tuple[Any, Any]:
            rows = table.positions("train")
            return rows, rows[:0]

    split: Any = Split()
    context = Context(cfg, table, split, InTurns(cfg, table, device), device)
    fold = root / "runs" / "exp001" / "seed0" / "fold0"
    fold.mkdir(parents=True)
    log = tracking.open_log(
        fold, run_id="pairs", name="pairs", group="pairs", job_type="fold", config=cfg.model_dump(), settings=cfg.track, resume_at=None
    )  # fmt: skip
    with log:
        train.train_fold(context, 0, 0, fold, log)


def loading(root: Path, table: Any) -> None:
    import torch

    from comp import data
    from comp.engine.run import data_loader

    cfg = config("data.size=224", f"data.cache_scale={256 / 224}", "augment=medium", "machine.gpu_cache_mb=0")
    loader = data_loader.Loader(cfg, table, torch.device("cpu"))
    rows = table.positions("train")
    for number, _ in enumerate(turns()):
        for epoch in range(EPOCHS):
            for _batch in loader.batches(data.training_batches(rows, BATCH, 0, number * EPOCHS + epoch, 0)):
                pass


def inference(root: Path, table: Any) -> None:
    import timm
    import torch

    from comp import transforms
    from comp.engine.run import data_loader, normalize, views
    from comp.engine.run.forward import forward_rows

    cfg = config("data.size=64", "augment=none", "machine.gpu_cache_mb=0")
    loader = data_loader.Loader(cfg, table, torch.device("cpu"))
    module = timm.create_model("resnet18", num_classes=10).eval()
    preprocess = transforms.Preprocess(
        normalize.Normalize(torch.full((3, 1, 1), 124.0), torch.full((3, 1, 1), 58.0))
    )
    rows = table.positions("train")
    for _ in turns():
        forward_rows(module, loader, rows, BATCH, preprocess, "fp32", views.views(["identity", "hflip"]))


# --- both sides ----------------------------------------------------------------------------------------------------------


def compare(base: str, pairs: int) -> None:
    work = CHECKOUT / "build" / "pairs"
    commit = git("rev-parse", "--verify", f"{base}^{{commit}}")
    then = work / commit[:12]
    if not then.is_dir():
        git("worktree", "add", "--detach", str(then), commit)
    sides = {"base": then, "now": CHECKOUT, "base again": then}
    try:
        if not (then / "benchmarks" / "pairs.py").is_file():
            sys.exit(f"{base}: has no benchmarks/pairs.py, so it cannot be compared")
        found = {kind: in_turns(kind, sides, pairs) for kind in KINDS}
    finally:
        git("worktree", "remove", "--force", str(then))
    for kind, ratios in found.items():
        for name, values in ratios.items():
            print(
                f"{kind:10} {name:10} / base: median {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}), {pairs} pairs"
            )
    slower = [kind for kind, ratios in found.items() if statistics.median(ratios["now"]) > ALLOWED]
    print(f"slower than {ALLOWED} times {base}: {', '.join(slower) or 'nothing'}")
    sys.exit(1 if slower else 0)


def in_turns(kind: str, sides: dict[str, Path], pairs: int) -> dict[str, list[float]]:
    workers = {
        name: subprocess.Popen(
            [sys.executable, str(checkout / "benchmarks" / "pairs.py"), "serve", kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name, checkout in sides.items()
    }  # fmt: skip
    try:
        for worker in workers.values():
            answer(worker, "ready")
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(pairs + 1):  # the first warms up
            for name, worker in list(workers.items())[:: 1 if turn % 2 else -1]:
                assert worker.stdin is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
                taken[name].append(float(answer(worker)))
            print(
                json.dumps(
                    {"kind": kind, "turn": turn} | {name: round(s[-1], 3) for name, s in taken.items()}
                ),
                flush=True,
            )
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return {
        name: [a / b for a, b in zip(taken[name][1:], taken["base"][1:], strict=True)]
        for name in ("now", "base again")
    }


def answer(worker: subprocess.Popen[str], wanted: str = "") -> str:
    """The next line that is an answer; whatever else a side prints is passed over."""
    assert worker.stdout is not None
    for line in worker.stdout:
        word = line.strip()
        if word == wanted or (not wanted and word.replace(".", "", 1).replace("e-", "", 1).isdigit()):
            return word
    sys.exit(f"a side ended before its answer, with exit code {worker.wait()}")


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=CHECKOUT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", kind] if kind in KINDS:
            serve(kind)
        case ["compare", base]:
            compare(base, PAIRS)
        case ["compare", base, "--pairs", number] if number.isdigit():
            compare(base, int(number))
        case _:
            sys.exit(__doc__)
