"""Layouts of real competitions, by declaration alone: tables of every kind, images inside other files, rows
of several images, several labels and several lines."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import py7zr
import pytest
import yaml
from conftest import config
from PIL import Image

from comp.engine.bank import bank
from comp.engine.data import cache, folds, image_reader, make_folds, prepare, samples
from comp.engine.errors import UserError
from comp.engine.extras import check
from comp.engine.readers import containers, decode
from comp.engine.readers.arrays import DamagedImage

TINY = (
    "base: base\ndata: {size: 16}\naugment: {recipe: none}\nmodel: {name: test_resnet, pretrained: false}\n"
)
TINY += "train: {epochs: 1, batch_size: 4}\nschedule: {warmup: 0}\n"
TINY += "machine: {num_workers: 0}\ntrack: {mode: none}\n"


def image(level: int, kind: str = "PNG", size: tuple[int, int] = (20, 16)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (level, 255 - level, 40)).save(out, kind)
    return out.getvalue()


def declare(root: Path, **changes: Any) -> None:
    simple: dict[str, Any] = {
        "slug": "x", "title": "x", "raw": "data/raw",
        "train": {"table": "train.csv", "image": "train/{id}.png"},
        "test": {"table": "sample.csv", "image": "test/{id}.png"},
        "id": "id", "target": "label", "task": "multiclass", "metric": "accuracy",
        "folds": {"scheme": "stratified", "k": 2, "seed": 0},
        "submission": {"sample": "sample.csv", "form": "label"},
    }  # fmt: skip
    (root / "configs" / "competition.yaml").write_text(yaml.safe_dump(simple | changes))
    (root / "configs" / "exp001.yaml").write_text(TINY)


def put(root: Path, name: str, data: bytes | str) -> None:
    file = root / "data" / "raw" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data if isinstance(data, bytes) else data.encode())


def prepared() -> samples.Samples:
    prepare.prepare(config(experiment="base"))
    return samples.load()


def error_line() -> str:
    with pytest.raises(UserError) as found:
        prepared()
    return "\n".join(found.value.lines)


def opened(table: samples.Samples) -> cache.Images:
    return cache.open_images(config(), [p for each in table.frame["images"] for p in each], progress=False)


# --- no table, json, archives -------------------------------------------------------------------------------


def test_files_are_the_rows_and_their_paths_the_labels(empty: Path) -> None:
    for i, label in enumerate(["cat", "dog", "cat"]):
        put(empty, f"train/{label}.{i}.png", image(i))
        put(empty, f"test/{i}.png", image(i))
    put(empty, "sample.csv", "id,label\n0,cat\n1,cat\n2,cat\n")
    declare(empty, train={"files": "train/{label:cat|dog}.{number}.png"}, test={"files": "test/{id}.png"})
    table = prepared()
    assert table.heads[0].classes == ("cat", "dog")
    assert table.frame["id"].tolist() == ["train/cat.0", "train/cat.2", "train/dog.1", "0", "1", "2"]
    declare(empty, train={"files": "trian/{label}.{number}.png"}, test={"files": "test/{id}.png"})
    assert "matches no file" in error_line()


@pytest.mark.parametrize("shape", ["coco", "list", "columns", "by id"])
def test_json_of_every_shape(empty: Path, shape: str) -> None:
    rows = [{"id": str(i), "category_id": 7 + i % 2, "file_name": f"a/{i}.png"} for i in range(4)]
    text: Any = {
        "coco": {
            "images": [{"id": r["id"], "file_name": r["file_name"]} for r in rows],
            "annotations": [
                {"id": 100 + i, "image_id": r["id"], "category_id": r["category_id"]}
                for i, r in enumerate(rows)
            ],
            "categories": [{"id": 7, "name": "ash"}, {"id": 8, "name": "oak"}],
        },
        "list": rows,
        "columns": {key: [r[key] for r in rows] for key in rows[0]},
        "by id": {r["id"]: {k: v for k, v in r.items() if k != "id"} for r in rows},
    }[shape]
    put(empty, "train.json", json.dumps(text))
    put(empty, "sample.csv", "Id,label\n9,7\n")
    key = "key" if shape == "by id" else "id"
    declare(empty, train={"table": "train.json", "image": "{file_name}", "id": key}, test={"table": "sample.csv", "image": "{Id}.png", "id": "Id"}, target="category_id")  # fmt: skip
    table = prepared()
    assert table.frame["images"].iloc[1].tolist() == ["a/1.png"]
    assert table.heads[0].classes == ("7", "8")
    put(empty, "train.json", json.dumps(text)[:-3])
    assert "data/raw/train.json:1: invalid json" in error_line()


def archive(kind: str, prefix: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as zipped:
            for i in range(3):
                zipped.writestr(f"{prefix}{i}.png", image(10 * i))
    elif kind == "7z":
        with py7zr.SevenZipFile(out, "w") as packed:
            for i in range(3):
                packed.writef(io.BytesIO(image(10 * i)), f"{prefix}{i}.png")
    else:
        with tarfile.open(fileobj=out, mode="w:gz" if kind == "tar.gz" else "w") as tar:
            for i in range(3):
                info = tarfile.TarInfo(f"{prefix}{i}.png")
                info.size = len(image(10 * i))
                tar.addfile(info, io.BytesIO(image(10 * i)))
    return out.getvalue()


@pytest.mark.parametrize("prefix", ["", "train/deeper/"])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "7z"])
def test_images_inside_archives_of_any_name(empty: Path, kind: str, prefix: str) -> None:
    put(empty, "train.zip", archive(kind, prefix))  # by its bytes, not by its name
    put(empty, "train.csv", "id,label\n0,a\n1,b\n2,a\n")
    put(empty, "sample.csv", "id,label\n1,a\n")
    declare(empty, train={"table": "train.csv", "image": "train.zip/{id}.png"}, test={"table": "sample.csv", "image": "train.zip/{id}.png"})  # fmt: skip
    read = opened(prepared())
    assert [int(read[i][0, 0, 0]) for i in range(4)] == [0, 10, 20, 10]
    assert not check.run(config(experiment="base"))
    put(empty, "train.csv", "id,label\n0,a\n5,b\n2,a\n")
    (fault,) = check.run(config(experiment="base"))
    assert (fault.code, fault.where) == ("image-missing", "data/raw/train.csv:3")
    assert "train.zip/5.png" in fault.what


def test_an_archive_never_writes_outside_its_folder(empty: Path) -> None:
    put(empty, "train.zip", archive("tar.gz", "../../../escaped/"))
    with pytest.raises((UserError, tarfile.TarError)):
        containers.members(empty / "data" / "raw" / "train.zip")
    assert not list(empty.parent.rglob("escaped"))


def bson(records: list[dict[str, Any]]) -> bytes:
    def element(key: str, value: Any) -> bytes:
        name = key.encode() + b"\0"
        if isinstance(value, int):
            return b"\x10" + name + struct.pack("<i", value)
        if isinstance(value, bytes):
            return b"\x05" + name + struct.pack("<iB", len(value), 0) + value
        inner = document(value if isinstance(value, dict) else {str(i): v for i, v in enumerate(value)})
        return (b"\x03" if isinstance(value, dict) else b"\x04") + name + inner

    def document(fields: dict[str, Any]) -> bytes:
        body = b"".join(element(k, v) for k, v in fields.items()) + b"\0"
        return struct.pack("<i", len(body) + 4) + body

    return b"".join(map(document, records))


def test_bson_gives_rows_with_several_images(empty: Path) -> None:
    records = [
        {"_id": 5, "category_id": 1, "imgs": [{"picture": image(0)}, {"picture": image(50)}]},
        {"_id": 6, "category_id": 2, "imgs": [{"picture": image(100)}]},
    ]
    put(empty, "train.bson", bson(records))
    put(empty, "sample.csv", "_id,category_id\n5,1\n")
    declare(empty, id="_id", target="category_id", train={"table": "train.bson", "image": "train.bson/{_id}/*"}, test={"table": "sample.csv", "image": "train.bson/{_id}/*"})  # fmt: skip
    table = prepared()
    assert [len(each) for each in table.frame["images"]] == [2, 1, 2]
    read = opened(table)
    assert [int(read[i][0, 0, 0]) for i in range(3)] == [0, 50, 100]
    put(empty, "train.bson", bson(records)[:-9])
    assert "cut off or damaged at byte" in error_line()


def test_a_table_inside_an_archive(empty: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        zipped.writestr("train.csv", "id,label\n007,a\n008,b\n")
    put(empty, "train.csv.zip", out.getvalue())
    put(empty, "sample.csv", "id,label\n1,a\n")
    declare(empty, train={"table": "train.csv.zip", "image": "{id}.png"})
    assert prepared().frame["id"].tolist()[:2] == ["007", "008"]


# --- pictures that are numbers ------------------------------------------------------------------------------


def made(name: str, **changes: Any) -> decode.Pixels:
    reader = image_reader.from_config(config("data.channels=1", "data.size=16", experiment="base"))
    return replace(reader, **changes).image(name)


def test_arrays_by_their_declared_range(empty: Path) -> None:
    ramp = np.linspace(-1, 1, 256).reshape(16, 16)
    np.save(empty / "data.npy", ramp)
    put(empty, "a.npy", (empty / "data.npy").read_bytes())
    with pytest.raises(DamagedImage, match=r"numbers from -1 to 1; set competition\.pixels\.range"):
        made("a.npy")
    whole = made("a.npy", pixel_format=decode.arrays.PixelFormat(-1.0, 1.0))[:, :, 0]
    assert np.array_equal(whole, np.rint((ramp + 1) / 2 * 255))
    out = io.BytesIO()
    np.savez(out, images=np.stack([np.full((16, 16), i, np.uint8) for i in range(9)]))
    put(empty, "b.npz", out.getvalue())
    assert made("b.npz/images/7").max() == 7
    put(empty, "c.json", json.dumps([{"id": "x", "band": list(range(256)), "label": 1}]))
    assert np.array_equal(made("c.json/x/band")[:, :, 0].ravel(), np.arange(256))
    pd.DataFrame({"image_id": ["u", "v"], **{str(i): [i, 255 - i] for i in range(256)}}).to_parquet(
        empty / "data/raw/d.parquet"
    )
    assert np.array_equal(made("d.parquet/v")[:, :, 0].ravel(), 255 - np.arange(256))


def test_stacks_of_pages_and_of_files_become_channels(empty: Path) -> None:
    pages = [Image.fromarray(np.full((16, 16), 10 * i, np.uint8)) for i in range(6)]
    out = io.BytesIO()
    pages[0].save(out, "TIFF", save_all=True, append_images=pages[1:])
    put(empty, "a.tif", out.getvalue())
    assert made("a.tif", channels=6)[0, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert made("a.tif", channels=6, size=7)[3, 3].tolist() == [0, 10, 20, 30, 40, 50]
    for i, colour in enumerate(["red", "green"]):
        grey = io.BytesIO()
        Image.new("L", (16, 16), 100 * i).save(grey, "PNG")
        put(empty, f"a_{colour}.png", grey.getvalue())
    assert made("a_red.png//a_green.png", channels=2)[0, 0].tolist() == [0, 100]
    with pytest.raises(DamagedImage, match=r"a_blue\.png: no such file"):
        made("a_red.png//a_blue.png", channels=2)


def test_dicom_by_its_window_and_photometric_interpretation(empty: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    for meaning, first in (("MONOCHROME2", 0), ("MONOCHROME1", 255)):
        file = pydicom.Dataset()
        file.SOPClassUID, file.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, "1.2.3"
        file.Rows = file.Columns = 16
        file.SamplesPerPixel, file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = (
            1,
            16,
            12,
            11,
            0,
        )
        file.PhotometricInterpretation = meaning
        file.RescaleSlope, file.RescaleIntercept, file.WindowCenter, file.WindowWidth = 2, -100, 100, 400
        file.PixelData = np.linspace(0, 200, 256).astype(np.uint16).tobytes()  # -100 to 300 after rescaling
        file.file_meta = pydicom.dataset.FileMetaDataset()
        file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        out = io.BytesIO()
        pydicom.dcmwrite(out, file, enforce_file_format=True)
        put(empty, "x.dcm", out.getvalue())
        pixels = made("x.dcm").ravel()
        assert [pixels[0], pixels[-1]] == [first, 255 - first]
    put(empty, "x.dcm", out.getvalue()[:-200])
    with pytest.raises(DamagedImage, match="damaged DICOM"):
        made("x.dcm")
    gdcm = pytest.importorskip("gdcm")  # JPEG Lossless, as most hospitals pack them
    put(empty, "x.dcm", out.getvalue())
    plain, packed = str(empty / "data/raw/x.dcm"), str(empty / "data/raw/y.dcm")
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(plain)
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(packed)
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write() and np.array_equal(made("y.dcm"), made("x.dcm"))


# --- several images, metadata -------------------------------------------------------------------------------


def test_several_images_and_metadata_are_model_inputs(empty: Path) -> None:
    from comp import models
    from comp.data import sequential_batches
    from comp.engine.run import loading, runner
    from comp.engine.run.data_loader import Loader

    for i in range(8):
        for n in range(1 + i % 2):
            put(empty, f"train/{i}/{n}.png", image(30 * i + n))
    rows = "".join(f"{i},{'ab'[i % 2]},{'' if i == 3 else i},{'uv'[i // 4]}\n" for i in range(8))
    put(empty, "train.csv", "id,label,age,place\n" + rows)
    put(empty, "test.csv", "id,age,place\n1,5,w\n")
    put(empty, "sample.csv", "id,label\n1,a\n")
    where = {"image": "train/{id}/*"}
    declare(
        empty,
        metadata=["age", "place"],
        train={"table": "train.csv"} | where,
        test={"table": "test.csv"} | where,
    )
    table = prepared()
    make_folds.make(config(), table)
    context = loading.load_context(config("model.metadata=true"))
    batch = next(iter(context.loader.batches(sequential_batches(np.arange(4), 4))))
    assert batch.images.shape[0] == 6 and batch.owner is not None
    assert batch.owner.tolist() == [0, 1, 1, 2, 3, 3]
    extras = context.loader.extras(batch)
    assert context.loader.metadata is not None
    assert extras["metadata"].shape == (4, 4)  # age, whether it is missing, u, v
    assert extras["metadata"][3, 1] == 1 and not context.loader.metadata[-1, 2:].any(), (
        "w is a place never seen"
    )
    runner.train("exp001", ["model.metadata=true"], name="both")
    alone = bank.load("both", "oof", table, folds.load(table))
    assert alone.predicted.all()

    # A hidden test set may happen to have one image a sample: the network stays the one that was trained.
    single = replace(table, frame=table.frame.assign(images=[images[:1] for images in table.frame["images"]]))
    loader = Loader(config("model.metadata=true"), single, context.device)
    assert single.multi_image and models.build(
        context.cfg, table.heads, False, loader
    ).state_dict().keys() == (
        models.build(context.cfg, table.heads, False, context.loader).state_dict().keys()
    )
    with pytest.raises(UserError) as caught:
        Loader(config(), replace(table, multi_image=False), context.device)
    assert (caught.value.code, caught.value.key) == ("images-per-sample", "data.max_images")
    with pytest.raises(UserError, match=r"model.image_pool: max has no effect"):
        loading.load_context(config("model.image_pool=max", "data.max_images=1"))


def test_pooling_is_over_the_images_of_a_sample_alone(empty: Path) -> None:
    import torch

    from comp.models import MultiInputModel

    features = torch.tensor([[1.0, 4.0], [3.0, 0.0], [7.0, 7.0]])
    for pool, first in (("mean", [2.0, 2.0]), ("max", [3.0, 4.0])):
        joined = MultiInputModel(torch.nn.Identity(), pool, 2)
        assert joined(features, owner=torch.tensor([0, 0, 1])).tolist() == [first, [7.0, 7.0]]


# --- your own -----------------------------------------------------------------------------------------------


def test_crop_views_show_their_part() -> None:
    import torch

    from comp.engine.run import views

    x = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    x[:, :, 0, 0] = 255
    (left, right, same) = views.views(["crop_top_left", "crop_bottom_right", "zoom150"])
    assert left(x).shape == x.shape and left(x).dtype == torch.uint8
    assert left(x)[0, 0, 0, 0] > 200 and right(x).sum() == 0 and same(x).sum() == 0
    with pytest.raises(UserError, match="no such view 'zoom111'; the nearest is zoom110"):
        views.views(["zoom111"])
