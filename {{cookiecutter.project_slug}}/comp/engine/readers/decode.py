"""Decodes the bytes of an image file. The cache, training, inference and Kaggle kernels use this decoder.

A JPEG is decoded at the smallest power-of-two scale that covers the target size, which the inverse cosine
transform does at almost no cost, and area-resized from there: twice as fast as decoding every pixel first.
Other formats are decoded in full.

Rules for every format:
- RGB or gray, rotated by the EXIF orientation, without alpha, the first frame or page.
- 16 bits: the high byte, or both bytes with data.bit_depth: 16. All images are treated alike, so 12 bits
  stored in 16 become dark; apply a window to them in load_image of comp/competition.py.
- Floats: only with data.bit_depth: 32.
- A truncated file is damaged, even if a decoder returns half an image.
- A JPEG that libjpeg warns about is damaged: half an image with an end marker is recognized by the warning
  alone. Only simplejpeg reports it (OpenCV prints it, Pillow drops it), so JPEGs need simplejpeg.
  competition.pixels.lenient: true accepts such files as far as they decode.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import PIL
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from comp.engine.readers import arrays, containers, formats
from comp.engine.readers.arrays import DamagedImage

try:
    import simplejpeg
except ImportError:  # Kaggle's image lacks it: comp kernel packs it
    simplejpeg = None

Pixels = arrays.Pixels
Resize = Literal["stretch", "cover", "contain"]

# Part of every cache key: change it when the decoded pixels change.
DECODER = f"5, opencv {cv2.__version__}, pillow {PIL.__version__}"
LARGEST = 2**28  # pixels; 800 MB as RGB
# Pillow may open these formats only: no plugin is imported in the first thread that decodes, and none that
# runs an external program.
PLUGINS = (
    JpegImagePlugin,
    PngImagePlugin,
    GifImagePlugin,
    WebPImagePlugin,
    TiffImagePlugin,
    BmpImagePlugin,
    PpmImagePlugin,
    Jpeg2KImagePlugin,
)
KINDS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000")
# scale -> margin, smallest image first. A JPEG decoded `scale` times smaller is used if it has exactly the
# target size, or `margin` times as much. With a smaller margin its pixels straddle those of the target: from
# 1024 to 224 px the mean difference to a full decode is 1.2 gray levels instead of 0.3.
SCALES = {8: 2.5, 4: 2.0, 2: 1.33, 1: 0.0}
DEFAULT_FORMAT = arrays.PixelFormat()
WARNED = "libjpeg warns: "  # begins the reasons that competition.pixels.lenient overrides
NO_SIMPLEJPEG = (
    "is a JPEG, and without simplejpeg a damaged one is not recognized; pip install simplejpeg, "
    "or set competition.pixels.lenient: true"
)
HOOK = "convert them in load_image of comp/competition.py"

cv2.setNumThreads(0)  # many images are decoded at a time, in a thread each
Image.MAX_IMAGE_PIXELS = None  # _validate_size has its own limit
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # Photoshop writes long text chunks
warnings.filterwarnings("ignore", module="PIL")  # warnings about palettes and metadata, for every image
assert not ImageFile.LOAD_TRUNCATED_IMAGES


class _Decoded(NamedTuple):
    """A decoded image before EXIF rotation. `height` and `width` are those of the file; the pixels of a JPEG
    may be `scale` times smaller."""

    pixels: Pixels
    height: int
    width: int
    orientation: int = 1
    scale: int = 1


def read(file: Path | str, name: str) -> bytes:
    """Not by cv2.imread, which returns an image for a truncated file, gray from the cut on."""
    try:
        with open(file, "rb") as opened:
            return opened.read()
    except NotADirectoryError:  # a member of an archive
        pass
    except OSError as error:
        raise DamagedImage(name, (error.strerror or str(error)).lower()) from None
    try:
        return containers.read(Path(file))
    except OSError as error:
        raise DamagedImage(name, (error.strerror or str(error)).lower()) from None


def shape(file: Path) -> tuple[int, int] | None:
    """(height, width) from a file's header; None if it cannot be read."""
    try:
        with Image.open(file, formats=KINDS) as image:
            return image.height, image.width
    except Exception:  # as in _pillow; the decoder reports it
        return None


