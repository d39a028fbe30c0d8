"""JPEGs that libjpeg warns about, and those with a hole, are damaged everywhere, unless
competition.pixels.lenient is set."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import config
from PIL import Image
from test_decode import encoded, photograph

from comp.engine.data import cache
from comp.engine.deliver import kernel_inputs, kernel_models
from comp.engine.extras import check
from comp.engine.readers import arrays, decode
from comp.engine.readers.arrays import DamagedImage
from comp.engine.store import artifacts, paths

PICTURE = photograph(240, 320)
COLOUR = Image.fromarray(PICTURE)
LENIENT = arrays.PixelFormat(lenient=True)
END = b"\xff\xd9"


def by_opencv(*options: int) -> bytes:
    return bytes(cv2.imencode(".jpg", PICTURE[:, :, ::-1], list(options))[1])


WHOLE = {
    "baseline": encoded(COLOUR, "JPEG", quality=90),
    "progressive": encoded(COLOUR, "JPEG", quality=90, progressive=True),
    "4:4:4, optimized": encoded(COLOUR, "JPEG", quality=90, subsampling=0, optimize=True),
    "grey": encoded(COLOUR.convert("L"), "JPEG", quality=95),
    "grey progressive": encoded(COLOUR.convert("L"), "JPEG", quality=95, progressive=True),
    "cmyk": encoded(COLOUR.convert("CMYK"), "JPEG", quality=90),
    "opencv": by_opencv(),
    "opencv progressive": by_opencv(cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "opencv restarts": by_opencv(cv2.IMWRITE_JPEG_RST_INTERVAL, 8),
}


def middle(data: bytes) -> int:
    return (data.index(b"\xff\xda") + len(data)) // 2


# As after failed downloads and disks. All of them have an end marker, so the file structure is complete.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut in the middle": lambda data: data[: middle(data)] + END,
    "cut 40 bytes before the end": lambda data: data[:-40] + END,
    "2,000 zeros": lambda data: data[: middle(data)] + bytes(2000) + data[middle(data) + 2000 :],
    "200 bytes lost": lambda data: data[: middle(data)] + data[middle(data) + 200 :],
    "200 bytes too many": lambda data: data[: middle(data)] + bytes(range(1, 201)) + data[middle(data) :],
    "bytes before the scan": lambda data: data.replace(b"\xff\xda", b"\x12\x34\x56\xff\xda", 1),
    "bytes before the end": lambda data: data[:-2] + bytes(range(1, 101)) + END,
}  # fmt: skip
BROKEN = {f"{kind}, {how}": damage(data) for kind, data in WHOLE.items() for how, damage in DAMAGES.items()}


def outcome(data: bytes, *arguments: Any) -> str | tuple[int, ...]:
    try:
        return decode.decode(data, *arguments).shape
    except DamagedImage as damaged:
        return damaged.reason


def test_every_kind_of_damage_at_every_scale() -> None:
    """size None decodes every pixel, 32 at an eighth, 100 at a half; grey and colour."""
    for name, data in WHOLE.items():
        assert outcome(data, 32, "stretch", 3, name) == (32, 32, 3), name
    for name, data in BROKEN.items():
        for size, channels in ((None, 3), (100, 3), (32, 1)):
            reason = outcome(data, size, "stretch", channels, name)
            assert isinstance(reason, str) and reason.startswith((decode.WARNED, "damaged, there are zeros")), (name, size, reason)  # fmt: skip


def test_lenient_accepts_what_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pixels with and without simplejpeg; without it, and not lenient, no JPEG is accepted."""
    lenient = {
        name: decode.decode(data, 100, "stretch", 3, name, LENIENT)
        for name, data in BROKEN.items()
        if "zeros" not in name
    }
    first = WHOLE["baseline"]
    assert np.array_equal(
        lenient["baseline, bytes before the scan"], decode.decode(first, 100, "stretch", 3, "x")
    )
    inks = decode.decode(WHOLE["cmyk"], 100, "stretch", 3, "x")
    monkeypatch.setattr(decode, "simplejpeg", None)
    for name, pixels in lenient.items():
        assert np.array_equal(pixels, decode.decode(BROKEN[name], 100, "stretch", 3, name, LENIENT)), name
    assert np.array_equal(inks, decode.decode(WHOLE["cmyk"], 100, "stretch", 3, "x", LENIENT))
    for data in (first, WHOLE["cmyk"], BROKEN["baseline, cut in the middle"]):
        assert "pip install simplejpeg" in str(outcome(data, 32, "stretch", 3, "x"))


def test_a_header_that_only_pillow_reads() -> None:
    """No scan starts where a length points to; the decoder resynchronizes, with or without an image."""
    data = WHOLE["baseline"]
    scan = data.index(b"\xff\xda")
    broken = data[:scan] + b"\xff\xfe\xff\xff" + data[scan:]  # a comment longer than the file
    assert isinstance(outcome(broken, 32, "stretch", 3, "x"), str)


def test_holes_of_zeros_are_found_wherever_they_are() -> None:
    """Quality 95, OpenCV's default: with one hole in eight the decoder still has enough blocks, so libjpeg
    does not warn. In a flat image, runs of zeros are valid blocks."""
    data, random, silent = by_opencv(), np.random.default_rng(0), 0
    scan = data.index(b"\xff\xda") + 14
    for at in random.integers(scan, len(data) - 2002, 60).tolist():
        reason = outcome(data[:at] + bytes(2000) + data[at + 2000 :], 32, "stretch", 3, "x")
        assert isinstance(reason, str), at
        silent += reason.startswith("damaged, there are zeros")
    assert silent
    for flat in (np.zeros((900, 900, 3), np.uint8), np.full((900, 900), 255, np.uint8)):
        for options in ({}, {"optimize": True}, {"progressive": True}):
            file = encoded(Image.fromarray(flat), "JPEG", **options)
            assert outcome(file, 32, "stretch", 3, "x") == (32, 32, 3), options
    after = WHOLE["baseline"] + bytes(5000) + WHOLE["grey"]  # a second image, as phones append
    assert outcome(after, 32, "stretch", 3, "x") == (32, 32, 3)


