"""HDF5 files as data: which tensors there are, where their numbers lie, and the texts of their groups.

The structure is parsed here, in Python. The HDF5 library was not made for files that someone else prepared: of 12,000
files with a few bytes changed, version 2.0.0 crashed the process on 3 and hung on 10 (docs/log.md). What a file with
weights never has is refused: soft and external links, external and virtual storage, user blocks, references, opaque
and variable-length data, an object that two names lead to (so no cycles), filters other than gzip and shuffle.
Nothing is read into memory that was not declared, found to lie in the file, and bounded; tensors stay on the disk.
Source: HDF5 File Format Specification 3.0 (The HDF Group).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from xception.errors import WeightsError
from xception.weights.foreign import ForeignTensor
from xception.weights.hdf5_objects import FILTERS, LAYOUT, SHAPE, TYPE, Header, read_header, read_links, tree_leaves
from xception.weights.hdf5_types import (
    UNDEFINED,
    Attribute,
    Layout,
    Number,
    Other,
    Text,
    read_filters,
    read_layout,
    read_shape,
    read_type,
    unpack,
)
from xception.weights.regions import Region, Window

SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Far above any Keras file (Inception v3 with its optimiser has some 4,000 objects).
MAX_OBJECTS = 20_000
MAX_DEPTH = 32
MAX_TEXT_BYTES = 32 << 20
# Compressed or never written numbers can be larger than the file: by so much at most, all of them together.
MAX_EXPANSION_BYTES = 128 << 20
_MAX_CHUNKS = 1 << 16
_GZIP, _SHUFFLE = 1, 2
_PIPELINES = ((), (_GZIP,), (_SHUFFLE,), (_SHUFFLE, _GZIP))


@dataclass(frozen=True)
class Hdf5:
    """`tensors` by path ("layers/dense/vars/0"); `texts`: group's path -> attribute -> text, or list of texts."""

    tensors: dict[str, ForeignTensor] = field(default_factory=dict)
    texts: dict[str, dict[str, str | list[str]]] = field(default_factory=dict)


def read_hdf5(region: Region) -> Hdf5:
    """All tensors and group texts of an HDF5 file; raises `WeightsError` (without the file's name)."""
    with region.open() as file:
        return _Reader(region, file).read()


