"""The image cache gives the pixels of a fresh decode, whatever happens to files and processes."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import config
from PIL import Image

from comp import competition
from comp.engine import pages
from comp.engine.data import cache, image_reader
from comp.engine.errors import UserError
from comp.engine.readers import decode
from comp.engine.readers.arrays import DamagedImage
from comp.engine.store import paths

COUNT, CUT, COPY, GONE = (
    40,
    7,
    11,
    13,
)  # of the files below: one is cut off, one a copy of its predecessor, one missing


@pytest.fixture
def names(empty: Path) -> list[str]:
    return forty(empty)


def forty(empty: Path) -> list[str]:
    """Files of two kinds under data/raw/train."""
    (empty / "data/raw/train").mkdir(parents=True)
    random = np.random.default_rng(0)
    names = [f"train/{i:02}.{'jpg' if i % 2 else 'png'}" for i in range(COUNT)]
    for name in names:
        pixels = np.kron(random.integers(0, 256, (6, 9, 3), np.uint8), np.ones((10, 10, 1), np.uint8))
        Image.fromarray(pixels).save(empty / "data/raw" / name)
    raw(names[CUT]).write_bytes(raw(names[CUT]).read_bytes()[:-50])
    raw(names[COPY]).write_bytes(raw(names[COPY - 1]).read_bytes())
    raw(names[GONE]).unlink()
    return names


def raw(name: str) -> Path:
    return paths.path("data", "raw", name)


def opened(names: list[str], *overrides: str, **more: Any) -> cache.Images:
    return cache.open_images(config(*overrides), names, progress=False, **more)


def cached(names: list[str], *overrides: str) -> cache.CachedImages:
    images = opened(names, *overrides)
    assert isinstance(images, cache.CachedImages)
    return images


def seen(images: cache.Images) -> list[bytes | str]:
    """The bytes of every image, or why it is damaged."""
    out: list[bytes | str] = []
    for i in range(len(images)):
        try:
            out.append(images[i].tobytes())
        except DamagedImage as damaged:
            out.append(str(damaged))
    return out


def folder() -> Path:
    (only,) = paths.path("data", "cache").iterdir()
    return only


def bytes_of(folder: Path) -> dict[str, str]:
    """Without the journal, which may be left without effect if the kill comes after the manifest."""
    files = sorted(file for file in folder.iterdir() if not file.name.startswith((".lock", "journal")))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def child(code: str, names: list[str]) -> subprocess.Popen[str]:
    """A process that runs `code` and then opens the images."""
    script = f"""
import os, signal, sys
from pathlib import Path
from comp.engine.config import resolve
from comp.engine.data import cache
from comp.engine.store import artifacts, paths
cache.COMMIT, cache.CHUNK = 4, 2
{code}
images = cache.open_images(resolve.load(paths.root(), "exp001").config, {names!r}, progress=False)
"""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", script], text=True, stdin=pipe, stdout=pipe, stderr=pipe)


@pytest.mark.parametrize("resize", ["stretch", "cover", "contain"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_pixels_with_and_without_a_cache(names: list[str], resize: str, channels: int) -> None:
    knobs = [f"data.resize={resize}", f"data.channels={channels}"]
    direct = opened(names, *knobs, "data.cache=false")
    images = cached(names, *knobs)
    assert isinstance(direct, cache.UncachedImages) and len(images) == len(direct) == COUNT
    assert seen(images) == seen(direct) == seen(cached(names, *knobs))
    reasons = {i: text for i, text in enumerate(seen(images)) if isinstance(text, str)}
    assert reasons.keys() == {CUT, GONE}
    assert "cut off" in reasons[CUT] and "no such file" in reasons[GONE]
    assert (
        images[0].shape
        == {"stretch": (32, 32, channels), "cover": (32, 48, channels), "contain": (32, 32, channels)}[resize]
    )
    with pytest.raises(ValueError, match="read-only"):
        images[0][0, 0] = 0


def test_loader_processes_read_the_same(names: list[str]) -> None:
    images = cached(names)
    expected = seen(images)
    unpickled = pickle.loads(pickle.dumps(images))
    assert seen(unpickled) == expected
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, hashlib.sha256(repr(seen(images)).encode()).digest())
        os._exit(0)
    assert os.read(reader, 99) == hashlib.sha256(repr(expected).encode()).digest()


def test_what_is_pickled_for_a_loader_process_does_not_grow_with_names(names: list[str]) -> None:
    few, many = cached(names), cached(names * 50)
    assert len(pickle.dumps(many)) - len(pickle.dumps(few)) < COUNT * 49 * (4 + 40 * 1 / COUNT), (
        "four bytes an image, and the absent names"
    )


def test_views_stay_valid_when_mapped_pages_are_released(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache._Pages, "MAX_MAPPED", 2000)
    images = cached(names)
    views = [(i, images[i]) for i in range(COUNT) if i not in (CUT, GONE)]
    fresh = opened(names, "data.cache=false")
    assert all(np.array_equal(view, fresh[i]) for i, view in views)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded from here on."""
    decoded: list[str] = []
    original = decode.decode

    def counting(
        data: bytes, size: int | None, resize: decode.Resize, channels: int, name: str, *pixel_format: Any
    ) -> decode.Pixels:
        decoded.append(name)
        return original(data, size, resize, channels, name, *pixel_format)

    monkeypatch.setattr(decode, "decode", counting)
    return decoded


