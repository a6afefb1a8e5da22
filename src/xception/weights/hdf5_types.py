"""What HDF5 messages say of values: their type, their shape, their attributes, where they are stored.

Source: HDF5 File Format Specification 3.0, sections IV.A.2.b (dataspace), d (datatype), i (layout), l (filters) and m
(attribute). Each function takes one message's bytes and returns plain values, or raises `WeightsError`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import torch

from xception.errors import WeightsError

UNDEFINED = (1 << 64) - 1  # an address that points nowhere
MAX_RANK = 8
_MAX_SIDE = 1 << 48

_CLASSES = {
    0: "integers", 1: "floats", 2: "times", 3: "fixed texts", 4: "bit fields", 5: "opaque bytes", 6: "compounds",
    7: "references", 8: "enumerations", 9: "variable-length values", 10: "arrays", 11: "complex numbers",
}  # fmt: skip
# Bit offset, precision, exponent's place and size, mantissa's place and size, bias; and the sign's place.
_FLOATS = {
    (0, 16, 10, 5, 0, 10, 15, 15): torch.float16,
    (0, 32, 23, 8, 0, 23, 127, 31): torch.float32,
    (0, 64, 52, 11, 0, 52, 1023, 63): torch.float64,
}
_INTEGERS = {
    (1, True): torch.int8, (2, True): torch.int16, (4, True): torch.int32, (8, True): torch.int64,
    (1, False): torch.uint8, (2, False): torch.uint16, (4, False): torch.uint32, (8, False): torch.uint64,
}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A number as torch knows it; `swapped` where the most significant byte comes first."""

    dtype: torch.dtype
    swapped: bool

    @property
    def size(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True)
class Text:
    """A text of `size` bytes, or, `variable`, a reference of that size to one elsewhere."""

    size: int
    variable: bool


@dataclass(frozen=True)
class Other:
    """Any type that no weights file needs, with its name for the error."""

    what: str


@dataclass(frozen=True)
class Attribute:
    """A named value of an object, its bytes as they are stored."""

    name: str
    type: Number | Text | Other
    shape: tuple[int, ...] | None
    data: bytes


@dataclass(frozen=True)
class Layout:
    """Where a data set's numbers are: `data` in the message itself, `size` bytes at `address`, or in chunks.

    `chunk` is the shape of a chunk; `index` says what `address` points to then: "b-tree", or the "single" chunk.
    """

    address: int = UNDEFINED
    size: int = 0
    data: bytes | None = None
    chunk: tuple[int, ...] | None = None
    index: str = ""


def unpack(form: str, data: bytes, offset: int = 0) -> tuple[Any, ...]:
    """Little-endian `struct.unpack_from`; `WeightsError` where the bytes end early."""
    try:
        return struct.unpack_from("<" + form, data, offset)
    except struct.error:
        raise WeightsError("damaged HDF5: a structure ends early") from None


def read_shape(message: bytes) -> tuple[int, ...] | None:
    """The shape that a dataspace message declares; None for one without any element."""
    version, rank, flags, kind = unpack("BBBB", message)
    if version not in (1, 2) or rank > MAX_RANK or flags & 2:
        raise WeightsError("damaged HDF5: a shape that is none")
    if version == 2 and kind == 2:
        return None
    shape = unpack(f"{rank}Q", message, 8 if version == 1 else 4)
    if any(side > _MAX_SIDE for side in shape):
        raise WeightsError("damaged HDF5: a shape that is none")
    return shape


def read_type(message: bytes) -> Number | Text | Other:
    """The type of a datatype message."""
    (word, size) = unpack("II", message)
    kind, bits = word & 15, word >> 8
    if kind == 1:
        fields = unpack("HHBBBBI", message, 8)
        dtype = _FLOATS.get((*fields, bits >> 8 & 255))
        if dtype is not None and dtype.itemsize == size and bits & 0xF0 == 0x20 and not bits & 0x40:
            return Number(dtype, swapped=bool(bits & 1))
        return Other("floats of an unusual kind")
    if kind == 0:
        dtype = _INTEGERS.get((size, bool(bits & 8)))
        if dtype is not None and unpack("HH", message, 8) == (0, 8 * size):
            return Number(dtype, swapped=bool(bits & 1))
        return Other("integers of an unusual kind")
    if kind == 3:
        return Text(size, variable=False)
    if kind == 9 and bits & 15 == 1 and size == 16:
        return Text(size, variable=True)
    if kind == 8 and size == 1:  # how h5py stores truth values
        return Number(torch.uint8, swapped=False)
    return Other(_CLASSES.get(kind, f"values of class {kind}"))


