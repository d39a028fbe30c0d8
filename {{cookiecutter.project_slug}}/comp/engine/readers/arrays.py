"""Decodes images that are arrays of numbers: .npy bytes, DICOM, and TIFF whose pages or bands are channels.

`competition.pixels.range: [low, high]` are the numbers that become 0 and the maximum. Without it, uint8 stays
as it is; of uint16 the high byte is used (as in PNG); DICOM uses the window in the file, otherwise its lowest
and highest pixel; any other dtype is an error.

`data.bit_depth` is 8, 16 (0 to 65535, lossless for 16 bit files), or 32 (floats, where 255 is the white of 8
bits; values are not clipped, and without a range they stay as they are).
"""

from __future__ import annotations

import io
import math
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from comp.engine.readers import records

Pixels = NDArray[Any]  # (height, width, channels), in the dtype of data.bit_depth
DTYPES: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.float32}
PHOTOMETRIC, SAMPLES_PER_PIXEL, EXTRA_SAMPLES = 262, 277, 338  # TIFF tags: 5 is CMYK; 1 and 2 are alpha
MAX_VALUE = {8: 255, 16: 65535, 32: 255}


class DamagedImage(Exception):
    """Raised for an image file that is truncated, empty, of an unknown format or too large."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[DamagedImage], tuple[str, str]]:
        return DamagedImage, (self.name, self.reason)


class PixelFormat(NamedTuple):
    """competition.pixels and data.bit_depth."""

    low: float | None = None
    high: float | None = None
    shape: tuple[int, ...] = ()
    bit_depth: int = 8
    lenient: bool = False  # accept JPEGs that libjpeg warns about


def decode_numeric(data: bytes, channels: int, pixel_format: PixelFormat, name: str) -> list[Pixels]:
    """One image (height, width, channels); None if the bytes are not an array but an ordinary image."""
    if data.startswith(b"\x93NUMPY"):
        return [_npy(data, channels, pixel_format, name)]
    if data[128:132] == b"DICM":
        return [_dicom(data, channels, pixel_format, name)]
    if channels > 1 and data[:4] in (b"II*\0", b"MM\0*"):
        image = _bands(data, channels, pixel_format, name)
        image = _pages(data, channels, pixel_format, name) if image is None else image
        return [] if image is None else [image]
    return []


def _npy(data: bytes, channels: int, pixel_format: PixelFormat, name: str) -> Pixels:
    try:
        array = records.from_npy(data)
    except ValueError as error:
        raise DamagedImage(name, f"no complete array ({str(error).splitlines()[0]})") from None
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if not np.issubdtype(array.dtype, np.number) or not array.size:
        raise DamagedImage(name, f"holds no numbers but {array.dtype} of shape {array.shape}")
    return levels(_layout(array, channels, pixel_format, name), pixel_format, name)


def _layout(array: NDArray[Any], channels: int, pixel_format: PixelFormat, name: str) -> NDArray[Any]:
    """Reorders the axes to (height, width, channels). A single channel is repeated `channels` times."""
    if array.ndim == 1:
        side = math.isqrt(array.size // channels)
        square = (side, side) if side * side == array.size else (side, side, channels)
        shape = pixel_format.shape or square
        if math.prod(shape) != array.size:
            raise DamagedImage(
                name, f"{array.size} numbers are no image of {shape}; set competition.pixels.shape"
            )
        array = array.reshape(shape)
    array = array.squeeze() if array.ndim > 3 else array
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise DamagedImage(name, f"an array of shape {array.shape} is no image")
    if array.shape[2] not in (1, channels) and (
        array.shape[0] in (1, channels) or array.shape[0] < min(array.shape[1:])
    ):
        array = array.transpose(1, 2, 0)
    return _to_channels(array, channels, name)


def _to_channels(array: NDArray[Any], channels: int, name: str) -> NDArray[Any]:
    if array.shape[2] == channels:
        return array
    if array.shape[2] == 1:
        return np.repeat(array, channels, axis=2)
    if channels == 1 and array.shape[2] == 3:
        return array @ np.array([[0.299], [0.587], [0.114]])
    raise DamagedImage(name, f"has {array.shape[2]} channels, and data.channels is {channels}")


def levels(array: NDArray[Any], pixel_format: PixelFormat, name: str) -> Pixels:
    if pixel_format.low is not None and pixel_format.high is not None:
        return _rescale(array, pixel_format.low, pixel_format.high, pixel_format.bit_depth)
    if array.dtype == np.uint8:
        return to_depth(array, pixel_format.bit_depth)
    if array.dtype == np.uint16 and pixel_format.bit_depth < 32:
        return np.ascontiguousarray(array) if pixel_format.bit_depth == 16 else (array >> 8).astype(np.uint8)
    if pixel_format.bit_depth == 32:
        if not np.isfinite(array).all():
            raise DamagedImage(
                name, "holds NaN or infinity; set competition.pixels.range, or replace them in load_image"
            )
        return np.ascontiguousarray(array, np.float32)
    low, high = np.nanmin(array), np.nanmax(array)
    if low >= 0 and high <= 255 and (array == np.rint(array)).all():
        # 8 bit gray levels, stored in a table or json as another dtype
        return to_depth(array.astype(np.uint8), pixel_format.bit_depth)
    raise DamagedImage(
        name,
        f"numbers from {low:g} to {high:g}; set competition.pixels.range, the numbers that become 0 and 255",
    )


def to_depth(image: NDArray[np.uint8], bit_depth: int) -> Pixels:
    """Converts an 8 bit image to `bit_depth`: 255 becomes the maximum."""
    return np.ascontiguousarray(image, DTYPES[bit_depth]) * DTYPES[bit_depth](MAX_VALUE[bit_depth] // 255)


def to_uint8(image: Pixels) -> NDArray[np.uint8]:
    """Converts an image of any bit depth to 8 bits, for plots."""
    if image.dtype == np.uint8:
        return image
    grey = image / 257 if image.dtype == np.uint16 else image
    return np.rint(np.clip(grey, 0, 255)).astype(np.uint8)


def _rescale(array: NDArray[Any], low: float, high: float, bit_depth: int) -> Pixels:
    share = (np.nan_to_num(array.astype(np.float64), nan=low) - low) / max(high - low, 1e-12)
    if bit_depth == 32:
        return (share * 255).astype(np.float32)
    return np.rint(np.clip(share, 0, 1) * MAX_VALUE[bit_depth]).astype(DTYPES[bit_depth])


def _dicom(data: bytes, channels: int, pixel_format: PixelFormat, name: str) -> Pixels:
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, convert_color_space
    except ImportError:
        raise DamagedImage(
            name, "is DICOM; pip install pydicom (the extra `dicom` of pyproject.toml)"
        ) from None
    try:
        file = pydicom.dcmread(io.BytesIO(data))
        photometric = str(file.PhotometricInterpretation)
        array = file.pixel_array
        if photometric.startswith("YBR"):
            array = convert_color_space(array, photometric, "RGB", per_frame=True)
        colour = int(file.SamplesPerPixel) == 3
        if not colour:
            array = apply_modality_lut(array, file)
    except Exception as error:  # pydicom and its decoders raise various exceptions
        if "missing dependencies" in str(error):
            syntax = file.file_meta.TransferSyntaxUID.name.partition(",")[0]
            raise DamagedImage(
                name,
                f"is DICOM compressed as {syntax}; pip install python-gdcm (the extra `dicom`)",
            ) from None
        raise DamagedImage(
            name, f"damaged DICOM, {str(error).splitlines()[0][:200] or type(error).__name__}"
        ) from None
    if array.ndim == (4 if colour else 3):  # frames are channels if there are as many, else the first counts
        array = np.moveaxis(array, 0, -1) if not colour and len(array) == channels else array[0]
    if not colour:
        low, high = _window(file, array, pixel_format)
        array = _rescale(array, low, high, pixel_format.bit_depth)
        if photometric == "MONOCHROME1":  # the lowest number is white
            array = DTYPES[pixel_format.bit_depth](MAX_VALUE[pixel_format.bit_depth]) - array
    elif array.dtype == np.uint8:
        array = to_depth(array, pixel_format.bit_depth)
    image = _to_channels(array[:, :, None] if array.ndim == 2 else array, channels, name)
    return image.astype(DTYPES[pixel_format.bit_depth])


def _window(file: Any, array: NDArray[Any], pixel_format: PixelFormat) -> tuple[float, float]:
    if pixel_format.low is not None and pixel_format.high is not None:
        return pixel_format.low, pixel_format.high
    centre, width = file.get("WindowCenter"), file.get("WindowWidth")
    if centre is None or width is None or file.get("VOILUTFunction", "LINEAR") == "SIGMOID":
        return float(array.min()), float(array.max())
    first = [float(value[0] if hasattr(value, "__len__") else value) for value in (centre, width)]
    return first[0] - first[1] / 2, first[0] + first[1] / 2


def _bands(data: bytes, channels: int, pixel_format: PixelFormat, name: str) -> Pixels | None:
    """Decodes a TIFF with bands besides gray, RGB and RGBA, such as near infrared, which Pillow drops or
    cannot open."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        stream = io.BytesIO(data)
        stream.seek(tags.next)
        tags.load(stream)
        bands, extra = int(tags.get(SAMPLES_PER_PIXEL, 1)), tags.get(EXTRA_SAMPLES, ())
    except Exception:  # Pillow raises anything for a damaged file; the decoder reports it
        return None
    usual = bands in (1, 3) or (bands == 4 and (set(extra) & {1, 2} or tags.get(PHOTOMETRIC) == 5))
    if usual or (bands < 5 and bands != channels):
        return None  # gray, RGB, RGBA, CMYK, or a fourth band that data.channels leaves out
    if bands != channels:
        raise DamagedImage(name, f"has {bands} bands, and data.channels is {channels}")
    if bands == 4:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if array is None or array.ndim != 3:
            raise DamagedImage(name, "damaged, its four bands cannot be decoded")
        return levels(cv2.cvtColor(array, cv2.COLOR_BGRA2RGBA), pixel_format, name)
    try:
        import tifffile
    except ImportError:
        raise DamagedImage(
            name, f"is TIFF of {bands} bands; pip install tifffile (the extra `tiff` of pyproject.toml)"
        ) from None
    try:
        array = tifffile.imread(io.BytesIO(data), key=0)
    except Exception as error:  # decoders raise various exceptions
        raise DamagedImage(
            name, f"damaged, {str(error).splitlines()[0][:200] or type(error).__name__}"
        ) from None
    planar = array.ndim == 3 and array.shape[2] != bands
    return levels(np.moveaxis(array, 0, -1) if planar else array, pixel_format, name)


def _pages(data: bytes, channels: int, pixel_format: PixelFormat, name: str) -> Pixels | None:
    """Decodes a TIFF with one gray page per channel; None for any other TIFF, which is an ordinary image."""
    try:
        with Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
            if getattr(image, "n_frames", 1) != channels or len(image.getbands()) != 1 or image.mode == "P":
                return None
            pages = []
            for number in range(channels):
                image.seek(number)
                pages.append(np.asarray(image))
    except Exception as error:  # Pillow raises anything for a damaged file
        raise DamagedImage(name, f"damaged, {str(error) or type(error).__name__}") from None
    if len({page.shape for page in pages}) > 1:
        raise DamagedImage(name, "its pages differ in size, so they cannot be channels")
    return levels(np.stack(pages, -1), pixel_format, name)
