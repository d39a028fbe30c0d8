"""data.normalize and data.whiten change images by statistics of the training rows of the fold only."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import config
from safetensors.torch import load_file

from comp import data, models, transforms
from comp.engine.bank import bank
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.data.samples import Positions
from comp.engine.errors import UserError
from comp.engine.run import data_loader, normalize, pixel_stats, runner
from comp.engine.store import paths

TINY = ["track=none", "machine.num_workers=0", "machine.progress=false", "augment.recipe=none"]
CPU = torch.device("cpu")


def seen_of(cfg: Config, rows: Positions) -> torch.Tensor:
    """The training rows as model input."""
    table = samples.load()
    loader = data_loader.Loader(cfg, table, CPU)
    module = models.build(cfg, table.heads, pretrained=False)
    pixel_stats.fit_pixel_stats(cfg, module, loader, rows)
    seen = transforms.Preprocess(normalize.build(cfg, module, CPU))
    return torch.cat(
        [seen(b.images.permute(0, 3, 1, 2)) for b in loader.batches(data.sequential_batches(rows, 64))]
    )


def noisy(project: Path) -> Positions:
    """Images of full rank: digits with noise, 12 px."""
    table = samples.load()
    rows = table.positions("train")[:600]
    draw = np.random.default_rng(0)
    for place in rows:
        file = project / "data/raw" / table.frame["images"].iloc[place][0]
        whole = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_GRAYSCALE)
        assert whole is not None
        image = cv2.resize(whole, (8, 8))
        cv2.imwrite(str(file), (image // 2 + draw.integers(0, 128, (8, 8))).astype(np.uint8))
    return rows


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_the_covariance_of_whitened_training_images_is_the_identity(project: Path, kind: str) -> None:
    rows = noisy(project)
    cfg = config(*TINY, "data.size=8", f"data.whiten={kind}", "data.whiten_eps=1e-7", "data.normalize=data")
    flat = seen_of(cfg, rows).flatten(1).double()
    assert flat.mean(0).abs().max() < 1e-4
    assert torch.allclose(flat.T @ flat / len(flat), torch.eye(64, dtype=torch.float64), atol=1e-3)
    plain = seen_of(config(*TINY, "data.size=8", "data.normalize=data"), rows).flatten(1).double()
    likeness = (plain * flat).sum() / (plain.norm() * flat.norm())
    assert (likeness > 0.7) == (kind == "zca"), "zca stays close to the image, pca does not"


def test_each_kind_of_normalization(project: Path) -> None:
    rows = samples.load().positions("train")[:200]
    as_data = seen_of(config(*TINY, "data.normalize=data"), rows)
    assert abs(float(as_data.mean())) < 1e-4 and abs(float(as_data.std()) - 1) < 1e-3
    stretched = seen_of(config(*TINY, "data.normalize=minmax"), rows)
    assert (stretched.amin((1, 2, 3)) == 0).all() and (stretched.amax((1, 2, 3)) == 1).all()
    raw = seen_of(config(*TINY, "data.normalize=none"), rows)
    assert raw.min() >= 0 and raw.max() <= 1
    by_model = seen_of(config(*TINY), rows)
    assert torch.allclose(by_model, (raw - 0.5) / 0.5, atol=1e-6)  # what test_resnet was made for


def test_an_outlier_among_the_validation_rows_has_no_effect(project: Path) -> None:
    """The statistics are in the weights, for inference and the kernel."""
    table = samples.load()
    train_rows, scored = folds.load(table).split(0)
    run = [
        *TINY,
        "train.epochs=1",
        "schedule.warmup=0",
        "data.size=16",
        "data.normalize=data",
        "data.whiten=zca",
    ]

    def numbers(name: str) -> dict[str, torch.Tensor]:
        runner.train("exp001", run, fold="0", name=name)
        weights = load_file(paths.fold_folder(name, 0, 0) / "weights.safetensors")
        return {key: value for key, value in weights.items() if key.startswith(("pixel", "white"))}

    def plant(rows: Positions) -> None:
        for place in rows:
            file = project / "data/raw" / table.frame["images"].iloc[place][0]
            cv2.imwrite(
                str(file), np.random.default_rng(int(place)).integers(0, 256, (32, 32)).astype(np.uint8)
            )

    before = numbers("before")
    assert set(before) == {"pixel_mean", "pixel_std", "white_middle", "white"}
    plant(np.concatenate([scored[:3], table.positions("test")[:3]]))
    after = numbers("after")
    assert all(torch.equal(before[key], after[key]) for key in before)
    plant(train_rows[:3])
    assert not any(torch.equal(before[key], value) for key, value in numbers("taught").items())
    stored = bank.read(paths.fold_folder("before", 0, 0) / "oof.arrow", table, folds.load(table))
    assert stored.predicted.all()


def test_whitening_is_for_small_images(empty: Path) -> None:
    for overrides in (["data.size=96"], ["augment.progressive_sizes=[16,32]"]):
        with pytest.raises(UserError, match=r"data.whiten"):
            config("data.whiten=zca", *overrides)


def test_normalizing_rows_of_pixels_gives_the_same_bits() -> None:
    """Channels last as from the loader, or channels first; flipped and rotated."""
    mean, std = (
        torch.tensor([124.0, 116.0, 104.0])[:, None, None],
        torch.tensor([58.0, 57.0, 56.0])[:, None, None],
    )
    inner = torch.rand(2, 5, 7, 3).permute(0, 3, 1, 2) * 255
    for x in (inner, inner.contiguous(), inner.flip(3), inner.transpose(2, 3), inner[:, :1]):
        copied = x.clone()
        channels = x.shape[1]
        made = normalize.Normalize(mean[:channels], std[:channels])(x)
        assert torch.equal(made, (x - mean[:channels]) / std[:channels]) and torch.equal(x, copied)
        assert torch.equal(normalize.Normalize(mean[:1], std[:1])(x), (x - mean[:1]) / std[:1]), (
            "one for all channels"
        )