NAMES = {
    "train/whole.jpg": WHOLE["baseline"],
    "train/cut.jpg": BROKEN["baseline, cut in the middle"],
    "train/zeros.jpg": BROKEN["opencv, 2,000 zeros"],
    "train/progressive.jpg": BROKEN["progressive, 200 bytes lost"],
    "train/before.jpg": BROKEN["grey, bytes before the scan"],
}
PACKED = [name.replace("train/", "train.zip/") for name in NAMES]


@pytest.fixture
def laid(empty: Path) -> Path:
    """The same five files as files and in an archive, four of them damaged, and a table of all ten."""
    raw = empty / "data" / "raw"
    with zipfile.ZipFile(_made(raw / "train.zip"), "w") as archive:
        for name, data in NAMES.items():
            _made(raw / name).write_bytes(data)
            archive.writestr(name.removeprefix("train/"), data)
    listed = [*NAMES, *PACKED]
    (raw / "train.csv").write_text(
        "id,file,label\n" + "".join(f"{i},{name},{i % 2}\n" for i, name in enumerate(listed))
    )
    (raw / "test.csv").write_text("id,file\nt0,train/whole.jpg\nt1,train/cut.jpg\n")
    (raw / "sample_submission.csv").write_text("id,label\nt0,0\nt1,0\n")
    declared = empty / "configs" / "competition.yaml"
    text = declared.read_text().replace("train/{id}.png", "{file}").replace("test/{id}.png", "{file}")
    text = text.replace("group: writer\n", "").replace("metadata: [pen]\n", "")
    declared.write_text(text.replace("stratified_group", "stratified"))
    return empty


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def reasons(images: cache.Images) -> list[str]:
    said = []
    for i in range(len(images)):
        try:
            images[i]
            said.append("")
        except DamagedImage as damaged:
            said.append(damaged.reason)
    return said


def test_cache_loader_and_check_agree(laid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [*NAMES, *PACKED]
    expected = [str(outcome(data, 32, "stretch", 1, "x")) for data in NAMES.values()] * 2
    expected = ["" if text.startswith("(") else text for text in expected]
    assert [bool(text) for text in expected] == [False, True, True, True, True] * 2
    assert reasons(cache.open_images(config(), names, progress=False)) == expected
    assert reasons(cache.open_images(config("data.cache=false"), names, progress=False)) == expected
    capsys.readouterr()
    faults = check.run(config(experiment="base"))
    printed = capsys.readouterr().out
    assert len(faults) == 8  # an image once, whichever rows list it
    for line, name in enumerate(names, 2):
        (found,) = [f.line for f in faults if f"image {name}: " in f.what] or [""]
        assert found == (f"data/raw/train.csv:{line}: image {name}: {expected[line - 2]}" if expected[line - 2] else "")  # fmt: skip
    warned = sum(text.startswith(decode.WARNED) for text in expected)
    assert f"{warned} of them are JPEGs that libjpeg warns about" in printed and "pixels: {lenient: true}" in printed  # fmt: skip


def test_check_counts_and_lists_what_lenient_accepts(laid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declared = laid / "configs" / "competition.yaml"
    declared.write_text(declared.read_text() + "pixels: {lenient: true}\n")
    names = [*NAMES, *PACKED]
    taken = [not text for text in reasons(cache.open_images(config(), names, progress=False))]
    for _ in range(2):  # the second reads what the first remembered
        capsys.readouterr()
        faults = check.run(config(experiment="base"))
        printed = capsys.readouterr().out.splitlines()
        assert len(faults) == taken.count(False)
        warned = [line for line in printed if line.startswith("note: ") and decode.WARNED in line]
        assert len(warned) == taken.count(True) - 2, "all that is taken but the two whole ones"
        assert any(f"{len(warned)} JPEGs that libjpeg warns about are used" in line for line in printed)
        assert any("data/raw/train.csv:3: image train/cut.jpg: " in line for line in warned)


def test_in_a_kernel_damaged_images_get_the_mean_of_the_labels(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """comp predict --kernel uses the same decoder for a hidden set, and lists the rows with damaged
    images."""
    from comp.engine.deliver import kernel

    cfg = config(experiment="base")
    bundle = kernel.build("exp001") / "bundle"
    raw = trained / "data" / "raw"
    files = sorted((raw / "test").glob("*.png"))[:3]
    for file, data in zip(files, (WHOLE["grey"], BROKEN["grey, cut in the middle"], BROKEN["grey, 2,000 zeros"]), strict=True):  # fmt: skip
        file.write_bytes(data)
    home = cfg.competition.model_copy(update={"raw": str(raw)})
    monkeypatch.setenv("COMP_ROOT", str(bundle))
    paths.root.cache_clear()
    about = artifacts.read_json(bundle / "bundle.json")
    heads = tuple(kernel_inputs.head_of(each) for each in about["heads"])
    hidden = kernel_inputs.test_rows(
        cfg.model_copy(update={"competition": home}), heads, about["multi_image"]
    )
    rows = hidden.positions("test")[:5]
    listed = [Path(names[0]).stem for names in hidden.frame["images"].iloc[rows]]
    _, damaged, _ = kernel_models.predict_runs(about, home, hidden, rows)
    assert {listed.index(file.stem) for file in files[1:]} == {rows.tolist().index(at) for at in damaged}
