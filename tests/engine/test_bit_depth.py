"""data.bit_depth: 16 bit files and arrays lose nothing in decoder, cache, loader and views."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import config
from PIL import Image

from comp import models, transforms
from comp.data import Index, sequential_batches
from comp.engine import cli
from comp.engine.data import cache, image_reader, make_folds, prepare, samples
from comp.engine.data.samples import Samples
from comp.engine.data.seeding import derive_seed
from comp.engine.errors import UserError
from comp.engine.readers import arrays, decode
from comp.engine.report import plots as drawings
from comp.engine.run import augment_grid, normalize, views
from comp.engine.run.data_loader import Loader
from comp.engine.run.normalize import Normalize
from comp.engine.store import paths
from comp.engine.tasks.kinds import Head

DEEP = np.random.default_rng(0).integers(0, 65536, (24, 24, 3), np.uint16)
UNITS = Normalize(torch.zeros(3, 1, 1), torch.ones(3, 1, 1))


def numbers(depth: int, low: float | None = None, high: float | None = None) -> arrays.PixelFormat:
    return arrays.PixelFormat(low, high, (), depth)


def encoded(suffix: str, image: Any) -> bytes:
    return bytes(cv2.imencode(suffix, image)[1].tobytes())


def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_a_16_bit_file_keeps_its_values(suffix: str) -> None:
    data = encoded(suffix, DEEP[:, :, ::-1])
    found = decode.decode(data, None, "stretch", 3, "x", numbers(16))
    assert found.dtype == np.uint16 and np.array_equal(found, DEEP)
    grey = decode.decode(encoded(suffix, DEEP[:, :, 0]), None, "stretch", 3, "x", numbers(16))
    assert np.array_equal(grey, np.repeat(DEEP[:, :, :1], 3, 2))
    if suffix == ".png":  # in 8 bits it is the high byte, as ever
        grey = decode.decode(encoded(suffix, DEEP[:, :, 0]), None, "stretch", 1, "x")
        assert np.array_equal(grey[:, :, 0], DEEP[:, :, 0] >> 8)


def test_bands_of_a_tiff_are_channels() -> None:
    near_infrared = np.random.default_rng(1).integers(0, 256, (24, 24, 4), np.uint8)
    for mode, bands in (("RGBX", near_infrared), ("RGBA", near_infrared)):
        file = io.BytesIO()
        Image.fromarray(bands, mode).save(file, "TIFF")
        assert np.array_equal(decode.decode(file.getvalue(), None, "stretch", 4, "x"), bands)
        assert np.array_equal(decode.decode(file.getvalue(), None, "stretch", 3, "x"), bands[:, :, :3])
    tifffile = pytest.importorskip("tifffile")
    many = np.random.default_rng(2).integers(0, 65536, (24, 30, 13), np.uint16)
    for planar, array in (("contig", many), ("separate", np.moveaxis(many, 2, 0))):
        file = io.BytesIO()
        tifffile.imwrite(file, array, photometric="minisblack", planarconfig=planar)
        data = file.getvalue()
        assert np.array_equal(decode.decode(data, None, "stretch", 13, "x", numbers(16)), many)
        assert np.array_equal(decode.decode(data, None, "stretch", 13, "x"), many >> 8)
    with pytest.raises(arrays.DamagedImage, match=r"has 13 bands, and data\.channels is 5"):
        decode.decode(data, None, "stretch", 5, "x")
    with pytest.raises(arrays.DamagedImage, match="damaged"):
        decode.decode(data[: len(data) // 2], None, "stretch", 13, "x")


def test_arrays_keep_their_values() -> None:
    deep = decode.decode(saved(DEEP), None, "stretch", 3, "x", numbers(16))
    assert deep.dtype == np.uint16 and np.array_equal(deep, DEEP)
    values = np.random.default_rng(0).normal(0, 3, (24, 24, 3)).astype(np.float32)
    assert np.array_equal(decode.decode(saved(values), None, "stretch", 3, "x", numbers(32)), values)
    ranged = decode.decode(saved(values), None, "stretch", 3, "x", numbers(32, -1.0, 1.0))
    assert np.allclose(ranged, (values + 1) / 2 * 255, atol=1e-3), "beyond the range nothing is cut off"
    values[0, 0, 0] = np.nan
    with pytest.raises(arrays.DamagedImage, match="holds NaN"):
        decode.decode(saved(values), None, "stretch", 3, "x", numbers(32))


@pytest.mark.parametrize("size", [16, 40])
@pytest.mark.parametrize("resize", ["stretch", "cover", "contain"])
def test_all_depths_agree(size: int, resize: Any) -> None:
    """An 8 bit file is the same image at every depth, resized with the precision of the depth."""
    image = cv2.GaussianBlur(np.random.default_rng(1).integers(0, 256, (30, 24, 3), np.uint8), (5, 5), 0)
    data = encoded(".png", image)
    coarse = decode.decode(data, size, resize, 3, "x")
    fine = decode.decode(data, size, resize, 3, "x", numbers(16)) / 257
    real = decode.decode(data, size, resize, 3, "x", numbers(32))
    assert coarse.shape == fine.shape == real.shape
    assert np.abs(fine - coarse).max() < 1.6 and np.abs(np.clip(real, 0, 255) - fine).max() < 0.02


def deep_project(root: Path, depth: int, count: int = 5) -> tuple[Any, list[str]]:
    raw = root / "data" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (raw / f"{i}.png").write_bytes(encoded(".png", np.roll(DEEP, i, axis=0)))
    cfg = config(
        f"data.bit_depth={depth}", "data.size=24", "data.channels=3", "augment=fast", experiment="base"
    )
    return cfg, [f"{i}.png" for i in range(count)]


def test_cached_and_direct_are_the_same(empty: Path) -> None:
    for depth in (8, 16, 32):
        cfg, names = deep_project(empty, depth)
        cached = cache.open_images(cfg, names, progress=False)
        assert isinstance(cached, cache.CachedImages)
        direct = cache.UncachedImages(image_reader.from_config(cfg), cached.pages.table["name"])
        for i in range(len(names)):
            assert cached[i].dtype == arrays.DTYPES[depth] and np.array_equal(cached[i], direct[i])
        size = (cached.pages.folder / "pixels.bin").stat().st_size
        assert size == len(names) * 24 * 24 * 3 * depth // 8
    cfg, names = deep_project(empty, 16, count=7)  # grows behind what is there
    assert np.array_equal(
        cache.open_images(cfg, names, progress=False)[6], image_reader.from_config(cfg).image("6.png")
    )


def test_the_model_gets_both_bytes(empty: Path) -> None:
    cfg, names = deep_project(empty, 16)
    image = image_reader.from_config(cfg).image(names[0])
    seen = transforms.Preprocess(UNITS)(torch.from_numpy(image)[None].permute(0, 3, 1, 2))
    assert torch.allclose(seen[0], torch.from_numpy(image.astype(np.float32) / 257).permute(2, 0, 1))
    drawn = transforms.Augment(transforms.from_config(cfg), 24)(image, derive_seed(1, 2))
    assert drawn.dtype == np.uint16 and (drawn % 257 != 0).any()
    turned = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    for view in views.views(list(views.VIEWS | views.CROPS)):
        assert view(turned).dtype == torch.uint16


def test_plots_have_8_bits() -> None:
    assert np.array_equal(arrays.to_uint8(DEEP), np.rint(DEEP / 257).astype(np.uint8))
    assert arrays.to_uint8(np.array([-3.0, 7.4, 300.0], np.float32)).tolist() == [0, 7, 255]


def test_an_8_bit_op_is_refused(empty: Path) -> None:
    cfg = config("data.bit_depth=16", "augment=medium", experiment="base")
    with pytest.raises(UserError, match=r"16 bits, and RandomResizedCrop of augment.recipe medium") as caught:
        transforms.epoch_recipe(cfg, transforms.epoch_augments(cfg)[0])
    assert (caught.value.code, caught.value.key) == ("depth-unsupported", "data.bit_depth")


def test_five_channels_go_from_file_to_output(empty: Path) -> None:
    raw = empty / "data" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 5), np.uint8)
    for i, image in enumerate(images):
        (raw / f"{i}.npy").write_bytes(saved(image))
    cfg = config("data.channels=5", "data.size=24", "machine.num_workers=0", "augment=light")
    head = Head("label", "binary", ("label",), ("target.label",), ("0", "1"))
    frame = pd.DataFrame(
        {
            "id": ["a", "b", "c"],
            "images": [["0.npy"], ["1.npy"], ["2.npy"]],
            "source": "train",
            "target.label": 0.0,
        }
    )
    cpu = torch.device("cpu")
    loader = Loader(cfg, Samples(frame, (head,), "x"), cpu)
    (batch,) = loader.batches(sequential_batches(np.arange(3), 4))
    assert np.array_equal(batch.images.numpy(), images)
    assert loader.dataset[Index(0, 7)][1][0].shape == (24, 24, 5), "augmented too"
    module = models.build(cfg, (head,), pretrained=False, loader=loader).eval()
    seen = transforms.Preprocess(normalize.build(cfg, module, cpu))

    def out(values: np.ndarray) -> torch.Tensor:
        return module(seen(torch.from_numpy(values).permute(0, 3, 1, 2)))

    other = images.copy()
    other[..., 4] = 255 - other[..., 4]
    assert out(images).shape == (3, 1) and not torch.allclose(out(images), out(other)), "the fifth is heard"


@pytest.mark.parametrize("channels", [5, 7])
def test_many_channels_are_drawn_by_their_first_three(project: Path, channels: int) -> None:
    """comp augment, the images that a run logs, and comp explain."""
    file = project / "configs" / "competition.yaml"
    planes = "+".join(["train/{id}.png"] * channels)
    file.write_text(
        file.read_text()
        .replace("train/{id}.png", planes)
        .replace("test/{id}.png", planes.replace("train", "test"))
    )
    prepare.prepare(config(experiment="base"))
    make_folds.make(config(), samples.load(), remake=True)
    (project / "configs" / "exp003.yaml").write_text(
        f"base: exp001\ndata: {{channels: {channels}}}\naugment: {{random_erasing: 0.5}}\n"
        "train: {max_samples: 16, batch_size: 8, epochs: 1, ema_decay: null}\n"
        "schedule: {warmup: 0}\nmachine: {num_workers: 0, progress: false}\ntrack: {mode: none}\n"
    )
    assert cli.main(["augment", "exp003"]) == 0
    with Image.open(project / "runs" / "exp003-augment.png") as drawn:
        assert np.asarray(drawn)[augment_grid.TITLE + 20 : augment_grid.TITLE + 80, 10:90].std() > 5
    assert cli.main(["train", "exp003", "--fold", "0"]) == 0
    folder = paths.fold_folder("exp003", 0, 0)
    thumbnails = sorted(folder.rglob("worst/*.png"))
    assert len(thumbnails) == 16
    with Image.open(thumbnails[0]) as drawn:
        assert np.asarray(drawn).std() > 5
    assert cli.main(["explain", "exp003", "--count", "2"]) == 0
    assert (paths.run_folder("exp003") / "explain.png").exists()


def test_channels_to_rgb() -> None:
    seven = np.arange(2 * 2 * 7, dtype=np.uint8).reshape(2, 2, 7)
    assert np.array_equal(drawings.to_rgb(seven), seven[:, :, :3])
    for few in (1, 2):
        assert np.array_equal(drawings.to_rgb(seven[:, :, :few]), np.repeat(seven[:, :, :1], 3, 2))
