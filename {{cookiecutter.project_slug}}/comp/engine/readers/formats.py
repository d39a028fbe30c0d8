"""Reads the structure of an image file before any pixel is decoded: whether the file is complete, and its
orientation.

Decoders accept truncated files and return half an image, above all if zeros fill the rest, as after an
interrupted download. So the end of the file is checked here, and zeros inside a JPEG, which costs
microseconds. Flipped bits are not detected: only PNG has checksums, and Pillow does not check those of the
pixels.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

SEGMENT = struct.Struct(">BBH").unpack_from  # of a JPEG: 0xFF, marker, length without these two bytes
FRAME = struct.Struct(">HHB").unpack_from  # height, width, components
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a frame header
SEQUENTIAL = frozenset((0xC0, 0xC1))  # not progressive, Huffman coded
SCAN_ENDS = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # any marker but a restart
ZEROS = bytes(64)
WITHOUT_LENGTH = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))  # markers


class Jpeg(NamedTuple):
    height: int
    width: int
    components: int
    orientation: int
    fault: str  # empty, or why the file is not complete


def jpeg(data: bytes) -> Jpeg | None:
    """Reads the header before the first scan; None if it is invalid. Every decode calls it, so it must be
    fast."""
    position, last, orientation, frame = 2, len(data) - 10, 1, 0
    tables: list[int] = []
    size: tuple[int, int, int] | None = None
    while position < last:
        start, marker, length = SEGMENT(data, position)
        if start != 0xFF:
            position = data.find(b"\xff", position)
            if position < 0:
                break
        elif marker == 0xFF:  # padding
            position += 1
        elif marker in WITHOUT_LENGTH:
            position += 2
        elif marker == 0xDA:
            if size is None or min(size) == 0:
                return None
            # In the scan 0xFF is always followed by a zero. End markers before it belong to thumbnails.
            scan, fault = position + 2 + length, ""
            if data.rfind(b"\xff\xd9", scan) < 0:
                fault = "cut off, its end marker is missing"
            elif frame in SEQUENTIAL and (hole := data.find(ZEROS, scan)) >= 0:
                ends = SCAN_ENDS.search(data, scan)
                if (ends is None or hole < ends.start()) and not _zeros_are_flat(data, tables):
                    fault = "damaged, there are zeros in the middle of the image"
            return Jpeg(*size, orientation, fault)
        else:
            if marker in FRAMES:
                size, frame = FRAME(data, position + 5), marker
            elif marker == 0xC4:
                tables.append(position)
            elif marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
                orientation = exif_orientation(data[position + 10 : position + 2 + length])
            position += 2 + length
    return None


def _zeros_are_flat(data: bytes, tables: list[int]) -> bool:
    """Whether a run of zero bits can be a flat area of an image. It can if the code 0...0 of every AC table
    means "end of block". In the standard luminance table that code is a coefficient of -1, and 64 zero bytes
    are more than one block of them, which no camera writes. The check is needed because one file in eight
    with such a hole still has enough blocks, so that the decoder does not warn."""
    for position in tables:
        at, end = position + 4, position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        while at + 17 < end:
            if data[at] & 0x10 and data[at + 17] != 0x00:
                return False
            at += 17 + sum(data[at + 1 : at + 17])
    return True


def exif_orientation(tiff: bytes) -> int:
    """The EXIF orientation, 1 to 8: tag 274 of the first directory, or 1."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == 274:
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        pass  # an invalid EXIF block is ignored
    return 1


def fault(data: bytes) -> str:
    """Why a PNG, GIF or BMP is incomplete; empty if it is complete. For other truncated formats Pillow itself
    raises."""
    for start, check in CHECKS.items():
        if data.startswith(start):
            return check(data)
    return ""


def _png(data: bytes) -> str:
    position = 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            break
        # A lower case letter marks a chunk that a decoder may ignore.
        if kind[:1].isupper() and zlib.crc32(memoryview(data)[position + 4 : end - 4]) != int.from_bytes(
            data[end - 4 : end], "big"
        ):
            return f"damaged, the checksum of its {kind.decode('latin-1')} chunk differs"
        if kind == b"IEND":
            return ""
        position = end
    return "cut off, its IEND chunk is missing"


def _gif(data: bytes) -> str:
    """Checks all frames of a GIF: each is a chain of blocks of up to 255 bytes."""

    def table(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    try:
        position = 13 + table(data[10])
        while data[position] != 0x3B:
            if data[position] == 0:  # some encoders write an extra zero between blocks
                position += 1
                continue
            if data[position] == 0x2C:
                position += 11 + table(data[position + 9])
            elif data[position] == 0x21:
                position += 2
            else:
                return "damaged, no GIF block begins where one should"
            while data[position]:
                position += 1 + data[position]
            position += 1
    except IndexError:
        return "cut off, its last block is missing"
    return ""


def _bmp(data: bytes) -> str:
    """Checks the size of an uncompressed BMP: Pillow silently fills up to one row's padding. Pillow checks
    compressed files itself."""
    try:
        offset, header, width, height, _, depth, compression = struct.unpack_from("<IIiiHHI", data, 10)
    except struct.error:
        return "cut off in its header"
    if header < 40 or compression not in (0, 3):
        return ""
    row = abs(width) * depth
    # The last row may lack its padding.
    size = offset + (row + 31) // 32 * 4 * (abs(height) - 1) + (row + 7) // 8
    return "cut off, pixels are missing at its end" if len(data) < size else ""


CHECKS = {b"\x89PNG\r\n\x1a\n": _png, b"GIF8": _gif, b"BM": _bmp}
