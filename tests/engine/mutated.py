"""Valid and damaged image files of 14 kinds, each a function (number) -> File. The same number gives the same
bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

ENCODINGS: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 90},
    "JPEG progressive": {"quality": 85, "progressive": True},
    "PNG": {},
    "GIF": {},
    "WEBP": {"quality": 80},
    "WEBP lossless": {"lossless": True},
    "TIFF": {"compression": "tiff_lzw"},
    "BMP": {},
}
SUFFIX = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp"}


class File(NamedTuple):
    data: bytes
    suffix: str
    bad: bool | None  # None: nobody can know, so what counts is that an independent decoder agrees


def scene(number: int) -> np.ndarray:
    """Smooth, so that decoders differ by rounding alone: (height, width, 3)."""
    random = np.random.default_rng(number)
    height, width = random.integers(40, 90, 2)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / random.uniform(6, 20) + y / random.uniform(6, 20) + c) for c in range(3)]
    return (127 + 100 * np.stack(waves, -1)).astype(np.uint8)


def encoded(number: int, kinds: tuple[str, ...] = tuple(ENCODINGS)) -> tuple[bytes, str]:
    kind = kinds[number % len(kinds)]
    out = io.BytesIO()
    Image.fromarray(scene(number)).save(out, kind.split()[0], **ENCODINGS[kind])
    return out.getvalue(), SUFFIX[kind.split()[0]]


def truncated(number: int) -> File:
    data, suffix = encoded(number)
    return File(data[: int(len(data) * np.random.default_rng(number).uniform(0.05, 0.98))], suffix, True)


def last_bytes_missing(number: int) -> File:
    """One to three; of a BMP more, since its last are padding, and without them it is whole."""
    data, suffix = encoded(number)
    return File(data[: -1 - number % 3 - 3 * (suffix == "bmp")], suffix, True)


def zeros_at_the_end(number: int) -> File:
    """An interrupted download into a file of full size. Left out for uncompressed formats, where the damage
    cannot be detected."""
    data, suffix = encoded(number, ("JPEG", "JPEG progressive", "PNG", "GIF"))
    length = int(len(data) * np.random.default_rng(number).uniform(0.3, 0.95))
    return File(data[:length] + bytes(len(data) - length), suffix, True)


def empty(number: int) -> File:
    return File(b"", encoded(number)[1], True)


def foreign(number: int) -> File:
    other = [
        b"<!DOCTYPE html><title>403</title>",
        b"PK\3\4 a zip",
        b"%PDF-1.7 a page",
        b"\0" * 500,
        b"version https://git-lfs",
    ]
    return File(other[number % len(other)], encoded(number)[1], True)


def noise(number: int) -> File:
    return File(np.random.default_rng(number).bytes(20 + number % 3000), encoded(number)[1], True)


def absurdly_large(number: int) -> File:
    """The header says 60,000 x 60,000 px."""
    side = 60_000
    if number % 2:
        head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
        body = b"".join(
            struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d))
            for kind, d in chunks
        )
        return File(b"\x89PNG\r\n\x1a\n" + body, "png", True)
    data = bytearray(encoded(0)[0])
    at = data.find(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return File(bytes(data), "jpg", True)


def checksum(number: int) -> File:
    """One bit of a PNG's pixels or header flipped: its checksum knows."""
    data = bytearray(encoded(number, ("PNG",))[0])
    start = data.find(b"IHDR") if number % 2 else data.find(b"IDAT")
    data[start + 4 + number % 12] ^= 1 << number % 8
    return File(bytes(data), "png", True)


def flipped_bit(number: int) -> File:
    data, suffix = encoded(number)
    changed = bytearray(data)
    changed[int(np.random.default_rng(number).integers(2, len(data)))] ^= 1 << number % 8
    return File(bytes(changed), suffix, None)


def wrong_suffix(number: int) -> File:
    data, suffix = encoded(number)
    return File(data, "png" if suffix == "jpg" else "jpg", False)


def turned(number: int) -> File:
    exif = Image.Exif()
    exif[274] = 1 + number % 8
    out = io.BytesIO()
    Image.fromarray(scene(number)).save(out, "JPEG", quality=90, exif=exif)
    return File(out.getvalue(), "jpg", False)


def more_after_the_end(number: int) -> File:
    data, suffix = encoded(number, ("JPEG", "PNG", "GIF", "BMP"))
    return File(data + np.random.default_rng(number).bytes(1 + number % 200), suffix, False)


def other_modes(number: int) -> File:
    """Grey, palette, transparent palette, alpha, one bit."""
    image, out = Image.fromarray(scene(number)), io.BytesIO()
    mode = ("L", "P", "P transparent", "RGBA", "LA", "1")[number % 6]
    more: dict[str, object] = {"transparency": 3} if "transparent" in mode else {}
    image.convert(mode.split()[0]).save(out, "PNG", **more)
    return File(out.getvalue(), "png", False)


def sixteen_bits(number: int) -> File:
    deep = scene(number)[:, :, 0].astype(np.uint16) * 257
    out = io.BytesIO()
    Image.fromarray(deep).save(out, "PNG" if number % 2 else "TIFF")
    return File(out.getvalue(), "png" if number % 2 else "tif", False)


KINDS: tuple[Callable[[int], File], ...] = (
    truncated, last_bytes_missing, zeros_at_the_end, empty, foreign, noise, absurdly_large, checksum,
    flipped_bit, wrong_suffix, turned, more_after_the_end, other_modes, sixteen_bits,
)  # fmt: skip