def decode(
    data: bytes,
    size: int | None,
    resize: Resize,
    channels: int,
    name: str,
    pixel_format: arrays.PixelFormat = DEFAULT_FORMAT,
) -> Pixels:
    """Returns (height, width, channels). `size`: None is the full image. `resize`: stretch to (size, size);
    cover: the shorter side becomes size; contain: the longer side becomes size, padded with black to a
    square."""
    if not data:
        raise DamagedImage(name, "empty, no bytes")
    if numeric := arrays.decode_numeric(data, channels, pixel_format, name):
        decoded = _Decoded(numeric[0], *numeric[0].shape[:2])
    elif data.startswith(b"\xff\xd8\xff"):
        decoded = _jpeg(data, size, resize, channels, name, pixel_format.lenient)
    elif reason := formats.fault(data):
        raise DamagedImage(name, reason)
    elif pixel_format.bit_depth > 8 and (deep := _deep(data, channels, pixel_format, name)) is not None:
        decoded = _Decoded(deep, *deep.shape[:2])
    else:
        decoded = _pillow(data, channels, name)
    if decoded.pixels.dtype != arrays.DTYPES[pixel_format.bit_depth]:
        decoded = decoded._replace(pixels=arrays.to_depth(decoded.pixels, pixel_format.bit_depth))
    return _to_size(decoded, size, resize, name)


def resize_image(image: Pixels, size: int, resize: Resize, name: str) -> Pixels:
    """Resizes an array by the rules of `decode`."""
    return _to_size(_Decoded(image, image.shape[0], image.shape[1]), size, resize, name)