def read_attribute(message: bytes) -> Attribute:
    """The attribute of an attribute message."""
    version, flags, name_size, type_size, shape_size = unpack("BBHHH", message)
    if version not in (1, 2, 3) or (version > 1 and flags & 3):
        raise WeightsError("damaged HDF5: an attribute of an unknown kind")
    place = 9 if version == 3 else 8
    parts = []
    for size in (name_size, type_size, shape_size):
        parts.append(message[place : place + size])
        place += size + (-size % 8 if version == 1 else 0)
    name = parts[0].split(b"\0")[0].decode("utf-8", "replace")
    shape, kind = read_shape(parts[2]), read_type(parts[1])
    data = b""
    if shape is not None and not isinstance(kind, Other):
        size = math.prod(shape) * kind.size
        data = message[place : place + size]
        if len(data) != size:
            raise WeightsError(f"damaged HDF5: attribute {name[:80]!r} declares more than it holds")
    return Attribute(name, kind, shape, data)


def read_layout(message: bytes) -> Layout:
    """The layout of a data layout message; virtual data sets and layouts of other ages are refused."""
    version, kind = unpack("BB", message)
    if version not in (3, 4, 5):
        raise WeightsError(f"damaged HDF5, or of a kind that is not read: data layout of version {version}")
    if kind == 0:
        (size,) = unpack("H", message, 2)
        if len(message) < 4 + size:
            raise WeightsError("damaged HDF5: a structure ends early")
        return Layout(data=message[4 : 4 + size])
    if kind == 1:
        address, size = unpack("QQ", message, 2)
        return Layout(address=address, size=size)
    if kind == 3:
        raise WeightsError("a virtual data set, whose numbers are elsewhere, is refused")
    if kind != 2:
        raise WeightsError(f"damaged HDF5: data layout of class {kind}")
    return _read_chunks(message) if version == 3 else _read_new_chunks(message)


def _read_chunks(message: bytes) -> Layout:
    rank, address = unpack("BQ", message, 2)
    if not 2 <= rank <= MAX_RANK + 1:
        raise WeightsError("damaged HDF5: chunks of an impossible shape")
    chunk = unpack(f"{rank}I", message, 11)
    return Layout(address=address, chunk=chunk[:-1], index="b-tree")


def _read_new_chunks(message: bytes) -> Layout:
    flags, rank, width = unpack("BBB", message, 2)
    if not 2 <= rank <= MAX_RANK + 1 or not 1 <= width <= 8:
        raise WeightsError("damaged HDF5: chunks of an impossible shape")
    sides = [int.from_bytes(message[5 + width * i : 5 + width * (i + 1)], "little") for i in range(rank)]
    place = 5 + width * rank
    (index,) = unpack("B", message, place)
    if index != 1:
        raise WeightsError("chunks in HDF5's newest layout are not read: save the file with h5py's default settings")
    size = 0
    if flags & 2:  # compressed: its size in the file
        (size, _) = unpack("QI", message, place + 1)
        place += 12
    (address,) = unpack("Q", message, place + 1)
    return Layout(address=address, size=size, chunk=tuple(sides[:-1]), index="single")


def read_filters(message: bytes) -> tuple[int, ...]:
    """The numbers of a filter pipeline's filters, in the order in which they were applied."""
    version, count = unpack("BB", message)
    if version not in (1, 2):
        raise WeightsError("damaged HDF5: filters of an unknown kind")
    place = 8 if version == 1 else 2
    filters = []
    for _ in range(count):
        (number,) = unpack("H", message, place)
        named = version == 1 or number >= 256
        name_size = unpack("H", message, place + 2)[0] if named else 0
        place += 4 if named else 2
        _, values = unpack("HH", message, place)
        place += 4 + name_size + (-name_size % 8 if version == 1 else 0) + 4 * values
        if version == 1 and values % 2:
            place += 4
        filters.append(number)
    return tuple(filters)
