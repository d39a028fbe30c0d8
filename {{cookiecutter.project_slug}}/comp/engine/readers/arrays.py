"""Pictures that are pixel_format: .npy bytes, DICOM, and TIFF whose pages or bands are channels, to grey levels by a rule that one declares.

`competition.pixels.range: [low, high]` says which numbers become 0 and the brightest level. Without it: uint8 as it is, uint16 its
high byte (as in PNG), DICOM by the window that stands in the file, else from its lowest to its highest pixel; anything else is
refused.

`data.bit_depth` says how fine the levels are: 8 bits, 16 (0 to 65535, so that 16 bit files stay whole), or 32 (floating point in units
of 8 bits; nothing is cut off at the ends, and without a range numbers stay as they are).
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

Pixels = NDArray[Any]  # (height, width, channels), in the kind of data.bit_depth
DTYPES: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.float32}
PHOTOMETRIC, SAMPLES_PER_PIXEL, EXTRA_SAMPLES = 262, 277, 338  # TIFF tags: 5 is CMYK; 1 and 2 are alpha
MAX_VALUE = {8: 255, 16: 65535, 32: 255}


class DamagedImage(Exception):
    """An image file that gives no whole picture: truncated, empty, foreign or absurdly large."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[DamagedImage], tuple[str, str]]:
        return DamagedImage, (self.name, self.reason)


class PixelFormat(NamedTuple):
    """What competition.pixels says, and data.bit_depth."""

    low: float | None = None
    high: float | None = None
    shape: tuple[int, ...] = ()
    bit_depth: int = 8
    lenient: bool = False  # JPEGs that libjpeg warns about are taken as far as they decode


def decode_numeric(data: bytes, channels: int, pixel_format: PixelFormat, name: str) -> list[Pixels]:
    """One picture (height, width, channels), or nothing where these bytes are an ordinary image."""
    if data.startswith(b"\x93NUMPY"):
        return [_npy(data, channels, pixel_format, name)]
    if data[128:132] == b"DICM":
        return [_dicom(data, channels, pixel_format, name)]
    if channels > 1 and data[:4] in (b"II*\0", b"MM\0*"):
        made = _bands(data, channels, pixel_format, name)
        made = _stack(data, channels, pixel_format, name) if made is None else made
        return [] if made is None else [made]
    return []


def _npy(data: bytes, channels: int, pixel_format: PixelFormat, name: str) -> Pixels:
    try:
        array = records.from_npy(data)
    except ValueError as error:
        raise DamagedImage(name, f"no whole array ({str(error).splitlines()[0]})") from None
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if not np.issubdtype(array.dtype, np.number) or not array.size:
        raise DamagedImage(name, f"holds no numbers but {array.dtype} of shape {array.shape}")
    return levels(_layout(array, channels, pixel_format, name), pixel_format, name)


