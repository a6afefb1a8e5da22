"""A file whose tensors stay on the disk until they are asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

import torch
from torch import Tensor

from xception.errors import WeightsError
from xception.weights.files import open_regular, shown
from xception.weights.foreign import ForeignTensor

_MAX_MESSAGE = 500


class LazyFile:
    """A regular file that is opened for each tensor anew, so that nothing has to be closed.

    What goes wrong while it is open is reported with its name. Raises `WeightsError` where it cannot be read, or is
    no longer the file that it was at first.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.shown = shown(path)
        self._path = os.path.abspath(os.fspath(path))
        self._identity: tuple[int, ...] | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file from its first byte on."""
        with problems(self.shown), open_regular(self._path) as stream:
            status = os.fstat(stream.fileno())
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if self._identity not in (None, identity):
                raise WeightsError("it was changed while it was read")
            self._identity = identity
            yield stream

    def tensor(
        self,
        begin: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        stride: tuple[int, ...] | None = None,
        *,
        check: Callable[[BinaryIO], None] | None = None,
    ) -> ForeignTensor:
        """The tensor whose first element is at byte `begin`; `check` is called with the stream before it is read.

        `stride` is in elements, as in PyTorch, and None for a contiguous tensor. That all of it lies inside of the
        file is up to the caller.
        """

        def read() -> Tensor:
            steps = contiguous_stride(shape) if stride is None else stride
            flat = torch.empty(span(shape, steps), dtype=dtype)
            with self.open() as stream:
                if check is not None:
                    check(stream)
                stream.seek(begin)
                place = flat.view(torch.uint8).numpy().data
                if stream.readinto(place) != len(place):  # type: ignore[attr-defined]
                    raise WeightsError("the file was cut short while it was read")
            return flat.as_strided(shape, steps).contiguous()

        return ForeignTensor(shape=shape, dtype=dtype, read=read)


@contextlib.contextmanager
def problems(name: str) -> Iterator[None]:
    """Put the file's name before what is wrong with it."""
    prefix = f"cannot load {name}: "
    try:
        yield
    except WeightsError as error:
        text = str(error)  # may quote what the file holds, which can be long
        if text.startswith((prefix, "cannot read ")):
            raise
        raise WeightsError(prefix + (text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "...")) from None


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements lie between a tensor's first and its last, both counted; 0 for an empty one."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stride of a tensor without gaps, the last axis closest."""
    steps = []
    step = 1
    for size in reversed(shape):
        steps.append(step)
        step *= max(size, 1)
    return tuple(reversed(steps))
