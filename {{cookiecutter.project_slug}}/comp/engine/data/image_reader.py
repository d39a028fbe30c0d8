"""Reads the image of a sample: decodes and resizes the file, or calls load_image of competition.py."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine import pages
from comp.engine.config.schema import Config
from comp.engine.data import image_key
from comp.engine.errors import UserError
from comp.engine.readers import containers, decode
from comp.engine.readers.arrays import DTYPES, DamagedImage, PixelFormat
from comp.engine.readers.decode import Pixels, Resize
from comp.engine.store import artifacts, paths


def content_hash(data: bytes) -> str:
    """Hash of the bytes of a file, for the index of a cache and to compare files."""
    return hashlib.sha256(data).hexdigest()[:32]


@dataclass(frozen=True)
class ImageReader:
    """Everything that determines the pixels of an image except the bytes of its file."""

    raw: str
    size: int
    resize: Resize
    channels: int
    pixel_format: PixelFormat = decode.DEFAULT_FORMAT

    @cached_property
    def key(self) -> str:
        """Name of the cache folder: a hash of all settings that change pixels."""
        hook = pages.get("load_image")
        return artifacts.digest(
            [
                self.raw,
                self.size,
                self.resize,
                self.channels,
                list(self.pixel_format),
                decode.DECODER,
                _source(hook) if hook else None,
            ]
        )

    @property
    def dtype(self) -> Any:
        """The dtype of a pixel, by data.bit_depth."""
        return DTYPES[self.pixel_format.bit_depth]

    @property
    def uses_hook(self) -> bool:
        return pages.get("load_image") is not None

    @cached_property
    def folder(self) -> str:
        return os.fspath(paths.path(self.raw))

    def file(self, name: str) -> Path:
        return Path(self.folder, image_key.paths(name))

    def stamp(self, name: str) -> tuple[int, int]:
        """Size and mtime of a file or a member of an archive, to detect changes. -1, -1 if it does not
        exist."""
        if image_key.CHANNELS in name:
            return self._member_stamp(name)
        try:
            status = os.stat(f"{self.folder}/{name}")
        except OSError:
            return self._member_stamp(name)
        return status.st_size, status.st_mtime_ns

    def stamps(self, names: Sequence[str]) -> NDArray[np.int64]:
        """(files, 2): the stamp of each file. Takes two to four seconds for a million files."""
        return np.fromiter((n for name in names for n in self.stamp(name)), np.int64, 2 * len(names)).reshape(
            -1, 2
        )

    def _member_stamp(self, name: str) -> tuple[int, int]:
        parts = [containers.stat(self.file(part)) for part in image_key.files(name)]
        existing = [part for part in parts if part is not None]
        if len(existing) < len(parts):
            return -1, -1
        return sum(size for size, _ in existing), max(mtime for _, mtime in existing)

    def read(self, name: str) -> bytes:
        """The bytes of the file, or of all files of an image one after the other."""
        return b"".join(decode.read(self.file(part), part) for part in image_key.files(name))

    def image(self, name: str, data: bytes | None = None) -> Pixels:
        """(height, width, channels), resized. `data`: the bytes of the file if they are read already."""
        hook = pages.get("load_image")
        if hook is None:
            return self._decoded(name, self.size, data)
        image = self._from_hook(hook, name)
        if not image.size:
            raise DamagedImage(image_key.shown(name), f"load_image returned no pixels, {image.shape}")
        return decode.resize_image(image, self.size, self.resize, image_key.shown(name))

    def _from_hook(self, hook: Callable[..., Any], name: str) -> Pixels:
        row = self._hook_row(name)
        try:
            image = hook(dict(row), self.decode)
        except (DamagedImage, UserError):
            raise
        except Exception as error:
            unknown = isinstance(error, KeyError) and error.args and error.args[0] not in row
            raise pages.failed(
                "load_image",
                error,
                f"for {image_key.shown(name)}",
                "the row has the columns that competition.yaml declares: image_columns: "
                f"[{error.args[0]}], or all"
                if unknown
                else "",
            ) from error
        if (
            isinstance(image, np.ndarray)
            and image.dtype == self.dtype
            and image.ndim == 3
            and image.shape[2] == self.channels
        ):
            return image
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(
            "load-image-invalid",
            where="comp/competition.py",
            what=f"load_image returned {got} for {image_key.shown(name)}",
            remedy=f"return a {np.dtype(self.dtype)} array (height, width, {self.channels})",
        )

    def _hook_row(self, name: str) -> dict[str, Any]:
        """The argument `row` of load_image."""
        paths = image_key.paths(name)
        return {**image_key.row(name), "image": paths, "file": self.file(image_key.files(name)[0])}

    def decode(self, name: str, full: bool = False) -> Pixels:
        """The argument `decode` of load_image: an image as it would be without the hook, or at its full
        size."""
        return self._decoded(name, None if full else self.size)

    def _decoded(self, name: str, size: int | None, data: bytes | None = None) -> Pixels:
        files = image_key.files(name)
        if len(files) == 1:
            data = self.read(name) if data is None else data
            return decode.decode(data, size, self.resize, self.channels, files[0], self.pixel_format)
        channels, rest = divmod(self.channels, len(files))  # of each file
        if rest or not channels:
            raise DamagedImage(
                image_key.shown(name),
                f"{len(files)} files cannot be {self.channels} channels (data.channels)",
            )
        planes = [
            decode.decode(
                decode.read(self.file(file), file), size, self.resize, channels, file, self.pixel_format
            )
            for file in files
        ]
        if len({plane.shape for plane in planes}) > 1:
            raise DamagedImage(
                image_key.shown(name), "its files differ in size, so they cannot be channels of one image"
            )
        return np.concatenate(planes, axis=2)


def from_config(cfg: Config) -> ImageReader:
    pixels = cfg.competition.pixels
    low, high = (pixels.range if pixels else None) or (None, None)
    shape = tuple((pixels.shape if pixels else None) or ())
    pixel_format = PixelFormat(low, high, shape, cfg.data.bit_depth, bool(pixels and pixels.lenient))
    size = round(cfg.data.size * cfg.data.cache_scale)
    return ImageReader(cfg.competition.raw, size, cfg.data.resize, cfg.data.channels, pixel_format)


def _source(hook: Callable[..., Any]) -> list[str]:
    """The source of load_image and of everything in its module that it uses. An edit of any of it changes the
    cache's key."""
    if not isinstance(hook, FunctionType):
        raise UserError(
            "load-image-invalid",
            where="comp/competition.py",
            what="load_image must be a plain function, since its source is part of the cache's key",
        )
    text: dict[str, str] = {}
    waiting: list[tuple[str, Any]] = [(hook.__name__, hook)]
    while waiting:
        name, value = waiting.pop()
        if name in text or isinstance(value, ModuleType):
            continue
        if isinstance(value, FunctionType) and value.__module__ == hook.__module__:
            text[name] = inspect.getsource(value)
            waiting += [
                (used, hook.__globals__[used]) for used in _names(value.__code__) if used in hook.__globals__
            ]
        elif isinstance(value, type) and value.__module__ == hook.__module__:
            text[name] = inspect.getsource(value)
        elif isinstance(value, (int, float, str, bytes, tuple, list, dict, type(None))):
            text[name] = repr(value)
    return [text[name] for name in sorted(text)]


def _names(code: CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)