def test_only_new_and_changed_files_are_decoded(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = cached(names[:30])
    expected = seen(before)
    decoded = counted(monkeypatch)
    cached(names[:30])
    assert decoded == []
    assert seen(cached(names))[:30] == expected
    assert decoded.count(names[30]) == 1 and set(decoded) == set(names[30:])
    decoded.clear()

    os.utime(raw(names[3]), ns=(1, 1))  # touched: read again, not decoded
    raw(names[4]).write_bytes(raw(names[5]).read_bytes())  # another image
    raw(names[CUT]).write_bytes(raw(names[6]).read_bytes())  # whole now
    os.truncate(raw(names[8]), 60)  # damaged now
    now = seen(cached(names))
    assert set(decoded) == {names[8]}
    assert (now[3], now[4], now[CUT], now[9]) == (expected[3], expected[5], expected[6], expected[9])
    assert "cut off" in now[8]
    assert seen(before) == expected, "an open cache goes on with the index that it was opened with"
    assert now == seen(opened(names, "data.cache=false"))


def test_a_cut_file_is_recorded_and_not_decoded_again(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(names)
    decoded = counted(monkeypatch)
    with pytest.raises(DamagedImage, match=names[CUT]):
        cached(names)[CUT]
    assert decoded == []


def test_every_size_and_every_version_of_the_hook_has_its_own_folder(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(*overrides: str) -> str:
        return image_reader.from_config(config(*overrides)).key

    keys = {
        key(),
        key("data.size=40"),
        key("data.resize=cover"),
        key("data.channels=3"),
        key("competition.raw=data"),
    }
    assert len(keys) == 5
    assert key("data.size=40") == key("data.cache_scale=1.25"), "the same pixels are not stored twice"
    assert key("augment.recipe=none") == key()
    monkeypatch.setattr(decode, "DECODER", "2")
    keys.add(key())
    for brightness in (1, 2):
        keys.add(
            hooked(
                monkeypatch,
                f"BRIGHTER = {brightness}\n"
                "def load_image(row, decode):\n    return decode(row['image']) + BRIGHTER\n",
                key,
            )
        )
    assert len(keys) == 8


def hooked(monkeypatch: pytest.MonkeyPatch, code: str, then: Callable[[], Any]) -> Any:
    """The result of `then` while competition.py has this code."""
    file = Path(paths.path(f"competition_{hashlib.sha256(code.encode()).hexdigest()[:8]}.py"))
    file.write_text("import numpy as np\n" + code)
    space: dict[str, Any] = {"__name__": competition.__name__}
    exec(compile(file.read_text(), str(file), "exec"), space)
    with monkeypatch.context() as patch:
        patch.setattr(competition, "load_image", space["load_image"], raising=False)
        return then()


def test_load_image_decides_the_pixels(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cached(names)[0]
    negative = "def load_image(row, decode):\n    return 255 - decode(row['image'])\n"
    assert np.array_equal(hooked(monkeypatch, negative, lambda: cached(names))[0], 255 - plain)
    whole = (
        "def load_image(row, decode):\n    assert row['file'].is_file()\n"
        "    return decode(row['image'], full=True)[:30]\n"
    )
    assert hooked(monkeypatch, whole, lambda: cached(names[:1])[0].shape) == plain.shape, "resized afterwards"
    wrong = "def load_image(row, decode):\n    return decode(row['image']) / 255\n"
    with pytest.raises(UserError, match=r"load_image returned float64 .* for train/00.png") as caught:
        hooked(monkeypatch, wrong, lambda: cached(names))
    assert caught.value.code == "load-image-invalid" and "a uint8 array" in caught.value.remedy
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="load_image must be a plain function"),
    ):
        patch.setattr(
            competition, "load_image", functools.partial(lambda extra, row, decode: None, 1), raising=False
        )
        opened(names)
    failing = "def load_image(row, decode):\n    return np.load(row['image'] + '.npy')\n"
    with pytest.raises(
        UserError, match=r"comp/competition.py:3: load_image fails for train/00.png: FileNotFoundError: "
    ):
        hooked(monkeypatch, failing, lambda: cached(names))
    assert pages.get("load_image") is None
