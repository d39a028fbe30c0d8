"""The decoder: complete images by the same rules for every format, or an error with the file."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Callable
from typing import Any, get_args

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from comp.engine.readers import decode
from comp.engine.readers.arrays import DamagedImage
from comp.engine.readers.decode import Resize

Pixels = NDArray[np.uint8]
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL"
)  # which Pillow sends along with a broken file


def photograph(height: int, width: int, seed: int = 0) -> Pixels:
    """Noise whose energy falls with frequency, as in nature, and one hard edge."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectra = [np.fft.rfft2(random.standard_normal((height, width))) / frequency**1.5 for _ in range(4)]
    light, *colours = (np.fft.irfft2(spectrum, (height, width)) for spectrum in spectra)
    image = np.stack([light / light.std() * 40 + colour / colour.std() * 12 + 120 for colour in colours], -1)
    image[height // 3 : height // 2, width // 4 :] += 40
    return np.clip(image, 0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


LENIENT = decode.arrays.PixelFormat(lenient=True)
IMAGE = photograph(90, 120)
COLOUR = Image.fromarray(IMAGE)
GREY = COLOUR.convert("L")
DEEP = (IMAGE[:, :, 0].astype(np.uint16) << 8) + 77  # the low byte is not lost by rounding up
PALETTE = COLOUR.quantize(64)
ROTATED = COLOUR.rotate(90, expand=True)

# kind -> (bytes, the pixels that must come back; None where the kind loses some)
KINDS: dict[str, tuple[bytes, Pixels | None]] = {
    "jpeg": (encoded(COLOUR, "JPEG", quality=95), None),
    "jpeg progressive": (encoded(COLOUR, "JPEG", progressive=True, quality=95), None),
    "jpeg 4:4:4": (encoded(COLOUR, "JPEG", subsampling=0), None),
    "jpeg grey": (encoded(GREY, "JPEG"), None),
    "jpeg cmyk": (encoded(COLOUR.convert("CMYK"), "JPEG", quality=95), None),
    "jpeg restarts": (cv2.imencode(".jpg", IMAGE[:, :, ::-1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 4])[1].tobytes(), None),
    "jpeg thumbnail": (b"\xff\xd8\xff\xe1\x00\x0aExif\0\0\xff\xd9" + encoded(COLOUR, "JPEG", quality=95)[2:], None),
    "png": (encoded(COLOUR, "PNG"), IMAGE),
    "png grey": (encoded(GREY, "PNG"), np.asarray(GREY)),
    "png 1 bit": (encoded(GREY.convert("1"), "PNG"), np.asarray(GREY.convert("1")) * np.uint8(255)),
    "png palette": (encoded(PALETTE, "PNG", transparency=3), np.asarray(PALETTE.convert("RGB"))),
    "png alpha": (encoded(Image.fromarray(np.dstack([IMAGE, IMAGE[:, :, 1]])), "PNG"), IMAGE),
    "png grey alpha": (encoded(Image.merge("LA", [GREY, GREY]), "PNG"), np.asarray(GREY)),
    "png 16 bit": (cv2.imencode(".png", DEEP)[1].tobytes(), IMAGE[:, :, 0]),
    "png 16 bit colour": (cv2.imencode(".png", np.dstack([DEEP, DEEP // 2, DEEP // 3]))[1].tobytes(),
                          (np.dstack([DEEP // 3, DEEP // 2, DEEP]) >> 8).astype(np.uint8)),
    "gif": (encoded(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB"))),
    "gif of frames": (encoded(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]), np.asarray(PALETTE.convert("RGB"))),
    "webp": (encoded(COLOUR, "WEBP", quality=95), None),
    "webp lossless": (encoded(COLOUR, "WEBP", lossless=True), IMAGE),
    "webp of frames": (encoded(COLOUR, "WEBP", lossless=True, save_all=True, append_images=[ROTATED.resize(COLOUR.size)]), IMAGE),
    "tiff": (encoded(COLOUR, "TIFF"), IMAGE),
    "tiff lzw": (encoded(COLOUR, "TIFF", compression="tiff_lzw"), IMAGE),
    "tiff 16 bit": (cv2.imencode(".tiff", DEEP)[1].tobytes(), IMAGE[:, :, 0]),
    "tiff of pages": (encoded(COLOUR, "TIFF", save_all=True, append_images=[ROTATED]), IMAGE),
    "bmp": (encoded(COLOUR, "BMP"), IMAGE),
    "ppm": (encoded(COLOUR, "PPM"), IMAGE),
}  # fmt: skip


def whole(data: bytes, channels: int = 3) -> Pixels:
    return decode.decode(data, None, "stretch", channels, "x")


def away(a: NDArray[Any], b: NDArray[Any]) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_pixels_that_were_encoded(kind: str) -> None:
    data, expected = KINDS[kind]
    image = whole(data)
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    if expected is None:
        grey = np.repeat(np.asarray(GREY)[:, :, None], 3, 2)
        assert away(image, grey if "grey" in kind else IMAGE) < 4
    else:
        assert np.array_equal(image, np.broadcast_to(expected.reshape(90, 120, -1), (90, 120, 3)))
    assert away(whole(data, 1)[:, :, 0], cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_damaged_wherever_it_is_cut(kind: str) -> None:
    data, _ = KINDS[kind]
    random = np.random.default_rng(len(data))
    last = (
        len(KINDS["tiff"][0]) if kind == "tiff of pages" else len(data)
    )  # a complete first page is a complete image
    cuts = {*random.integers(1, last, 60).tolist(), 1, 2, 3, 8, last - 3, last - 2, last - 1}
    for cut in sorted(cuts):
        for size in (None, 32):
            with pytest.raises(DamagedImage, match=r"^some/file.jpg: "):
                decode.decode(data[:cut], size, "stretch", 3, "some/file.jpg")
                pytest.fail(f"{kind} cut after {cut} of {len(data)} bytes gave an image at size {size}")
    assert whole(data + b"\0" * 20).shape == (90, 120, 3), "bytes after the end of a file are no damage"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.split()[0] in ("jpeg", "png", "gif")])
def test_a_file_filled_up_with_zeros_is_damaged(kind: str) -> None:
    data, _ = KINDS[kind]
    for share in (0.2, 0.5, 0.9, 0.99):
        cut = data[: int(len(data) * share)]
        for size in (None, 32):
            with pytest.raises(DamagedImage):
                decode.decode(cut + bytes(len(data) - len(cut)), size, "stretch", 3, "x")
                pytest.fail(f"{share} of a {kind} gave an image at size {size}")


def test_a_flipped_bit_of_a_png_is_noticed_by_its_checksum() -> None:
    data = bytearray(KINDS["png"][0])
    random = np.random.default_rng(0)
    for position in [
        *random.integers(8, len(data), 50).tolist(),
        *random.integers(len(data) - 400, len(data), 50).tolist(),
    ]:
        flipped = data.copy()
        flipped[position] ^= 1 << position % 8
        with pytest.raises(DamagedImage):
            whole(bytes(flipped))


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + KINDS["png"][0][33:]
    )


NO_IMAGE = {
    "empty": (b"", "empty"),
    "text": (b"<html>404 not found</html>", "no image"),
    "zip": (b"PK\x03\x04" + bytes(range(200)), "no image"),
    "zeros": (bytes(5000), "no image"),
    "absurd png": (png_header(60000, 60000), "too many"),
    "absurd jpeg": (
        KINDS["jpeg"][0].replace(struct.pack(">HH", 90, 120), struct.pack(">HH", 65000, 65000), 1),
        "too many",
    ),
    "a line, covering": (encoded(Image.new("L", (20000, 1)), "PNG"), "too many"),
    "floating point": (encoded(Image.new("F", (9, 9)), "TIFF"), "load_image"),
    "32 bit": (encoded(Image.new("I", (9, 9), 70000), "TIFF"), "load_image"),
}


@pytest.mark.parametrize("what", NO_IMAGE)
def test_a_file_that_is_no_image_is_reported_with_the_reason(what: str) -> None:
    data, reason = NO_IMAGE[what]
    with pytest.raises(DamagedImage, match=f"^train/7.jpg: .*{reason}") as caught:
        decode.decode(data, 224, "cover", 3, "train/7.jpg")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.name, again.reason, str(again)) == (
        caught.value.name,
        caught.value.reason,
        str(caught.value),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_format_is_decoded_beyond_the_largest_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LARGEST", 90 * 120 - 1)
    with pytest.raises(DamagedImage, match="120 x 90 px are too many"):
        decode.decode(KINDS[kind][0], 8, "stretch", 3, "x")


def test_a_file_that_cannot_be_read_is_reported(tmp_path: Any) -> None:
    with pytest.raises(DamagedImage, match=r"^train/7.jpg: no such file"):
        decode.read(tmp_path / "7.jpg", "train/7.jpg")
    with pytest.raises(DamagedImage, match=r"^train: is a directory"):
        decode.read(tmp_path, "train")


ROTATIONS: dict[int, Callable[[Pixels], Pixels]] = {  # by EXIF number, from the stored to the upright image
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", ROTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotates_every_format_by_the_same_rule(
    kind: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    straight, turned = encoded(COLOUR, kind, **options), encoded(COLOUR, kind, exif=exif, **options)
    expected = ROTATIONS[orientation](whole(straight))
    assert np.array_equal(whole(turned), expected) and whole(turned).flags.c_contiguous
    for resize in get_args(Resize):
        small = decode.decode(turned, 24, resize, 3, "x")
        assert away(small, ROTATIONS[orientation](decode.decode(straight, 24, resize, 3, "x"))) < 0.5
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert np.array_equal(decode.decode(turned, None, "stretch", 3, "x", LENIENT), expected)


SHAPES = [(640, 640), (480, 640), (427, 639), (333, 500), (1001, 257)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_reduced_jpeg_is_close_to_a_full_decode_and_area_averaging(shape: tuple[int, int]) -> None:
    data = encoded(Image.fromarray(photograph(*shape)), "JPEG", quality=90)
    full, scaled = whole(data), 0
    for size in (24, 40, 64, 80, 100, 128, 160, 200, 224, 240):
        small = decode.decode(data, size, "stretch", 3, "x")
        assert away(small, cv2.resize(full, (size, size), interpolation=cv2.INTER_AREA)) <= 0.8, size
        scaled += not np.array_equal(small, cv2.resize(full, (size, size), interpolation=cv2.INTER_AREA))
    assert scaled >= 4, "none of these was decoded at a reduced scale"


@pytest.mark.parametrize("shape", [*SHAPES, (16, 16), (7, 5), (3, 100)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_pixels_are_the_same_with_and_without_simplejpeg(
    shape: tuple[int, int], channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it JPEGs are accepted with competition.pixels.lenient only."""
    pytest.importorskip("simplejpeg")
    image = Image.fromarray(photograph(*shape))
    options = (
        {"quality": 90},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"keep_rgb": True},
    )
    files = [encoded(image, "JPEG", **each) for each in options] + [encoded(image.convert("L"), "JPEG")]
    cases = [
        (data, size, resize) for data in files for size in (None, 8, 56, 100) for resize in get_args(Resize)
    ]
    fast = [decode.decode(data, size, resize, channels, "x") for data, size, resize in cases]
    monkeypatch.setattr(decode, "simplejpeg", None)
    for case, picture_with in zip(cases, fast, strict=True):
        without = decode.decode(case[0], case[1], case[2], channels, "x", LENIENT)
        assert np.array_equal(picture_with, without), case[1:]


@pytest.mark.parametrize("kind", ["jpeg", "png", "jpeg cmyk"])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize(kind: str, channels: int) -> None:
    data = KINDS[kind][0]  # 90 x 120
    for size in (8, 30, 45, 90, 200):
        shapes = {
            resize: decode.decode(data, size, resize, channels, "x").shape for resize in get_args(Resize)
        }
        assert shapes == {
            "stretch": (size, size, channels),
            "cover": (size, round(size * 120 / 90), channels),
            "contain": (size, size, channels),
        }
    padded = decode.decode(data, 60, "contain", channels, "x")
    assert not padded[:7].any() and not padded[53:].any(), "45 of 60 rows hold the image, the rest is black"
    assert padded[8:52].mean((1, 2)).min() > 20


def test_enlarging_is_smooth_and_keeps_the_content() -> None:
    ramp = np.repeat(np.linspace(0, 255, 32).astype(np.uint8)[None], 16, 0)
    data = encoded(Image.fromarray(ramp), "PNG")
    large = decode.decode(data, 128, "stretch", 1, "x")[:, :, 0].astype(int)
    assert (np.diff(large[0]) >= 0).all() and np.diff(large[0]).max() <= 6 and (large == large[0]).all()
    assert (
        away(decode.resize_image(large[:, :, None].astype(np.uint8), 32, "stretch", "x")[0, :, 0], ramp[0])
        < 2
    )


def test_a_jpeg_that_only_a_lenient_decoder_accepts() -> None:
    data = KINDS["jpeg"][0]
    scan = data.index(b"\xff\xda")
    odd = data[:scan] + b"\x12\x34\x56" + data[scan:]  # left behind by some cameras
    simplejpeg = pytest.importorskip("simplejpeg")
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(odd)
    for size in (None, 20):
        with pytest.raises(DamagedImage, match="extraneous"):
            decode.decode(odd, size, "stretch", 3, "x")
        assert np.array_equal(
            decode.decode(odd, size, "stretch", 3, "x", LENIENT), decode.decode(data, size, "stretch", 3, "x")
        )


def test_a_wrong_suffix_does_not_matter() -> None:
    assert np.array_equal(decode.decode(KINDS["png"][0], None, "stretch", 3, "really.jpg"), IMAGE)


def test_mutated_files_give_an_image_or_a_reason() -> None:
    random = np.random.default_rng(3)
    for kind, (data, _) in KINDS.items():
        for _ in range(12):
            mutated = bytearray(data)
            for position in random.integers(0, min(len(data), 400), 4).tolist():
                mutated[position] = int(random.integers(256))
            if random.random() < 0.5:
                start = int(random.integers(len(data)))
                mutated[start : start + 50] = random.bytes(int(random.integers(100)))
            try:
                image = decode.decode(bytes(mutated), 24, "stretch", 3, kind)
            except DamagedImage as damaged:
                assert damaged.name == kind and damaged.reason and "\n" not in str(damaged)
            else:
                assert image.shape == (24, 24, 3) and image.dtype == np.uint8
