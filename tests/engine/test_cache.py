"""The image cache: the pixels of a fresh decode, and whatever happens to files and processes, never other ones."""

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
from comp.engine.readers import decode as images
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
    pictures = opened(names, *overrides)
    assert isinstance(pictures, cache.CachedImages)
    return pictures


def seen(pictures: cache.Images) -> list[bytes | str]:
    """All pictures, or why not."""
    out: list[bytes | str] = []
    for i in range(len(pictures)):
        try:
            out.append(pictures[i].tobytes())
        except DamagedImage as damaged:
            out.append(str(damaged))
    return out


def folder() -> Path:
    (only,) = paths.path("data", "cache").iterdir()
    return only


def bytes_of(folder: Path) -> dict[str, str]:
    """A journal may stay behind when the kill comes after the manifest; nobody reads it."""
    files = sorted(file for file in folder.iterdir() if not file.name.startswith((".lock", "journal")))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def child(code: str, names: list[str]) -> subprocess.Popen[str]:
    """A process that opens the pictures, after `code`."""
    script = f"""
import os, signal, sys
from pathlib import Path
from comp.engine.config import resolve
from comp.engine.data import build_cache, cache, cache_index
from comp.engine.store import artifacts, paths
build_cache.COMMIT, build_cache.CHUNK = 4, 2
{code}
pictures = cache.open_images(resolve.load(paths.root(), "exp001").config, {names!r}, progress=False)
"""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", script], text=True, stdin=pipe, stdout=pipe, stderr=pipe)


@pytest.mark.parametrize("fit", ["stretch", "cover", "contain"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_pixels_with_and_without_a_cache(names: list[str], fit: str, channels: int) -> None:
    knobs = [f"data.resize={fit}", f"data.channels={channels}"]
    direct = opened(names, *knobs, "data.cache=false")
    pictures = cached(names, *knobs)
    assert isinstance(direct, cache.UncachedImages) and len(pictures) == len(direct) == COUNT
    assert seen(pictures) == seen(direct) == seen(cached(names, *knobs))
    reasons = {i: text for i, text in enumerate(seen(pictures)) if isinstance(text, str)}
    assert reasons.keys() == {CUT, GONE}
    assert "cut off" in reasons[CUT] and "no such file" in reasons[GONE]
    assert (
        pictures[0].shape
        == {"stretch": (32, 32, channels), "cover": (32, 48, channels), "contain": (32, 32, channels)}[fit]
    )
    with pytest.raises(ValueError, match="read-only"):
        pictures[0][0, 0] = 0


def test_loader_processes_read_the_same(names: list[str]) -> None:
    pictures = cached(names)
    expected = seen(pictures)
    travelled = pickle.loads(pickle.dumps(pictures))
    assert seen(travelled) == expected
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, hashlib.sha256(repr(seen(pictures)).encode()).digest())
        os._exit(0)
    assert os.read(reader, 99) == hashlib.sha256(repr(expected).encode()).digest()


def test_what_travels_to_a_loader_process_does_not_grow_with_names(names: list[str]) -> None:
    few, many = cached(names), cached(names * 50)
    assert len(pickle.dumps(many)) - len(pickle.dumps(few)) < COUNT * 49 * (4 + 40 * 1 / COUNT), (
        "four bytes a picture, and the absent"
    )


def test_views_stay_right_when_mapped_pages_are_given_back(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache._Pages, "KEEP", 2000)
    pictures = cached(names)
    views = [(i, pictures[i]) for i in range(COUNT) if i not in (CUT, GONE)]
    fresh = opened(names, "data.cache=false")
    assert all(np.array_equal(view, fresh[i]) for i, view in views)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded from here on."""
    decoded: list[str] = []
    decode = images.decode

    def counting(
        data: bytes, size: int | None, fit: images.Resize, channels: int, name: str, *numbers: Any
    ) -> images.Pixels:
        decoded.append(name)
        return decode(data, size, fit, channels, name, *numbers)

    monkeypatch.setattr(images, "decode", counting)
    return decoded


def test_only_what_is_new_or_has_changed_is_decoded(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cached(names[:30])
    expected = seen(before)
    decoded = counted(monkeypatch)
    cached(names[:30])
    assert decoded == []
    assert seen(cached(names))[:30] == expected
    assert decoded.count(names[30]) == 1 and set(decoded) == set(names[30:])
    decoded.clear()

    os.utime(raw(names[3]), ns=(1, 1))  # touched: read again, not decoded
    raw(names[4]).write_bytes(raw(names[5]).read_bytes())  # another picture
    raw(names[CUT]).write_bytes(raw(names[6]).read_bytes())  # whole now
    os.truncate(raw(names[8]), 60)  # damaged now
    now = seen(cached(names))
    assert set(decoded) == {names[8]}
    assert (now[3], now[4], now[CUT], now[9]) == (expected[3], expected[5], expected[6], expected[9])
    assert "cut off" in now[8]
    assert seen(before) == expected, "who has the cache open goes on reading what it was opened with"
    assert now == seen(opened(names, "data.cache=false"))


def test_a_cut_file_is_noted_and_not_decoded_again(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cached(names)
    decoded = counted(monkeypatch)
    with pytest.raises(DamagedImage, match=names[CUT]):
        cached(names)[CUT]
    assert decoded == []


def test_every_size_has_its_own_folder_and_so_has_every_version_of_the_hook(
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
    assert key("data.size=40") == key("data.cache_scale=1.25"), "the same pixels are not kept twice"
    assert key("augment.recipe=none") == key()
    monkeypatch.setattr(images, "DECODER", "2")
    keys.add(key())
    for brightness in (1, 2):
        keys.add(
            hooked(
                monkeypatch,
                f"BRIGHTER = {brightness}\ndef load_image(row, decode):\n    return decode(row['image']) + BRIGHTER\n",
                key,
            )
        )
    assert len(keys) == 8


def hooked(monkeypatch: pytest.MonkeyPatch, code: str, then: Callable[[], Any]) -> Any:
    """What `then` gives while competition.py holds this code."""
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
    whole = "def load_image(row, decode):\n    assert row['file'].is_file()\n    return decode(row['image'], full=True)[:30]\n"
    assert hooked(monkeypatch, whole, lambda: cached(names[:1])[0].shape) == plain.shape, (
        "brought to size afterwards"
    )
    wrong = "def load_image(row, decode):\n    return decode(row['image']) / 255\n"
    with pytest.raises(UserError, match=r"load_image gave float64 .* for train/00.png; a uint8 array"):
        hooked(monkeypatch, wrong, lambda: cached(names))
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
