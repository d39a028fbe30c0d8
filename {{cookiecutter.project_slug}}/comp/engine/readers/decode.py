"""From the bytes of an image file to pixels of 8 bits, or of data.bit_depth: one decoder for cache, training, inference and Kaggle.

JPEG is decoded at the smallest power-of-two scale that still covers the wanted size (the inverse cosine transform does it for
next to nothing) and area-resized from there: twice as fast as decoding every pixel first. Everything else is decoded whole.

Rules for every kind of file: RGB or grey, turned as EXIF says, alpha dropped, first frame or page, 16 bit becomes its high
byte (the same for all pictures: 12 bit in 16 comes out dark, and load_image of comp/competition.py is the place to window
it; with data.bit_depth: 16 both bytes), floating point refused (with data.bit_depth: 32 taken). A cut file is damaged even where a decoder would make half a picture of it.

So is a JPEG that libjpeg warns about: nothing else tells half a picture that ends in an end marker from a whole one. Of the three
decoders here only simplejpeg reports the warning (OpenCV prints it, Pillow drops it), so no JPEG is taken without simplejpeg.
competition.pixels.lenient: true takes such files as far as they decode.
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

DECODER = f"5, opencv {cv2.__version__}, pillow {PIL.__version__}"  # other pixels need another text: it is in every cache's key
LARGEST = 2**28  # pixels of a picture; 800 MB as RGB
# Named here, Pillow imports nothing else at the first picture of some thread, and opens nothing that can run a program.
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
# The smallest first. A JPEG decoded `scale` times smaller covers the wanted size if it has exactly that, or so many times
# that. With less to spare, its pixels straddle those wanted: 1.2 grey levels from a full decode to 224 px of 1024 px, not 0.3.
SCALES = {8: 2.5, 4: 2.0, 2: 1.33, 1: 0.0}
DEFAULT_FORMAT = arrays.PixelFormat()
WARNED = "libjpeg warns: "  # begins the reason where a lenient decoder makes a picture
ABSENT = (
    "is a JPEG, and without simplejpeg a damaged one cannot be told from a whole one: pip install simplejpeg, "
    "or say competition.pixels.lenient: true"
)
HOOK = "say how in load_image of comp/competition.py"

cv2.setNumThreads(0)  # many pictures at a time, each by one thread
Image.MAX_IMAGE_PIXELS = None  # _refuse_size is stricter about what it says and laxer about what it takes
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # what Photoshop writes beside the pixels is no reason to refuse them
warnings.filterwarnings("ignore", module="PIL")  # about palettes and metadata, once a picture
assert not ImageFile.LOAD_TRUNCATED_IMAGES


class _Decoded(NamedTuple):
    """A picture before it is turned. Of a JPEG it may be one `scale` times smaller than the file's height and width."""

    pixels: Pixels
    height: int
    width: int
    orientation: int = 1
    scale: int = 1


def read(file: Path | str, name: str) -> bytes:
    """Never cv2.imread: of a truncated file it gives a picture that is grey from the cut on."""
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
    """(height, width) from a file's header, None where that says nothing."""
    try:
        with Image.open(file, formats=KINDS) as image:
            return image.height, image.width
    except Exception:  # as in _pillow; whoever decodes it will say what is wrong
        return None


def decode(
    data: bytes,
    size: int | None,
    resize: Resize,
    channels: int,
    name: str,
    pixel_format: arrays.PixelFormat = DEFAULT_FORMAT,
) -> Pixels:
    """(height, width, channels). size None is the full picture; stretch: (size, size); cover: the shorter side is size;
    contain: the longer side is size, and black around it makes a square."""
    if not data:
        raise DamagedImage(name, "empty, no bytes")
    if numeric := arrays.decode_numeric(data, channels, pixel_format, name):
        made = _Decoded(numeric[0], *numeric[0].shape[:2])
    elif data.startswith(b"\xff\xd8\xff"):
        made = _jpeg(data, size, resize, channels, name, pixel_format.lenient)
    elif reason := formats.cut(data):
        raise DamagedImage(name, reason)
    elif pixel_format.bit_depth > 8 and (deep := _deep(data, channels, pixel_format, name)) is not None:
        made = _Decoded(deep, *deep.shape[:2])
    else:
        made = _pillow(data, channels, name)
    if made.pixels.dtype != arrays.DTYPES[pixel_format.bit_depth]:
        made = made._replace(pixels=arrays.to_depth(made.pixels, pixel_format.bit_depth))
    return _resized_made(made, size, resize, name)