class _Reader:
    def __init__(self, region: Region, file: Window) -> None:
        self._region = region
        self._file = file
        self._text_bytes = MAX_TEXT_BYTES
        self._expansion = MAX_EXPANSION_BYTES
        self._chunks = _MAX_CHUNKS
        self._heaps: dict[int, dict[int, tuple[int, int]]] = {}

    def read(self) -> Hdf5:
        found = Hdf5()
        seen: set[int] = set()
        objects = [("", _root(self._file), 0)]
        while objects:
            path, address, depth = objects.pop()
            if address in seen:
                raise WeightsError(f"{path[:80]!r} is an object with a second name, or part of a cycle")
            seen.add(address)
            if len(seen) > MAX_OBJECTS or depth > MAX_DEPTH:
                raise WeightsError(f"more than {MAX_OBJECTS:,} objects, or groups nested deeper than {MAX_DEPTH}")
            try:
                header = read_header(self._file, address)
                if header.is_group:
                    found.texts[path] = self._texts(header)
                    prefix = f"{path}/" if path else ""
                    links = read_links(self._file, header)
                    objects += [(prefix + name, target, depth + 1) for name, target in links.items()]
                else:
                    found.tensors[path] = self._tensor(path, header)
            except WeightsError as error:
                raise WeightsError(f"{path[:80]!r}: {error}") from None
        return found

    # ---------------------------------------------------------------------------------------------------- texts

    def _texts(self, header: Header) -> dict[str, str | list[str]]:
        texts: dict[str, str | list[str]] = {}
        for attribute in header.attributes:
            kind = attribute.type
            if isinstance(kind, Other):
                raise WeightsError(f"attribute {attribute.name[:80]!r} holds {kind.what}: only texts are accepted")
            if isinstance(kind, Text) and attribute.shape is not None:
                values = self._text_values(attribute, kind)
                texts[attribute.name] = values if attribute.shape else values[0]
        return texts

    def _text_values(self, attribute: Attribute, kind: Text) -> list[str]:
        values = []
        for i in range(math.prod(attribute.shape or ())):
            item = attribute.data[i * kind.size : (i + 1) * kind.size]
            if kind.variable:
                length, collection, index = unpack("IQI", item)
                item = self._from_heap(length, collection, index) if length else b""
            self._text_bytes -= len(item)
            if self._text_bytes < 0:
                raise WeightsError(f"more than {MAX_TEXT_BYTES:,} bytes of text")
            values.append(item.rstrip(b"\0").decode("utf-8", "surrogateescape"))
        return values

    def _from_heap(self, length: int, collection: int, index: int) -> bytes:
        """A text out of a global heap: `length` bytes of an object of a collection."""
        if length > self._text_bytes:
            raise WeightsError(f"more than {MAX_TEXT_BYTES:,} bytes of text")
        if collection not in self._heaps:
            self._heaps[collection] = self._read_collection(collection)
        begin, size = self._heaps[collection].get(index, (0, -1))
        if length > size:
            raise WeightsError("damaged HDF5: a text that is not where it should be")
        return self._file.read(begin, length)

    def _read_collection(self, address: int) -> dict[int, tuple[int, int]]:
        """The objects of a collection: index -> place and size."""
        signature, version, size = unpack("4sB3xQ", self._file.read(address, 16))
        if signature != b"GCOL" or version != 1 or size > self._file.size:
            raise WeightsError("damaged HDF5: no heap of texts where one should be")
        objects: dict[int, tuple[int, int]] = {}
        place, end = address + 16, address + size
        while place + 16 <= end:
            index, _, length = unpack("HHxxxxQ", self._file.read(place, 16))
            if index == 0:  # the free space at the end
                break
            if len(objects) > MAX_OBJECTS or length > end - place - 16:
                raise WeightsError("damaged HDF5: a heap of texts that is none")
            objects[index] = (place + 16, length)
            place += 16 + length + -length % 8
        return objects

    # -------------------------------------------------------------------------------------------------- tensors

    def _tensor(self, path: str, header: Header) -> ForeignTensor:
        messages = [header.one(kind) for kind in (SHAPE, TYPE, LAYOUT)]
        if None in messages or not path:
            raise WeightsError("damaged HDF5, or of a kind that is not read: neither a group nor a data set")
        shape, kind, layout = (
            read_shape(messages[0] or b""),
            read_type(messages[1] or b""),
            read_layout(messages[2] or b""),
        )
        if not isinstance(kind, Number):
            what = "texts" if isinstance(kind, Text) else kind.what
            raise WeightsError(f"the data set holds {what}: only numbers are accepted")
        if shape is None:
            raise WeightsError("the data set holds nothing at all")
        filters = header.one(FILTERS)
        pipeline = read_filters(filters) if filters is not None else ()
        if pipeline not in _PIPELINES:
            raise WeightsError(f"filters {pipeline} are refused: only gzip, shuffle and both are accepted")
        fill = self._source(shape, kind, layout, pipeline)
        return ForeignTensor(shape=shape, dtype=kind.dtype, read=partial(_read, self._region, shape, kind, fill))

    def _source(self, shape: tuple[int, ...], kind: Number, layout: Layout, pipeline: tuple[int, ...]) -> _Fill:
        """Check where the numbers are, and return what brings them into memory."""
        size = math.prod(shape) * kind.size
        if layout.chunk is not None:
            return self._chunked(shape, kind, layout, pipeline)
        if pipeline:
            raise WeightsError("damaged HDF5: filters without chunks")
        if layout.data is not None:
            if len(layout.data) < size:
                raise WeightsError(f"it declares {size:,} bytes and holds {len(layout.data):,}")
            return _Inline(layout.data[:size])
        if size == 0:
            return _Inline(b"")
        if layout.address == UNDEFINED or layout.size != size:
            held = 0 if layout.address == UNDEFINED else layout.size
            raise WeightsError(f"it declares {size:,} bytes and holds {held:,}")
        _check_place(self._file, layout.address, size)
        return _Contiguous(layout.address)

    def _chunked(self, shape: tuple[int, ...], kind: Number, layout: Layout, pipeline: tuple[int, ...]) -> _Fill:
        chunk = layout.chunk or ()
        size, chunk_size = math.prod(shape) * kind.size, math.prod(chunk) * kind.size
        if len(chunk) != len(shape) or not 0 < chunk_size <= max(4 * size, 1 << 20):
            raise WeightsError("chunks that do not fit the shape")
        expected = math.prod(-(-side // part) for side, part in zip(shape, chunk, strict=True))
        self._chunks -= expected
        if self._chunks < 0:
            raise WeightsError(f"more than {_MAX_CHUNKS:,} chunks")
        places: dict[tuple[int, ...], tuple[int, int]] = {}
        if expected and layout.index == "single":
            places[(0,) * len(shape)] = (layout.address, layout.size if pipeline else chunk_size)
        elif expected:
            key_size = 16 + 8 * len(shape)
            for address, key in tree_leaves(self._file, layout.address, kind=1, key_size=key_size, most=expected + 64):
                stored, mask = unpack("II", key)
                corner = unpack(f"{len(shape)}Q", key, 8)
                inside = all(c % p == 0 and c < s for c, p, s in zip(corner, chunk, shape, strict=True))
                if mask or not inside or corner in places or (not pipeline and stored != chunk_size):
                    raise WeightsError("damaged HDF5: chunks that do not fit the shape")
                places[corner] = (address, stored)
        for address, stored in places.values():
            _check_place(self._file, address, stored)
        if len(places) != expected:
            raise WeightsError(f"it declares {expected:,} chunks and holds {len(places):,}")
        self._expansion -= max(size - sum(stored for _, stored in places.values()), 0)
        if self._expansion < 0:
            raise WeightsError(f"compressed numbers that take {MAX_EXPANSION_BYTES:,} bytes more than the file has")
        return _Chunked(shape, kind, chunk, pipeline, places)


def _root(file: Window) -> int:
    """The address of the root group's header."""
    start = file.read(0, min(file.size, 96)).ljust(96, b"\0")
    if not start.startswith(SIGNATURE):
        raise WeightsError("no HDF5 file")
    version = start[8]
    if version in (0, 1):
        widths, place = start[13:15], 24 + 4 * version
        base, _, end, driver = unpack("4Q", start, place)
        root = unpack("Q", start, place + 40)[0]
    elif version in (2, 3):
        widths, driver = start[9:11], UNDEFINED
        base, _, end, root = unpack("4Q", start, 12)
    else:
        raise WeightsError(f"damaged HDF5: version {version} of the file format")
    if widths != b"\x08\x08" or base != 0 or driver != UNDEFINED:
        raise WeightsError("damaged HDF5, or of a kind that is not read: no plain file of 64-bit addresses")
    if end > file.size:
        raise WeightsError(f"cut short: the file should have {end:,} bytes, it has {file.size:,}")
    return int(root)


def _check_place(file: Window, address: int, size: int) -> None:
    if size <= 0 or address > file.size - size:
        raise WeightsError(f"damaged or cut short: {size:,} bytes at {address:,} of a file of {file.size:,}")


# ------------------------------------------------------------------------------------------------- reading tensors


def _read(region: Region, shape: tuple[int, ...], kind: Number, fill: _Fill) -> Tensor:
    """The tensor, native byte order, in memory of its own."""
    tensor = torch.empty(shape, dtype=kind.dtype)
    if tensor.numel():
        numbers = tensor.reshape(-1).view(torch.uint8).numpy()
        with region.open() as file:
            fill(file, numbers)
        if kind.swapped:
            numbers[:] = numbers.reshape(-1, kind.size)[:, ::-1].reshape(-1)
    return tensor


_Fill = Callable[[Window, "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]"], None]
_Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclass(frozen=True)
class _Inline:
    data: bytes

    def __call__(self, file: Window, numbers: _Bytes) -> None:
        numbers[:] = np.frombuffer(self.data, dtype=np.uint8)


@dataclass(frozen=True)
class _Contiguous:
    address: int

    def __call__(self, file: Window, numbers: _Bytes) -> None:
        file.read_into(self.address, numbers.data)


@dataclass(frozen=True)
class _Chunked:
    shape: tuple[int, ...]
    kind: Number
    chunk: tuple[int, ...]
    pipeline: tuple[int, ...]
    places: dict[tuple[int, ...], tuple[int, int]]

    def __call__(self, file: Window, numbers: _Bytes) -> None:
        item = self.kind.size
        whole = numbers.reshape(*self.shape, item)
        for corner, (address, stored) in self.places.items():
            data = self._decoded(file.read(address, stored))
            piece = np.frombuffer(data, dtype=np.uint8).reshape(*self.chunk, item)
            inside = tuple(slice(c, c + p) for c, p in zip(corner, self.chunk, strict=True))
            target = whole[inside]
            target[...] = piece[tuple(slice(0, side) for side in target.shape[:-1])]

    def _decoded(self, data: bytes) -> bytes:
        size = math.prod(self.chunk) * self.kind.size
        if _GZIP in self.pipeline:
            inflater = zlib.decompressobj()
            try:
                data = inflater.decompress(data, size + 1)
            except zlib.error:
                raise WeightsError("damaged HDF5: a compressed chunk that cannot be unpacked") from None
        if len(data) != size:
            raise WeightsError("damaged HDF5: a chunk of the wrong size")
        if _SHUFFLE in self.pipeline and self.kind.size > 1:
            data = np.frombuffer(data, dtype=np.uint8).reshape(self.kind.size, -1).T.tobytes()
        return data
