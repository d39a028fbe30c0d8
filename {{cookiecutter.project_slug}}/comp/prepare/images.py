"""From the bytes of an image file to uint8 pixels: one decoder for cache, training, inference and Kaggle.

JPEG is decoded at the smallest power-of-two scale that still covers the wanted size (the inverse DCT does it for next to
nothing), then area-resized: 2.4 times as fast as decoding everything. Rules that hold for every kind of file: RGB or grey,
turned as EXIF says, alpha dropped, first frame or page, 16 bit becomes its high byte.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageFile

Pixels = NDArray[np.uint8]
Fit = Literal["stretch", "cover", "contain"]

DECODER = f"1 opencv {cv2.__version__} pillow {PIL.__version__}"  # another number, other pixels: part of every cache key
LARGEST = 2**28  # pixels; 800 MB as RGB
KINDS = ("PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG", "MPO", "JPEG2000", "PPM")

cv2.setNumThreads(0)  # pictures are decoded in parallel, never one picture by several threads
Image.MAX_IMAGE_PIXELS = None  # `_refuse_size` does it, with a reason
assert not ImageFile.LOAD_TRUNCATED_IMAGES


class Damaged(Exception):
    """An image file that gives no whole picture: truncated, empty, foreign or absurdly large."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[Damaged], tuple[str, str]]:
        return Damaged, (self.name, self.reason)


def read(file: Path | str, name: str = "") -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read()
    except OSError as error:
        raise Damaged(name or str(file), (error.strerror or str(error)).lower()) from None


def shape(file: Path) -> tuple[int, int] | None:
    """(height, width) from a file's header, None where that says nothing."""
    try:
        with Image.open(file, formats=KINDS) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError):
        return None


def decode(data: bytes, size: int | None, fit: Fit, channels: int, name: str) -> Pixels:
    """(height, width, channels). size None is the full picture. stretch: (size, size); cover: the shorter side is size;
    contain: the longer side is size, padded with black to a square."""
    if not data:
        raise Damaged(name, "empty, no bytes")
    if data[:3] == b"\xff\xd8\xff":
        picture = _jpeg(data, size, fit, channels, name)
    else:
        picture = _pillow(data, channels, name)
    return fitted(picture, size, fit)


def fitted(picture: Pixels, size: int | None, fit: Fit) -> Pixels:
    """Any picture brought to size by the one rule; nothing to do is nothing done."""
    if picture.ndim == 2:
        picture = picture[:, :, None]
    if size is None:
        return np.ascontiguousarray(picture)
    height, width = wanted(picture.shape[0], picture.shape[1], size, fit)
    picture = _resized(picture, height, width)
    if fit == "contain" and height != width:
        square = np.zeros((size, size, picture.shape[2]), np.uint8)
        top, left = (size - height) // 2, (size - width) // 2
        square[top : top + height, left : left + width] = picture
        return square
    return np.ascontiguousarray(picture)


def wanted(height: int, width: int, size: int, fit: Fit) -> tuple[int, int]:
    if fit == "stretch":
        return size, size
    scale = size / (min if fit == "cover" else max)(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resized(picture: Pixels, height: int, width: int) -> Pixels:
    """Area where it shrinks, cubic where it grows: each direction by itself, since area does not know how to grow."""
    channels = picture.shape[2]
    for shape, better in (
        ((min(height, picture.shape[0]), min(width, picture.shape[1])), cv2.INTER_AREA),
        ((height, width), cv2.INTER_CUBIC),
    ):
        if picture.shape[:2] != shape:
            picture = cv2.resize(picture, (shape[1], shape[0]), interpolation=better).reshape(
                *shape, channels
            )
    return picture


class _Header(NamedTuple):
    height: int
    width: int
    components: int
    orientation: int
    complete: bool


def _jpeg(data: bytes, size: int | None, fit: Fit, channels: int, name: str) -> Pixels:
    header = _jpeg_header(data)
    if header is None:
        return _pillow(data, channels, name)
    _refuse_size(header.height, header.width, name)
    if not header.complete:
        raise Damaged(name, "truncated, a JPEG without its end")
    if header.components not in (1, 3):
        return _pillow(data, channels, name)
    height, width = header.height, header.width
    if header.orientation > 4:
        height, width = width, height
    scale = 1
    if size is not None:
        high, wide = wanted(height, width, size, fit)
        while scale < 8 and -(-height // (2 * scale)) >= high and -(-width // (2 * scale)) >= wide:
            scale *= 2
    reduced = {1: 0, 2: 16, 4: 32, 8: 64}[scale]
    # The names IMREAD_REDUCED_COLOR_x hold the BGR bit, which OpenCV 5 refuses beside the RGB bit.
    flags = (
        reduced
        | (cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE)
        | cv2.IMREAD_IGNORE_ORIENTATION
    )
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        picture = None
    if picture is None:
        return _pillow(data, channels, name)
    return _turned(
        picture.reshape(*picture.shape[:2], channels).astype(np.uint8, copy=False), header.orientation
    )


def _jpeg_header(data: bytes) -> _Header | None:
    """Walks the segments up to the first scan; None where they make no sense to it."""
    position, orientation = 2, 1
    size: tuple[int, int, int] | None = None
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 4 > len(data):
            return None
        marker = data[position + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            position += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if position + 10 > len(data):
                return None
            height, width, components = struct.unpack_from(">HHB", data, position + 5)
            size = (height, width, components)
        elif marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _orientation(data[position + 10 : position + 2 + length])
        elif marker == 0xDA:
            if size is None or 0 in size:
                return None
            return _Header(*size, orientation, data.find(b"\xff\xd9", position) >= 0)
        position += 2 + length


def _orientation(tiff: bytes) -> int:
    """Tag 274 of the first directory of an EXIF block, 1 where there is none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == 274:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # a broken EXIF block turns nothing
    return 1


def _turned(picture: Pixels, orientation: int) -> Pixels:
    if orientation > 4:
        picture = picture.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        picture = picture[::-1]
    if orientation in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    return np.ascontiguousarray(picture)


def _pillow(data: bytes, channels: int, name: str) -> Pixels:
    """Everything but plain JPEG, and the JPEGs that OpenCV does not take."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=KINDS) as image:
            warnings.simplefilter("ignore")
            _refuse_size(image.height, image.width, name)
            image.load()
            orientation = (
                1
                if image.format == "TIFF"
                else _orientation(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))
            )
            return _turned(_uint8(image, channels, name), orientation)
    except Damaged:
        raise
    except Image.UnidentifiedImageError:
        raise Damaged(name, "not an image of a known kind") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        TypeError,
        KeyError,
        struct.error,
    ) as error:
        raise Damaged(name, f"truncated or broken ({str(error) or type(error).__name__})") from None


def _uint8(image: Image.Image, channels: int, name: str) -> Pixels:
    if image.mode == "F":
        raise Damaged(
            name,
            "floating point pixels have no one way to uint8; say it in load_image of comp/competition.py",
        )
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise Damaged(
                name, "32 bit pixels have no one way to uint8; say it in load_image of comp/competition.py"
            )
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    if channels == 1 and image.mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("L"))[:, :, None]
    colour = np.asarray(image.convert("RGB"))
    return (
        colour
        if channels == 3
        else cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY)[:, :, None].astype(np.uint8, copy=False)
    )


def _refuse_size(height: int, width: int, name: str) -> None:
    if height * width > LARGEST:
        raise Damaged(
            name,
            f"{width} x {height} px is absurdly large; cut it up, or read it in load_image of comp/competition.py",
        )
