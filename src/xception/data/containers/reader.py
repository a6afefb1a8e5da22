"""What every format's walker reads from, is limited by, and returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO, Literal, NamedTuple

from xception.errors import ImageError

Format = Literal["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF"]
SizeCheck = Callable[[int, int], None]
"""Called with (width, height) as soon as a header states them; raises `ImageError` when they are over the limits."""

MAX_PIECES = 65_536
"""Chunks, segments, blocks or tags walked before a file is refused; real files hold tens to a few thousand."""
MAX_EXIF_BYTES = 65_536
"""EXIF beyond this size is passed over; in JPEG it cannot be larger."""


class Payload(NamedTuple):
    """What the decoder is given."""

    format: Format
    data: bytes
    orientation: int
    """EXIF orientation, 1 to 8; 1 where there is none or it makes no sense."""


class Reader:
    """A seekable stream of known size; reads are exact, and never ask for memory beyond what the file holds."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.size = size
        self._stream = stream
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    @property
    def left(self) -> int:
        return self.size - self._position

    def take(self, count: int) -> bytes:
        """Exactly `count` bytes, or `ImageError`."""
        data = self._stream.read(count) if count <= self.left else b""
        if len(data) != count:
            raise ImageError("truncated file")
        self._position += count
        return data

    def skip(self, count: int) -> None:
        """Move on by `count` bytes, back if it is negative; `ImageError` beyond the end."""
        if count > self.left:
            raise ImageError("truncated file")
        self._position += count
        self._stream.seek(self._position)

    def rest(self, limit: int | None = None) -> bytes:
        """All that is left, or the first `limit` bytes of it."""
        return self.take(self.left if limit is None else min(limit, self.left))