def _layout(array: NDArray[Any], channels: int, pixel_format: PixelFormat, name: str) -> NDArray[Any]:
    """(height, width, channels), whichever way round it is stored; one channel is repeated where more are wanted."""
    if array.ndim == 1:
        side = math.isqrt(array.size // channels)
        square = (side, side) if side * side == array.size else (side, side, channels)
        shape = pixel_format.shape or square
        if math.prod(shape) != array.size:
            raise DamagedImage(
                name, f"{array.size} numbers are no picture of {shape}; competition.pixels.shape says which"
            )
        array = array.reshape(shape)
    array = array.squeeze() if array.ndim > 3 else array
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise DamagedImage(name, f"an array of shape {array.shape} is no picture")
    if array.shape[2] not in (1, channels) and (
        array.shape[0] in (1, channels) or array.shape[0] < min(array.shape[1:])
    ):
        array = array.transpose(1, 2, 0)
    return _wanted(array, channels, name)


def _wanted(array: NDArray[Any], channels: int, name: str) -> NDArray[Any]:
    if array.shape[2] == channels:
        return array
    if array.shape[2] == 1:
        return np.repeat(array, channels, axis=2)
    if channels == 1 and array.shape[2] == 3:
        return array @ np.array([[0.299], [0.587], [0.114]])
    raise DamagedImage(name, f"has {array.shape[2]} channels, and data.channels wants {channels}")


def levels(array: NDArray[Any], pixel_format: PixelFormat, name: str) -> Pixels:
    if pixel_format.low is not None and pixel_format.high is not None:
        return _between(array, pixel_format.low, pixel_format.high, pixel_format.bit_depth)
    if array.dtype == np.uint8:
        return to_depth(array, pixel_format.bit_depth)
    if array.dtype == np.uint16 and pixel_format.bit_depth < 32:
        return np.ascontiguousarray(array) if pixel_format.bit_depth == 16 else (array >> 8).astype(np.uint8)
    if pixel_format.bit_depth == 32:
        if not np.isfinite(array).all():
            raise DamagedImage(
                name, "holds NaN or infinity; say competition.pixels.range, or mend it in load_image"
            )
        return np.ascontiguousarray(array, np.float32)
    low, high = np.nanmin(array), np.nanmax(array)
    if low >= 0 and high <= 255 and (array == np.rint(array)).all():
        # grey levels that a table or json carries as other numbers
        return to_depth(array.astype(np.uint8), pixel_format.bit_depth)
    raise DamagedImage(
        name, f"numbers from {low:g} to {high:g}: say competition.pixels.range, what becomes 0 and 255"
    )


def to_depth(picture: NDArray[np.uint8], depth: int) -> Pixels:
    """8 bits in another depth: 255 stays the brightest."""
    return np.ascontiguousarray(picture, DTYPES[depth]) * DTYPES[depth](MAX_VALUE[depth] // 255)


def to_uint8(picture: Pixels) -> NDArray[np.uint8]:
    """8 bits of any depth, for a person to look at."""
    if picture.dtype == np.uint8:
        return picture
    grey = picture / 257 if picture.dtype == np.uint16 else picture
    return np.rint(np.clip(grey, 0, 255)).astype(np.uint8)


def _between(array: NDArray[Any], low: float, high: float, depth: int) -> Pixels:
    share = (np.nan_to_num(array.astype(np.float64), nan=low) - low) / max(high - low, 1e-12)
    if depth == 32:
        return (share * 255).astype(np.float32)
    return np.rint(np.clip(share, 0, 1) * MAX_VALUE[depth]).astype(DTYPES[depth])


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
        meaning = str(file.PhotometricInterpretation)
        array = file.pixel_array
        if meaning.startswith("YBR"):
            array = convert_color_space(array, meaning, "RGB", per_frame=True)
        colour = int(file.SamplesPerPixel) == 3
        if not colour:
            array = apply_modality_lut(array, file)
    except Exception as error:  # pydicom and its decoders raise whatever they meet
        if "missing dependencies" in str(error):
            kind = file.file_meta.TransferSyntaxUID.name.partition(",")[0]
            raise DamagedImage(
                name,
                f"is DICOM compressed as {kind}; pip install python-gdcm (the extra `dicom` of pyproject.toml)",
            ) from None
        raise DamagedImage(
            name, f"broken DICOM, {str(error).splitlines()[0][:200] or type(error).__name__}"
        ) from None
    if array.ndim == (4 if colour else 3):  # frames: channels where their number fits, else the first
        array = np.moveaxis(array, 0, -1) if not colour and len(array) == channels else array[0]
    if not colour:
        low, high = _window(file, array, pixel_format)
        array = _between(array, low, high, pixel_format.bit_depth)
        if meaning == "MONOCHROME1":  # the lowest number is the brightest
            array = DTYPES[pixel_format.bit_depth](MAX_VALUE[pixel_format.bit_depth]) - array
    elif array.dtype == np.uint8:
        array = to_depth(array, pixel_format.bit_depth)
    wanted = _wanted(array[:, :, None] if array.ndim == 2 else array, channels, name)
    return wanted.astype(DTYPES[pixel_format.bit_depth])


def _window(file: Any, array: NDArray[Any], pixel_format: PixelFormat) -> tuple[float, float]:
    if pixel_format.low is not None and pixel_format.high is not None:
        return pixel_format.low, pixel_format.high
    centre, width = file.get("WindowCenter"), file.get("WindowWidth")
    if centre is None or width is None or file.get("VOILUTFunction", "LINEAR") == "SIGMOID":
        return float(array.min()), float(array.max())
    first = [float(value[0] if hasattr(value, "__len__") else value) for value in (centre, width)]
    return first[0] - first[1] / 2, first[0] + first[1] / 2


def _bands(data: bytes, channels: int, pixel_format: PixelFormat, name: str) -> Pixels | None:
    """A TIFF with other bands than grey, RGB and RGBA in each pixel, like near infrared: Pillow drops those, or takes none."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        stream = io.BytesIO(data)
        stream.seek(tags.next)
        tags.load(stream)
        bands, extra = int(tags.get(SAMPLES_PER_PIXEL, 1)), tags.get(EXTRA_SAMPLES, ())
    except Exception:  # Pillow meets broken files with any exception; whoever decodes it says what is wrong
        return None
    usual = bands in (1, 3) or (bands == 4 and (set(extra) & {1, 2} or tags.get(PHOTOMETRIC) == 5))
    if usual or (bands < 5 and bands != channels):
        return None  # grey, RGB, RGBA, CMYK, or a fourth band that is not wanted
    if bands != channels:
        raise DamagedImage(name, f"has {bands} bands, and data.channels wants {channels}")
    if bands == 4:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if array is None or array.ndim != 3:
            raise DamagedImage(name, "broken, its four bands cannot be decoded")
        return levels(cv2.cvtColor(array, cv2.COLOR_BGRA2RGBA), pixel_format, name)
    try:
        import tifffile
    except ImportError:
        raise DamagedImage(
            name, f"is TIFF of {bands} bands; pip install tifffile (the extra `tiff` of pyproject.toml)"
        ) from None
    try:
        array = tifffile.imread(io.BytesIO(data), key=0)
    except Exception as error:  # as of every decoder here
        raise DamagedImage(
            name, f"broken, {str(error).splitlines()[0][:200] or type(error).__name__}"
        ) from None
    planar = array.ndim == 3 and array.shape[2] != bands
    return levels(np.moveaxis(array, 0, -1) if planar else array, pixel_format, name)


def _stack(data: bytes, channels: int, pixel_format: PixelFormat, name: str) -> Pixels | None:
    """Pages of one grey band each, as many as channels are wanted; any other TIFF is an ordinary picture."""
    try:
        with Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
            if getattr(image, "n_frames", 1) != channels or len(image.getbands()) != 1 or image.mode == "P":
                return None
            pages = []
            for number in range(channels):
                image.seek(number)
                pages.append(np.asarray(image))
    except Exception as error:  # as for every other picture: Pillow meets broken files with any exception
        raise DamagedImage(name, f"broken, {str(error) or type(error).__name__}") from None
    if len({page.shape for page in pages}) > 1:
        raise DamagedImage(name, "its pages differ in size, so they cannot be channels")
    return levels(np.stack(pages, -1), pixel_format, name)
