"""From file to batch: ours against the loader that most notebooks have.

The typical one: imread, cvtColor, A.Resize(256), RandomResizedCrop(224), HorizontalFlip, ColorJitter(p=1), Normalize,
ToTensorV2; 2 persistent workers, prefetch 2, cv2.setNumThreads(0), batch 32. Ours, cached at 256 px:
  same    the same albumentations chain in 2 workers, normalised by us; counted until the float batch is there
  fast    crop and flip in 2 threads, uint8 out; color and normalizing are the device's
Epochs take turns in one process; ours is counted from its second epoch, the first is reported apart.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from photographs import in_turns, jpegs, per_second, project, ratio, written

FILES, COPIES, ROUNDS, BATCH, FAST_EPOCHS = 64, 8, 5, 32, 8


def typical(files: list[str]) -> Callable[[object], object]:
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2
    from torch.utils.data import DataLoader, Dataset

    chain = A.Compose(
        [
            A.Resize(256, 256),
            A.RandomResizedCrop((224, 224)),
            A.HorizontalFlip(),
            A.ColorJitter(p=1),
            A.Normalize(),
            ToTensorV2(),
        ]
    )

    class Files(Dataset[Any]):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> Any:
            image: Any = cv2.imread(files[i])
            return chain(image=cv2.cvtColor(image, cv2.COLOR_BGR2RGB))["image"]

    loader = DataLoader(
        Files(),
        BATCH,
        shuffle=True,
        num_workers=2,
        prefetch_factor=2,
        persistent_workers=True,
        worker_init_fn=lambda number: cv2.setNumThreads(0),
    )
    return lambda _: [batch.shape for batch in loader]


def ours(table: Any, recipe: Any, epochs: int, normalise: bool) -> tuple[Callable[[object], object], float]:
    """A function that reads so many epochs, and how long the first took with cache and start of workers."""
    import torch

    from comp import competition, data, transforms
    from comp.engine.config import resolve
    from comp.engine.run import data_loader, normalize
    from comp.engine.store import paths

    competition.recipe = recipe
    overrides = [
        "competition.raw=raw",
        "data.size=224",
        "data.channels=3",
        f"data.cache_scale={256 / 224}",
        "augment=recipe",
    ]
    cfg = resolve.load(paths.root(), "exp001", overrides).config
    began = time.perf_counter()
    loader = data_loader.Loader(cfg, table, torch.device("cpu"))
    rows, epoch = table.positions("train"), 0
    seen = transforms.Preprocess(
        normalize.Normalize(torch.full((3, 1, 1), 124.0), torch.full((3, 1, 1), 58.0))
    )

    def read(_: object, count: int = epochs) -> None:
        nonlocal epoch
        for _ in range(count):
            for batch in loader.batches(data.training_batches(rows, BATCH, 0, epoch, 0)):
                if normalise:
                    seen(batch.images.permute(0, 3, 1, 2))
            epoch += 1

    read(None, 1)
    return read, time.perf_counter() - began


def at(side: int) -> dict[str, Any]:
    import albumentations as A

    from comp.engine.run import cv2_ops
    from comp.transforms import Recipe

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = jpegs(root / "raw", FILES, COPIES, side=side)
        table = project(root, names)
        files = [str(root / "raw" / name) for name in names]
        same, same_first = ours(
            table,
            lambda size: Recipe(
                [A.RandomResizedCrop((size, size)), A.HorizontalFlip()], [A.ColorJitter(p=1)]
            ),
            1,
            True,
        )
        fast, fast_first = ours(
            table,
            lambda size: Recipe(
                [cv2_ops.random_resized_crop(size, (0.08, 1.0), (0.75, 1.33)), cv2_ops.horizontal_flip()]
            ),
            FAST_EPOCHS,
            False,
        )
        taken = in_turns({"typical": typical(files), "same": same, "fast": fast}, [None], ROUNDS)
        kilobytes = sum(os.path.getsize(file) for file in files) / len(files) / 1000
    work = {"typical": len(names), "same": len(names), "fast": FAST_EPOCHS * len(names)}
    rates = per_second(taken, work)
    return {
        "kilobytes": round(kilobytes),
        "images_per_second": rates,
        "first_epoch_seconds": {
            "same, with filling the cache": round(same_first, 2),
            "fast": round(fast_first, 2),
        },
        "same_times_typical": ratio(taken["typical"], taken["same"]),
        "fast_times_typical": ratio(taken["typical"], taken["fast"], FAST_EPOCHS),
    }


def main() -> None:
    written({"1024 px": at(1024), "512 px": at(512)})


if __name__ == "__main__":
    main()
