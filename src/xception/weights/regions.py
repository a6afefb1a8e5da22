"""Byte ranges of files: every read is checked against the range, and none needs the file to stay open.

A weights file is a whole file, or a member that lies uncompressed in a zip archive. Its tensors are read later, one
by one: a region remembers where they are, opens the file again for each, and notices if it was exchanged meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from xception.errors import WeightsError
from xception.weights.files import open_regular, shown


class Window:
    """Reads at absolute places of a range of an open file; a place outside it is a `WeightsError`."""

    def __init__(self, stream: BinaryIO, begin: int, size: int) -> None:
        self._stream = stream
        self._begin = begin
        self.size = size

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes at `offset`."""
        self._seek(offset, count)
        data = self._stream.read(count)
        if len(data) != count:
            raise WeightsError("the file was cut short while it was read")
        return data

    def read_into(self, offset: int, place: memoryview) -> None:
        """Fill `place` with the bytes at `offset`."""
        self._seek(offset, len(place))
        if self._stream.readinto(place) != len(place):  # type: ignore[attr-defined]  # a BufferedReader reads in full
            raise WeightsError("the file was cut short while it was read")

    def _seek(self, offset: int, count: int) -> None:
        if count < 0 or not 0 <= offset <= self.size - count:
            raise WeightsError(f"damaged or cut short: it refers to {count:,} bytes at {offset:,} of {self.size:,}")
        self._stream.seek(self._begin + offset)


class Region(Protocol):
    """A range that can be opened again and again."""

    def open(self) -> contextlib.AbstractContextManager[Window]: ...


@dataclass(frozen=True)
class FileRegion:
    """`size` bytes from `begin` of the file at `path`, as long as it stays the file it was."""

    path: str
    begin: int
    size: int
    stamp: tuple[int, ...]

    @classmethod
    def of(cls, path: str, stream: BinaryIO, begin: int = 0, size: int | None = None) -> FileRegion:
        """The range of the open file `stream`, which lies at `path`; by default all of it."""
        stamp = _stamp(stream)
        return cls(path, begin, stamp[2] - begin if size is None else size, stamp)

    @contextlib.contextmanager
    def open(self) -> Iterator[Window]:
        """Open the file; `WeightsError` where it is another one than before."""
        with open_regular(self.path) as stream:
            if _stamp(stream) != self.stamp:
                raise WeightsError(f"cannot load {shown(self.path)}: the file was changed while it was read")
            yield Window(stream, self.begin, self.size)


class TemporaryRegion:
    """Bytes that no file has as they are (a compressed member), kept in an unnamed temporary file."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._stream = tempfile.TemporaryFile()  # noqa: SIM115  # closed with this object
        self._finalizer = weakref.finalize(self, self._stream.close)
        for piece in pieces:
            self._stream.write(piece)
        self._stream.flush()
        self._size = self._stream.tell()

    @contextlib.contextmanager
    def open(self) -> Iterator[Window]:
        yield Window(self._stream, 0, self._size)


def _stamp(stream: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(stream.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