def _to_size(decoded: _Decoded, size: int | None, resize: Resize, name: str) -> Pixels:
    if size is None:
        return _rotate(decoded.pixels, decoded.orientation)
    height, width = _target_shape(decoded.height, decoded.width, size, resize)
    _validate_size(height, width, name)  # with resize=cover, one line of pixels becomes huge
    image = _rotate(_resized(decoded, height, width), decoded.orientation)
    if resize != "contain" or height == width:
        return image
    height, width, channels = image.shape  # after rotation
    square = np.zeros((size, size, channels), image.dtype)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _target_shape(height: int, width: int, size: int, resize: Resize) -> tuple[int, int]:
    """Height and width after resizing; correct before and after rotation, as no rule depends on the side."""
    if resize == "stretch":
        return size, size
    scale = size / (min if resize == "cover" else max)(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resized(decoded: _Decoded, height: int, width: int) -> Pixels:
    """Averages the area of a side that shrinks, then enlarges by bicubic interpolation (Pillow's, since the
    rounding of OpenCV's depends on its version)."""
    image, channels = decoded.pixels, decoded.pixels.shape[2]
    low, narrow = min(height, decoded.height), min(width, decoded.width)
    if image.shape[:2] != (low, narrow):
        # The last row and column may stand for fewer than `scale` of the file's. With factors instead of a
        # size OpenCV weighs them by their share, and may append a line of the rest, which is cut off.
        down, across = low * decoded.scale / decoded.height, narrow * decoded.scale / decoded.width
        parts = [
            cv2.resize(image[:, :, at : at + 4], None, fx=across, fy=down, interpolation=cv2.INTER_AREA)
            for at in range(0, channels, 4)  # OpenCV takes four channels at most
        ]
        parts = [part[:low, :narrow].reshape(low, narrow, -1) for part in parts]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        image = joined.astype(image.dtype, copy=False)
    if (low, narrow) != (height, width):
        dtype = image.dtype
        source = image if dtype == np.uint8 else image.astype(np.float32)  # Pillow has no bicubic of 16 bits
        planes = [Image.fromarray(source[:, :, channel]) for channel in range(channels)]
        larger = [plane.resize((width, height), Image.Resampling.BICUBIC) for plane in planes]
        image = np.stack([np.asarray(plane) for plane in larger], -1)
        if dtype == np.uint16:
            image = np.rint(image).clip(0, 65535)
        image = image.astype(dtype, copy=False)
    return image


def _rotate(image: Pixels, orientation: int) -> Pixels:
    """Rotates by the EXIF orientation, 1 to 8; 5 to 8 swap height and width."""
    if orientation > 4:
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _jpeg(data: bytes, size: int | None, resize: Resize, channels: int, name: str, lenient: bool) -> _Decoded:
    """Decodes a JPEG at the smallest scale that covers the target size. libjpeg reads the whole file at every
    scale, so the warnings are the same."""
    header = formats.jpeg(data)
    if header is None:
        decoded = _pillow(data, channels, name)
        if lenient:
            return decoded
        raise DamagedImage(name, f"{WARNED}its header is invalid")
    if header.fault:
        raise DamagedImage(name, header.fault)
    height, width = header.height, header.width
    _validate_size(height, width, name)
    scale = 1
    if size is not None:
        high, wide = _target_shape(height, width, size, resize)
        scale = next(
            s
            for s, margin in SCALES.items()
            if _covers(height, high, s, margin) and _covers(width, wide, s, margin)
        )
    reason = NO_SIMPLEJPEG
    if simplejpeg is not None:
        colours = "CMYK" if header.components == 4 else "RGB" if channels == 3 else "GRAY"
        high, wide = (-(-height // scale), -(-width // scale)) if scale > 1 else (0, 0)
        try:
            pixels = simplejpeg.decode_jpeg(data, colours, min_height=high, min_width=wide)
            if colours == "CMYK":
                pixels = _from_cmyk(pixels, channels, name)
            return _Decoded(pixels, height, width, header.orientation, scale)
        except ValueError as warning:
            reason = f"{WARNED}{str(warning).removeprefix('Corrupt JPEG data: ')}"
    # If nothing can be decoded, Pillow's message is clearer.
    pixels = _pillow(data, channels, name, scale).pixels
    if not lenient:
        raise DamagedImage(name, reason)
    return _Decoded(pixels, height, width, header.orientation, scale)


def _from_cmyk(cmyk: Pixels, channels: int, name: str) -> Pixels:
    """Decodes a CMYK JPEG as inverted (255 is no ink), like Adobe's, which Pillow assumes for all of them."""
    height, width = cmyk.shape[:2]
    return _uint8(Image.frombytes("CMYK", (width, height), cmyk.tobytes(), "raw", "CMYK;I"), channels, name)


def _covers(side: int, target: int, scale: int, margin: float) -> bool:
    return side == scale * target or side >= margin * scale * target


def _pillow(data: bytes, channels: int, name: str, scale: int = 1) -> _Decoded:
    """Decodes every other format, and unusual JPEGs. `scale` has an effect on JPEGs only."""
    try:
        with Image.open(io.BytesIO(data), formats=KINDS) as image:
            _validate_size(image.height, image.width, name)
            image.draft("RGB" if channels == 3 else "L", (image.width // scale, image.height // scale))
            image.load()
            # Pillow rotates TIFF by itself, and nothing else.
            orientation = 1 if image.format == "TIFF" else formats.exif_orientation(_exif(image))
            pixels = _uint8(image, channels, name)
            return _Decoded(pixels, pixels.shape[0], pixels.shape[1], orientation)
    except DamagedImage:
        raise
    except Image.UnidentifiedImageError:
        raise DamagedImage(name, f"is no image: it begins with {data[:8]!r}") from None
    except Exception as error:  # Pillow raises anything for a damaged file
        raise DamagedImage(name, f"damaged, {str(error) or type(error).__name__}") from None


def _deep(data: bytes, channels: int, pixel_format: arrays.PixelFormat, name: str) -> Pixels | None:
    """Decodes PNG and TIFF of more than 8 bits, which Pillow reduces or cannot read. None for all others."""
    if not (data[:8] == b"\x89PNG\r\n\x1a\n" and data[24] == 16) and data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype == np.uint8:
        return None  # Pillow decodes it, or reports what is wrong
    height, width = image.shape[:2]
    _validate_size(height, width, name)
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGB)
        image = image[:, :, :3] if channels != 4 else image
    if pixel_format.bit_depth < 32 and image.dtype != np.uint16 and pixel_format.low is None:
        raise DamagedImage(
            name,
            f"pixels of {image.dtype} do not convert to 16 bits; set data.bit_depth: 32, or {HOOK}",
        )
    grey = image.reshape(height, width, -1).astype(np.float64) if channels == 1 and image.ndim == 3 else None
    if grey is not None:
        luma = grey @ np.array([[0.299], [0.587], [0.114]])
        image = (np.rint(luma) if image.dtype == np.uint16 else luma).astype(image.dtype)
    image = image.reshape(height, width, -1)
    if image.shape[2] == 1 and channels > 1:
        image = np.repeat(image, channels, axis=2)
    if image.shape[2] != channels:
        raise DamagedImage(name, f"has {image.shape[2]} channels, and data.channels is {channels}")
    return arrays.levels(image, pixel_format, name)


def _exif(image: Image.Image) -> bytes:
    block = image.info.get("exif", b"")
    return block.removeprefix(b"Exif\0\0") if isinstance(block, bytes) else b""


def _uint8(image: Image.Image, channels: int, name: str) -> Pixels:
    if image.mode == "F":
        raise DamagedImage(name, f"floating point pixels do not convert to uint8; {HOOK}")
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise DamagedImage(name, f"32 bit pixels do not convert to uint8; {HOOK}")
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    if channels == 3:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    if channels == 4:
        return np.asarray(image.convert("RGBA"))
    if channels != 1:
        raise DamagedImage(name, f"has {len(image.getbands())} channels, and data.channels is {channels}")
    grey = image if image.mode in ("1", "L", "LA", "La") else image.convert("RGB")
    return np.asarray(grey.convert("L"))[:, :, None]


def _validate_size(height: int, width: int, name: str) -> None:
    if height * width > LARGEST:
        raise DamagedImage(
            name, f"{width} x {height} px are too many; reduce them in load_image of comp/competition.py"
        )
