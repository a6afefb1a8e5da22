"""Damaged and hostile HDF5 files, made from a genuine one: a whole Keras model in HDF5.

Most are made through h5py, which writes whatever it is asked for; where the library would not, bytes are changed.
Each comes as (what was done, file, part of the expected message).
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

# In every file that `victim` is taken from: a small tensor, replaced by something hostile.
VICTIM = "model_weights/predictions/predictions/bias"
Case = tuple[str, bytes, str]


def edited(data: bytes, change: Callable[[Any], object]) -> bytes:
    """The file after `change` was made through h5py."""
    stream = io.BytesIO(data)
    with h5py.File(stream, "r+") as file:
        change(file)
    changed = stream.getvalue()
    (declared,) = struct.unpack_from("<Q", changed, 40)
    return changed.ljust(declared, b"\0")  # in memory the library does not write space that it only allocated


def replaced(data: bytes, make: Callable[[Any, str], object]) -> bytes:
    """The file with its victim replaced: `make` gets the group and the name."""

    def change(file: Any) -> None:
        group, _, name = VICTIM.rpartition("/")
        del file[VICTIM]
        make(file[group], name)

    return edited(data, change)


def truncations(data: bytes, count: int) -> Iterator[Case]:
    chosen = random.Random(1)
    points = {0, 1, 7, 8, 9, 24, 48, 95, 96, 97, len(data) // 2, len(data) - 1}
    while len(points) < count:
        points.add(chosen.randrange(len(data)))
    for point in sorted(points):
        yield f"cut to {point} bytes", data[:point], ""


def mutations(data: bytes, count: int, *, seed: int) -> Iterator[bytes]:
    """Files with some bytes changed: bits flipped, bytes set to edges, addresses to other places in the file."""
    chosen = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(chosen.choice((1, 1, 1, 2, 4))):
            place, way = chosen.randrange(len(data)), chosen.random()
            if way < 0.5:
                changed[place] ^= 1 << chosen.randrange(8)
            elif way < 0.8:
                changed[place] = chosen.choice((0, 1, 127, 128, 255, chosen.randrange(256)))
            else:
                place, other = place // 8 * 8, chosen.randrange(len(data)) // 8 * 8
                values = (b"\xff" * 8, bytes(8), other.to_bytes(8, "little"), data[other : other + 8])
                changed[place : place + 8] = chosen.choice(values)
        yield bytes(changed[: len(data)])


def hostile_links(data: bytes) -> Iterator[Case]:
    def with_link(make: Callable[[Any], Any]) -> bytes:
        return edited(data, lambda file: file.__setitem__("model_weights/extra", make(file)))

    yield "soft link", with_link(lambda f: h5py.SoftLink("/model_weights/predictions")), "a soft link"
    yield "dangling soft link", with_link(lambda f: h5py.SoftLink("/nowhere")), "a soft link"
    outside = h5py.ExternalLink("/etc/hostname", "/")
    yield "external link", with_link(lambda f: outside), "an external link"
    yield "external link for a tensor", replaced(data, lambda g, n: g.__setitem__(n, outside)), "an external link"
    yield "soft link for a tensor", replaced(data, lambda g, n: g.__setitem__(n, h5py.SoftLink("/x"))), "a soft link"
    yield "cycle", with_link(lambda f: f["model_weights"]), "a second name, or part of a cycle"
    yield "cycle to the root", with_link(lambda f: f["/"]), "a second name, or part of a cycle"
    yield "second name", with_link(lambda f: f[VICTIM]), "a second name"
    with_new = edited(data, lambda f: f.move("model_weights", "m"))
    yield "renamed", with_new, "it has 0 variables"


def hostile_storage(data: bytes, secret: Path) -> Iterator[Case]:
    shape, floats = (5,), np.zeros(5, np.float32)
    yield (
        "external storage",
        replaced(data, lambda g, n: g.create_dataset(n, shape, "f4", external=[(str(secret), 0, 20)])),
        "external storage",
    )
    layout = h5py.VirtualLayout(shape, "f4")
    layout[:] = h5py.VirtualSource(str(secret), "x", shape=shape)
    yield "virtual data set", replaced(data, lambda g, n: g.create_virtual_dataset(n, layout)), "a virtual data set"

    def declared(shape: tuple[int, ...], **options: Any) -> bytes:
        return replaced(data, lambda g, n: g.create_dataset(n, shape, "f4", **options))

    yield "never written", declared((5,)), "holds 0"
    yield "never written, of a terabyte", declared((1 << 38,)), "holds 0"
    yield "never written, in eight dimensions", declared((1 << 7,) * 8), "holds 0"
    yield "nine dimensions", declared((1,) * 9), "a shape that is none"
    yield "chunks never written", declared((1 << 20,), chunks=(1 << 10,)), "holds 0"
    yield "a million chunks", declared((1 << 20,), chunks=(1,)), "chunks"
    yield "chunks of a gigabyte", declared((5,), chunks=(5,), maxshape=(None,)), "holds 0"
    zeros = np.zeros(36 << 20, np.float32)
    bomb = replaced(data, lambda g, n: g.create_dataset(n, data=zeros, compression="gzip", chunks=(1 << 20,)))
    yield "zeros of 144 MB, compressed", bomb, "bytes more than the file has"
    for name, options in (
        ("lzf", {"compression": "lzf"}),
        ("szip or nbit", {"scaleoffset": 3}),
        ("a checksum", {"fletcher32": True}),
    ):
        yield (
            f"filter: {name}",
            replaced(data, lambda g, n, o=options: g.create_dataset(n, data=floats, chunks=shape, **o)),
            "are refused: only gzip",
        )

    def chunk(stream: bytes, mask: int = 0) -> bytes:
        def make(group: Any, name: str) -> None:
            dataset = group.create_dataset(name, shape, "f4", chunks=shape, compression="gzip")
            dataset.id.write_direct_chunk((0,), stream, mask)

        return replaced(data, make)

    yield "a chunk that expands without end", chunk(zlib.compress(bytes(100 << 20))), "a chunk of the wrong size"
    yield "a chunk too small", chunk(zlib.compress(bytes(8))), "a chunk of the wrong size"
    yield "a chunk that is no stream", chunk(b"nothing"), "cannot be unpacked"
    yield "a chunk without its filter", chunk(bytes(20), mask=1), "do not fit the shape"


def hostile_types(data: bytes) -> Iterator[Case]:
    def typed(dtype: Any, value: Any = None) -> bytes:
        def make(group: Any, name: str) -> None:
            dataset = group.create_dataset(name, (5,), dtype)
            if value is not None:
                dataset[0] = value(group) if callable(value) else value

        return replaced(data, make)

    yield "references", typed(h5py.ref_dtype, lambda g: g.ref), "holds references"
    yield "region references", typed(h5py.regionref_dtype), "holds references"
    yield "variable-length numbers", typed(h5py.vlen_dtype(np.float32)), "holds variable-length values"
    yield "texts", typed(h5py.string_dtype(), "x"), "holds texts"
    yield "fixed texts", typed("S8", b"x"), "holds texts"
    yield "opaque bytes", typed(np.dtype("V4")), "holds opaque bytes"
    yield "compounds", typed(np.dtype([("a", "f4"), ("b", "i4")])), "holds compounds"
    yield "arrays", typed(np.dtype(("f4", (3,)))), "holds arrays"
    yield "complex numbers", typed(np.complex64), "holds"
    yield "integers", typed(np.int32, 7), "expected floats"
    yield "truth values", typed(np.bool_, True), "expected floats"
    yield "unusual floats", typed(np.longdouble), "holds floats of an unusual kind"
    empty = replaced(data, lambda g, n: g.create_dataset(n, data=h5py.Empty("f4")))
    yield "nothing at all", empty, "holds nothing at all"
    yield "another shape", replaced(data, lambda g, n: g.create_dataset(n, data=np.zeros(6, "f4"))), "shape"
    yield "a scalar", replaced(data, lambda g, n: g.create_dataset(n, data=np.float32(1))), "shape"
    yield "a group", replaced(data, lambda g, n: g.create_group(n)), "is listed, and is not there"
    named = edited(data, lambda f: f.__setitem__("model_weights/type", np.dtype("f4")))
    yield "a named type", named, "neither a group nor a data set"
    missing = edited(data, lambda f: f.__delitem__(VICTIM))
    yield "a missing tensor", missing, "is listed, and is not there"
    extra = edited(data, lambda f: f["model_weights/predictions"].create_dataset("x", data=np.zeros(3)))
    yield "a tensor too many", extra, "have no place"


def hostile_attributes(data: bytes) -> Iterator[Case]:
    def attribute(name: str, value: Any, group: str = "model_weights") -> bytes:
        def change(file: Any) -> None:
            file[group].attrs.pop(name, None)
            file[group].attrs[name] = value(file) if callable(value) else value

        return edited(data, change)

    yield "a reference", attribute("x", lambda f: f.ref), "only texts are accepted"
    region = attribute("x", lambda f: f[VICTIM].regionref[:2])
    yield "a region reference", region, "only texts are accepted"
    yield "names as numbers", attribute("layer_names", np.arange(5)), "it has 0 variables"
    yield (
        "a name too many",
        attribute("layer_names", [b"predictions", b"predictions"]),
        "is listed, and is not there once",
    )
    yield "a name with dots", attribute("layer_names", [b"../../etc"]), "is listed, and is not there"
    yield "a description that is a list", attribute("model_config", [b"{}", b"{}"], "/"), "is a list"
    yield "an empty description", attribute("model_config", b"", "/"), "is not JSON"
    yield "no description at all", edited(data, lambda f: f.attrs.pop("model_config")), "weights without a description"
    yield "a description of 40 MB", attribute("model_config", b" " * (40 << 20), "/"), "bytes of text"
    yield "a description of 10 MB", attribute("model_config", b" " * (10 << 20), "/"), "is too large"
    nested = b"[" * 30_000 + b"]" * 30_000
    yield "deep nesting", attribute("model_config", b'{"a":' + nested + b"}", "/"), "too deeply"
    yield "brackets without end", attribute("model_config", b"[" * 500_000, "/"), "is too large"


def hostile_structure(data: bytes) -> Iterator[Case]:
    """What the library does not write: bytes changed by hand. The file is of the old kind, which h5py writes."""
    assert data[8] == 0
    end = len(data)

    def patched(place: int, value: bytes) -> bytes:
        return data[:place] + value + data[place + len(value) :]

    def number(value: int) -> bytes:
        return struct.pack("<Q", value)

    (root,) = struct.unpack_from("<Q", data, 64)
    trees = [place for place in _all(data, b"TREE") if data[place + 4] == 0]
    leaves = _all(data, b"SNOD")
    heaps = _all(data, b"HEAP")
    collections = _all(data, b"GCOL")
    yield "another version", patched(8, b"\x07"), "version 7"
    yield "32-bit addresses", patched(13, b"\x04"), "64-bit addresses"
    yield "a user block", bytes(512) + data, "neither an HDF5 file nor"
    yield "a base address", patched(24, number(512)), "no plain file"
    yield "a driver", patched(48, number(800)), "no plain file"
    yield "an end behind the end", patched(40, number(end + 1)), "cut short"
    yield "a root outside", patched(64, number(end + 8)), "it refers to"
    yield "a root that wraps around", patched(64, number(2**64 - 8)), "it refers to"
    yield "a root that is its superblock", patched(64, number(0)), "no object header"
    looping = patched(trees[0] + 5, b"\x01")
    yield (
        "a tree that is its own child",
        looping[: trees[0] + 32] + number(trees[0]) + looping[trees[0] + 40 :],
        "B-tree",
    )
    yield "a tree of 65,535 children", patched(trees[0] + 6, b"\xff\xff"), ""
    yield "symbols at themselves", patched(trees[0] + 32, number(trees[0])), "no symbols"
    yield "65,535 symbols", patched(leaves[0] + 6, b"\xff\xff"), ""
    yield "a name outside its heap", patched(leaves[0] + 8, number(1 << 40)), "outside its heap"
    yield "a cached soft link", patched(leaves[0] + 24, b"\x02"), "a soft link"
    yield "a member that is its group", patched(leaves[0] + 16, number(root)), "cycle"
    yield "a heap of a terabyte", patched(heaps[0] + 8, number(1 << 40)), "no heap of names"
    yield "a heap elsewhere", patched(heaps[0] + 24, number(end)), "it refers to"
    yield "a heap of texts of a terabyte", patched(collections[0] + 8, number(1 << 40)), "no heap of texts"
    yield "a text longer than its heap", patched(collections[0] + 24, number(1 << 40)), "heap of texts"
    yield "a continuation of itself", _continued(data, root), ""
    yield "texts that are all one text", _amplified(data), "bytes of text"


def _all(data: bytes, signature: bytes) -> list[int]:
    places, place = [], data.find(signature)
    while place >= 0:
        places.append(place)
        place = data.find(signature, place + 1)
    return places


def _continued(data: bytes, root: int) -> bytes:
    """The root's header, whose first message continues it where it begins."""
    message = struct.pack("<HHB3xQQ", 0x10, 16, 0, root + 16, 24)
    header = struct.pack("<BBHII4x", 1, 0, 60_000, 1, 24)
    return data[:root] + header + message + data[root + 40 :]


def _amplified(data: bytes) -> bytes:
    """A list of 3,000 texts that are all the same megabyte: 3 GB of text in a file of little more than one."""
    mark, count = b"m" * (1 << 20), 3_000
    names = [mark, *(b"%05d" % i for i in range(1, count))]
    made = edited(data, lambda f: f["model_weights"].attrs.__setitem__("weight_names", np.array(names, dtype=object)))
    for place in _all(made, struct.pack("<I", len(mark))):
        address, index = struct.unpack_from("<QI", made, place + 4)
        if made[address : address + 4] == b"GCOL" and index:
            return made[:place] + made[place : place + 16] * count + made[place + 16 * count :]
    raise AssertionError("the list of texts was not found")