def resize_image(picture: Pixels, size: int, resize: Resize, name: str) -> Pixels:
    """Any picture brought to size by the rule of decode."""
    return _resized_made(_Decoded(picture, picture.shape[0], picture.shape[1]), size, resize, name)


def _resized_made(made: _Decoded, size: int | None, resize: Resize, name: str) -> Pixels:
    if size is None:
        return _turned(made.pixels, made.orientation)
    height, width = _wanted(made.height, made.width, size, resize)
    _refuse_size(height, width, name)  # a line of pixels, covering
    picture = _turned(_resized(made, height, width), made.orientation)
    if resize != "contain" or height == width:
        return picture
    high, wide, channels = picture.shape
    square = np.zeros((size, size, channels), picture.dtype)
    top, left = (size - high) // 2, (size - wide) // 2
    square[top : top + high, left : left + wide] = picture
    return square


def _wanted(height: int, width: int, size: int, resize: Resize) -> tuple[int, int]:
    """Height and width to resize to. Turned or not yet: all three fits treat both sides alike."""
    if resize == "stretch":
        return size, size
    scale = size / (min if resize == "cover" else max)(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resized(made: _Decoded, height: int, width: int) -> Pixels:
    """Area where it shrinks, then cubic where it grows (Pillow's: OpenCV's rounds differently from version to version)."""
    picture, channels = made.pixels, made.pixels.shape[2]
    low, narrow = min(height, made.height), min(width, made.width)
    if picture.shape[:2] != (low, narrow):
        # The last row and column may stand for fewer than `scale` of the file's. Given factors instead of a size, OpenCV
        # takes exactly the file's share of them, and may add one more line of what is left.
        down, across = low * made.scale / made.height, narrow * made.scale / made.width
        parts = [
            cv2.resize(picture[:, :, at : at + 4], None, fx=across, fy=down, interpolation=cv2.INTER_AREA)
            for at in range(0, channels, 4)  # OpenCV knows four at most
        ]
        kept = [part[:low, :narrow].reshape(low, narrow, -1) for part in parts]
        wide = kept[0] if len(kept) == 1 else np.concatenate(kept, axis=2)
        picture = wide.astype(picture.dtype, copy=False)
    if (low, narrow) != (height, width):
        kind = picture.dtype
        fine = picture if kind == np.uint8 else picture.astype(np.float32)  # Pillow's 16 bit knows no cubic
        planes = [Image.fromarray(fine[:, :, channel]) for channel in range(channels)]
        larger = [plane.resize((width, height), Image.Resampling.BICUBIC) for plane in planes]
        picture = np.stack([np.asarray(plane) for plane in larger], -1)
        if kind == np.uint16:
            picture = np.rint(picture).clip(0, 65535)
        picture = picture.astype(kind, copy=False)
    return picture


def _turned(picture: Pixels, orientation: int) -> Pixels:
    """By EXIF's number: 1 to 4 keep the sides, 5 to 8 swap them."""
    if orientation > 4:
        picture = picture.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        picture = picture[::-1]
    if orientation in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    return np.ascontiguousarray(picture)


def _jpeg(data: bytes, size: int | None, resize: Resize, channels: int, name: str, lenient: bool) -> _Decoded:
    """At the smallest scale that covers the wanted size. libjpeg reads all of the file at every scale, so its warnings are the same."""
    header = formats.jpeg(data)
    if header is None:
        made = _pillow(data, channels, name)
        if lenient:
            return made
        raise DamagedImage(name, f"{WARNED}its header makes no sense")
    if header.cut:
        raise DamagedImage(name, header.cut)
    height, width = header.height, header.width
    _refuse_size(height, width, name)
    scale = 1
    if size is not None:
        high, wide = _wanted(height, width, size, resize)
        scale = next(
            s
            for s, spare in SCALES.items()
            if _covers(height, high, s, spare) and _covers(width, wide, s, spare)
        )
    reason = ABSENT
    if simplejpeg is not None:
        colours = "CMYK" if header.components == 4 else "RGB" if channels == 3 else "GRAY"
        high, wide = (-(-height // scale), -(-width // scale)) if scale > 1 else (0, 0)
        try:
            pixels = simplejpeg.decode_jpeg(data, colours, min_height=high, min_width=wide)
            if colours == "CMYK":
                pixels = _from_inks(pixels, channels, name)
            return _Decoded(pixels, height, width, header.orientation, scale)
        except ValueError as warning:
            reason = f"{WARNED}{str(warning).removeprefix('Corrupt JPEG data: ')}"
    pixels = _pillow(
        data, channels, name, scale
    ).pixels  # has the better reason where there is no picture at all
    if not lenient:
        raise DamagedImage(name, reason)
    return _Decoded(pixels, height, width, header.orientation, scale)


def _from_inks(inks: Pixels, channels: int, name: str) -> Pixels:
    """CMYK as Adobe stores it, 255 for no ink; Pillow reads every JPEG of four components so."""
    height, width = inks.shape[:2]
    return _uint8(Image.frombytes("CMYK", (width, height), inks.tobytes(), "raw", "CMYK;I"), channels, name)


def _covers(side: int, wanted: int, scale: int, spare: float) -> bool:
    return side == scale * wanted or side >= spare * scale * wanted


def _pillow(data: bytes, channels: int, name: str, scale: int = 1) -> _Decoded:
    """Every kind of file, and the JPEGs that are out of the ordinary. `scale` is heeded by JPEG alone."""
    try:
        with Image.open(io.BytesIO(data), formats=KINDS) as image:
            _refuse_size(image.height, image.width, name)
            image.draft("RGB" if channels == 3 else "L", (image.width // scale, image.height // scale))
            image.load()
            # Pillow turns TIFF by itself, and nothing else.
            orientation = 1 if image.format == "TIFF" else formats.exif_orientation(_exif(image))
            pixels = _uint8(image, channels, name)
            return _Decoded(pixels, pixels.shape[0], pixels.shape[1], orientation)
    except DamagedImage:
        raise
    except Image.UnidentifiedImageError:
        raise DamagedImage(name, f"no image: it begins with {data[:8]!r}") from None
    except Exception as error:  # Pillow meets broken files with any exception there is
        raise DamagedImage(name, f"broken, {str(error) or type(error).__name__}") from None


def _deep(data: bytes, channels: int, pixel_format: arrays.PixelFormat, name: str) -> Pixels | None:
    """More than 8 bits of PNG and TIFF: Pillow halves them, or does not know them. None: an ordinary picture."""
    if not (data[:8] == b"\x89PNG\r\n\x1a\n" and data[24] == 16) and data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    made = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if made is None or made.dtype == np.uint8:
        return None  # Pillow takes it, or says what is wrong
    height, width = made.shape[:2]
    _refuse_size(height, width, name)
    if made.ndim == 3:
        made = cv2.cvtColor(made, cv2.COLOR_BGRA2RGBA if made.shape[2] == 4 else cv2.COLOR_BGR2RGB)
        made = made[:, :, :3] if channels != 4 else made
    if pixel_format.bit_depth < 32 and made.dtype != np.uint16 and pixel_format.low is None:
        raise DamagedImage(
            name, f"pixels of {made.dtype} have no one way to 16 bit; take data.bit_depth: 32, or {HOOK}"
        )
    grey = made.reshape(height, width, -1).astype(np.float64) if channels == 1 and made.ndim == 3 else None
    if grey is not None:
        weighed = grey @ np.array([[0.299], [0.587], [0.114]])
        made = (np.rint(weighed) if made.dtype == np.uint16 else weighed).astype(made.dtype)
    made = made.reshape(height, width, -1)
    if made.shape[2] == 1 and channels > 1:
        made = np.repeat(made, channels, axis=2)
    if made.shape[2] != channels:
        raise DamagedImage(name, f"has {made.shape[2]} channels, and data.channels wants {channels}")
    return arrays.levels(made, pixel_format, name)


def _exif(image: Image.Image) -> bytes:
    block = image.info.get("exif", b"")
    return block.removeprefix(b"Exif\0\0") if isinstance(block, bytes) else b""


def _uint8(image: Image.Image, channels: int, name: str) -> Pixels:
    if image.mode == "F":
        raise DamagedImage(name, f"floating point pixels have no one way to uint8; {HOOK}")
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise DamagedImage(name, f"32 bit pixels have no one way to uint8; {HOOK}")
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    if channels == 3:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    if channels == 4:
        return np.asarray(image.convert("RGBA"))
    if channels != 1:
        raise DamagedImage(name, f"has {len(image.getbands())} channels, and data.channels wants {channels}")
    grey = image if image.mode in ("1", "L", "LA", "La") else image.convert("RGB")
    return np.asarray(grey.convert("L"))[:, :, None]


def _refuse_size(height: int, width: int, name: str) -> None:
    if height * width > LARGEST:
        raise DamagedImage(name, f"{width} x {height} px are absurdly many; {HOOK}")
