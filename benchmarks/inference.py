"""Test-time augmentation: every picture decoded once and turned as a tensor, against one pass over the files for each view.

mobilenetv3_small at 224 px, four flips, 1,024 px JPEGs decoded on the fly, no cache on any side, one loader process each.
  once     ours
  four     the same reading of ours, once a view: what turning the tensor saves by itself, and bit for bit the same
  typical  what most notebooks do: imread, cvtColor, resize, flip, normalise, once a view
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from photographs import in_turns, jpegs, per_second, project, ratio, written

FILES, ROUNDS = 64, 5


def typical(module: Any, files: list[str]) -> Callable[[object], object]:
    import albumentations as A
    import cv2
    import torch
    from albumentations.pytorch import ToTensorV2
    from torch.utils.data import DataLoader, Dataset

    class Files(Dataset[Any]):
        def __init__(self, flips: list[Any]):
            self.chain = A.Compose([A.Resize(224, 224), *flips, A.Normalize(), ToTensorV2()])

        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> Any:
            image: Any = cv2.imread(files[i])
            return self.chain(image=cv2.cvtColor(image, cv2.COLOR_BGR2RGB))["image"]

    h, v = A.HorizontalFlip(p=1), A.VerticalFlip(p=1)
    loaders = [
        DataLoader(Files(flips), 32, num_workers=1, persistent_workers=True)
        for flips in ([], [h], [v], [h, v])
    ]

    @torch.inference_mode()
    def run(_: object) -> object:
        return [module(batch).numpy() for loader in loaders for batch in loader]

    return run


def main() -> None:
    import numpy as np
    import timm
    import torch

    from comp import transforms
    from comp.engine.config import resolve
    from comp.engine.run import data_loader, normalize
    from comp.engine.run import views as tta
    from comp.engine.run.forward import forward_rows

    torch.set_num_threads(1)
    views = tta.views(["identity", "hflip", "vflip", "rot180"])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        table = project(root, jpegs(root / "raw", FILES))
        overrides = ["competition.raw=raw", "data.size=224", "data.channels=3", "augment=none"]
        overrides += ["data.cache=false", "machine.gpu_cache_mb=0", "machine.num_workers=1"]
        cfg = resolve.load(root, "exp001", overrides).config
        loader = data_loader.Loader(cfg, table, torch.device("cpu"))
        module = timm.create_model("mobilenetv3_small_100", num_classes=10).eval()
        seen = transforms.Preprocess(
            normalize.Normalize(torch.full((3, 1, 1), 124.0), torch.full((3, 1, 1), 58.0))
        )
        rows = table.positions("train")
        said: dict[str, Any] = {}

        def once(_: object) -> None:
            said["once"] = forward_rows(module, loader, rows, 32, seen, "fp32", views)[0]

        def four(_: object) -> None:
            passes = [forward_rows(module, loader, rows, 32, seen, "fp32", [view])[0] for view in views]
            said["four"] = np.concatenate(passes)

        files = [str(root / "raw" / images[0]) for images in table.frame["images"]]
        taken = in_turns({"once": once, "four": four, "typical": typical(module, files)}, [None], ROUNDS)
        same = np.array_equal(said["once"], said["four"])
    written(
        {
            "pictures_per_second": per_second(taken, dict.fromkeys(taken, FILES)),
            "once_times_four_passes_of_ours": ratio(taken["four"], taken["once"]),
            "once_times_four_typical_passes": ratio(taken["typical"], taken["once"]),
            "bit_identical": bool(same),
        },
    )


if __name__ == "__main__":
    main()
