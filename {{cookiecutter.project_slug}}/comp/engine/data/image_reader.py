"""How a file of the raw data becomes a picture of the run: decoded to size, or by load_image of competition.py."""

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
from comp.engine.errors import Refused, UserError
from comp.engine.readers import containers
from comp.engine.readers import decode as images
from comp.engine.readers.arrays import DTYPES, DamagedImage, PixelFormat
from comp.engine.readers.decode import Pixels, Resize
from comp.engine.store import artifacts, paths


def content_hash(data: bytes) -> str:
    """Names the bytes of a file, in the index of a cache and wherever two files are compared."""
    return hashlib.sha256(data).hexdigest()[:32]


@dataclass(frozen=True)
class ImageReader:
    """All that decides the pixels of a picture, except the bytes of its file."""

    raw: str
    size: int
    resize: Resize
    channels: int
    pixel_format: PixelFormat = images.DEFAULT_FORMAT

    @cached_property
    def key(self) -> str:
        """Names the folder of a cache: what gives other pixels has another one."""
        hook = pages.get("load_image")
        return artifacts.digest(
            [
                self.raw,
                self.size,
                self.resize,
                self.channels,
                list(self.pixel_format),
                images.DECODER,
                _source(hook) if hook else None,
            ]
        )

    @property
    def dtype(self) -> Any:
        """Of a pixel, by data.bit_depth."""
        return DTYPES[self.pixel_format.depth]

    @property
    def uses_hook(self) -> bool:
        return pages.get("load_image") is not None

    @cached_property
    def folder(self) -> str:
        return os.fspath(paths.path(self.raw))

    def file(self, name: str) -> Path:
        return Path(self.folder, image_key.paths(name))

    def stamp(self, name: str) -> tuple[int, int]:
        """Size and mtime: what tells that a file, or a member of an archive, is still the same. -1 where there is none."""
        if image_key.CHANNELS in name:
            return self._stamp_inside(name)
        try:
            status = os.stat(f"{self.folder}/{name}")
        except OSError:
            return self._stamp_inside(name)
        return status.st_size, status.st_mtime_ns

    def stamps(self, names: Sequence[str]) -> NDArray[np.int64]:
        """(files, 2). Two to four seconds for a million files."""
        return np.fromiter((n for name in names for n in self.stamp(name)), np.int64, 2 * len(names)).reshape(
            -1, 2
        )

    def _stamp_inside(self, name: str) -> tuple[int, int]:
        parts = [containers.stat(self.file(part)) for part in image_key.files(name)]
        there = [part for part in parts if part is not None]
        if len(there) < len(parts):
            return -1, -1
        return sum(size for size, _ in there), max(mtime for _, mtime in there)

    def read(self, name: str) -> bytes:
        """Of several files that are channels the bytes of all, one after the other."""
        return b"".join(images.read(self.file(part), part) for part in image_key.files(name))

    def image(self, name: str, data: bytes | None = None) -> Pixels:
        """`data`: the bytes of the file where they are already read."""
        hook = pages.get("load_image")
        if hook is None:
            return self._decoded(name, self.size, data)
        row = self._row(name)
        try:
            made = hook(dict(row), self.decode)
        except (DamagedImage, UserError):
            raise
        except Exception as error:
            unknown = isinstance(error, KeyError) and error.args and error.args[0] not in row
            raise pages.failed(
                "load_image",
                error,
                f"for {image_key.shown(name)}",
                f"; of the table it has the columns that competition.yaml declares: image_columns: [{error.args[0]}], or all"
                if unknown
                else "",
            ) from error
        if not (
            isinstance(made, np.ndarray)
            and made.dtype == self.dtype
            and made.ndim == 3
            and made.shape[2] == self.channels
        ):
            got = f"{made.dtype} {made.shape}" if isinstance(made, np.ndarray) else type(made).__name__
            wanted = f"a {np.dtype(self.dtype)} array (height, width, {self.channels})"
            raise Refused(
                f"comp/competition.py: load_image gave {got} for {image_key.shown(name)}; {wanted} is wanted"
            )
        if not made.size:
            raise DamagedImage(image_key.shown(name), f"load_image gave no pixels, {made.shape}")
        return images.resize_image(made, self.size, self.resize, image_key.shown(name))

    def _row(self, name: str) -> dict[str, Any]:
        """What load_image is handed of its row."""
        joined = image_key.paths(name)
        return {**image_key.row(name), "image": joined, "file": self.file(image_key.files(name)[0])}

    def decode(self, name: str, full: bool = False) -> Pixels:
        """What load_image is handed: a picture as it would be without the hook, or at its full size."""
        return self._decoded(name, None if full else self.size)

    def _decoded(self, name: str, size: int | None, data: bytes | None = None) -> Pixels:
        parts = image_key.files(name)
        if len(parts) == 1:
            data = self.read(name) if data is None else data
            return images.decode(data, size, self.resize, self.channels, parts[0], self.pixel_format)
        each, rest = divmod(self.channels, len(parts))
        if rest or not each:
            raise DamagedImage(
                image_key.shown(name),
                f"{len(parts)} files cannot be {self.channels} channels (data.channels)",
            )
        planes = [
            images.decode(
                images.read(self.file(part), part), size, self.resize, each, part, self.pixel_format
            )
            for part in parts
        ]
        if len({plane.shape for plane in planes}) > 1:
            raise DamagedImage(
                image_key.shown(name), "its files differ in size, so they cannot be channels of one picture"
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
    """The text of a hook and of what it uses from its own module, so that an edit there makes new pictures."""
    if not isinstance(hook, FunctionType):
        raise Refused(
            "comp/competition.py: load_image must be a plain function, so that an edit of it is noticed"
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
