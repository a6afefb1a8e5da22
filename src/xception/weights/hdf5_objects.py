"""HDF5 objects: their headers' messages, and the links from a group to its members.

Source: HDF5 File Format Specification 3.0, sections III (B-trees, symbol tables, heaps) and IV (object headers). Both
ages of the format are read: symbol tables, which h5py writes by default, and link messages, sparse or dense.
Only hard links are followed: a soft or an external one is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from xception.errors import WeightsError
from xception.weights.hdf5_types import UNDEFINED, Attribute, read_attribute, unpack
from xception.weights.regions import Window

SHAPE, LINK_INFO, TYPE, LINK, EXTERNAL, LAYOUT, FILTERS, ATTRIBUTE = 0x1, 0x2, 0x3, 0x6, 0x7, 0x8, 0xB, 0xC
_CONTINUATION, _SYMBOL_TABLE, _ATTRIBUTE_INFO, _LAST = 0x10, 0x11, 0x15, 0x18

# Far above any Keras file; below what would take long.
_MAX_HEADER_BYTES = 16 << 20
_MAX_MESSAGES = 1 << 14
_MAX_MEMBERS = 1 << 14


@dataclass
class Header:
    """The messages of one object, by type; `attributes` apart."""

    messages: dict[int, list[bytes]] = field(default_factory=dict)
    attributes: list[Attribute] = field(default_factory=list)

    def one(self, kind: int) -> bytes | None:
        """The only message of this kind, None where there is none."""
        found = self.messages.get(kind, [])
        if len(found) > 1:
            raise WeightsError("damaged HDF5: an object says the same thing twice")
        return found[0] if found else None

    @property
    def is_group(self) -> bool:
        return _SYMBOL_TABLE in self.messages or LINK_INFO in self.messages


def read_header(file: Window, address: int) -> Header:
    """All messages of the object whose header is at `address`."""
    header = Header()
    new = file.read(address, 4) == b"OHDR"
    messages = _new_messages(file, address) if new else _old_messages(file, address)
    for count, (kind, flags, data) in enumerate(messages):
        if count >= _MAX_MESSAGES or kind > _LAST:
            raise WeightsError("damaged HDF5: an object header of impossible contents")
        if flags & 2:
            raise WeightsError("damaged HDF5, or of a kind that is not read: a shared message")
        if kind == ATTRIBUTE:
            header.attributes.append(read_attribute(data))
        else:
            header.messages.setdefault(kind, []).append(data)
    if EXTERNAL in header.messages:
        raise WeightsError("a data set with external storage, whose numbers are in another file, is refused")
    info = header.one(_ATTRIBUTE_INFO)
    if info is not None:
        header.attributes += [read_attribute(record) for record in _dense_attributes(file, info)]
    return header


def read_links(file: Window, header: Header) -> dict[str, int]:
    """The members of a group: name -> address of the member's object header."""
    links: dict[str, int] = {}
    for name, address in _links(file, header):
        text = name.decode("utf-8", "surrogateescape")
        if not text or text in links or text in (".", "..") or "/" in text:
            raise WeightsError(f"damaged HDF5: a member of the name {text[:80]!r}")
        links[text] = address
        if len(links) > _MAX_MEMBERS:
            raise WeightsError(f"a group of more than {_MAX_MEMBERS:,} members")
    return links


def _links(file: Window, header: Header) -> Iterator[tuple[bytes, int]]:
    table = header.one(_SYMBOL_TABLE)
    if table is not None:
        yield from _symbol_table(file, table)
    for message in header.messages.get(LINK, []):
        yield _link(message)
    info = header.one(LINK_INFO)
    if info is not None:
        yield from map(_link, _dense_links(file, info))


# ------------------------------------------------------------------------------------------------------ headers

_Message = tuple[int, int, bytes]


def _old_messages(file: Window, address: int) -> Iterator[_Message]:
    version, _, count, _, size = unpack("BBHII", file.read(address, 16))
    if version != 1:
        raise WeightsError("damaged HDF5: no object header where one should be")
    blocks, total = [(address + 16, size)], 0
    while blocks:
        begin, size = blocks.pop(0)
        total += size
        if total > _MAX_HEADER_BYTES:
            raise WeightsError("damaged HDF5: an object header of impossible size")
        data, place = file.read(begin, size), 0
        while place + 8 <= size and count > 0:
            kind, length, flags = unpack("HHB", data, place)
            message = data[place + 8 : place + 8 + length]
            if len(message) != length:
                raise WeightsError("damaged HDF5: a structure ends early")
            place, count = place + 8 + length, count - 1
            if kind == _CONTINUATION:
                blocks.append(unpack("QQ", message))
            else:
                yield kind, flags, message


def _new_messages(file: Window, address: int) -> Iterator[_Message]:
    version, flags = unpack("BB", file.read(address + 4, 2))
    if version != 2:
        raise WeightsError(f"damaged HDF5: object header of version {version}")
    place = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    size = int.from_bytes(file.read(place, width), "little")
    prefix = 6 if flags & 4 else 4  # messages carry their order of creation
    blocks, total = [(place + width, size)], 0
    while blocks:
        begin, size = blocks.pop(0)
        total += size
        if total > _MAX_HEADER_BYTES:
            raise WeightsError("damaged HDF5: an object header of impossible size")
        data, place = file.read(begin, size), 0
        while place + prefix <= size:
            kind, length, message_flags = unpack("BHB", data, place)
            message = data[place + prefix : place + prefix + length]
            if len(message) != length:
                raise WeightsError("damaged HDF5: a structure ends early")
            place += prefix + length
            if kind == _CONTINUATION:
                begin_next, size_next = unpack("QQ", message)
                if size_next < 8 or file.read(begin_next, 4) != b"OCHK":
                    raise WeightsError("damaged HDF5: no continuation where one should be")
                blocks.append((begin_next + 4, size_next - 8))
            else:
                yield kind, message_flags, message


# -------------------------------------------------------------------------------------------------------- links


def _symbol_table(file: Window, message: bytes) -> Iterator[tuple[bytes, int]]:
    tree, heap = unpack("QQ", message)
    signature, _, size, _, begin = unpack("4sIQQQ", file.read(heap, 32))
    if signature != b"HEAP" or size > _MAX_HEADER_BYTES:
        raise WeightsError("damaged HDF5: no heap of names where one should be")
    names = file.read(begin, size)
    for leaf, _ in tree_leaves(file, tree, kind=0, key_size=8, most=_MAX_MEMBERS):
        signature, _, _, count = unpack("4sBBH", file.read(leaf, 8))
        if signature != b"SNOD":
            raise WeightsError("damaged HDF5: no symbols where they should be")
        entries = file.read(leaf + 8, 40 * count)
        for i in range(count):
            place, address, cached = unpack("QQI", entries, 40 * i)
            if cached == 2:
                raise WeightsError("a soft link, which leads elsewhere by name, is refused")
            end = names.find(b"\0", place) if place < size else -1
            if end < 0:
                raise WeightsError("damaged HDF5: a name outside its heap")
            yield names[place:end], address


def _link(message: bytes) -> tuple[bytes, int]:
    version, flags = unpack("BB", message)
    if version != 1:
        raise WeightsError("damaged HDF5: a link of an unknown kind")
    place, kind = 2, 0
    if flags & 8:
        (kind,) = unpack("B", message, place)
        place += 1
    if kind != 0:
        what = {1: "a soft link, which leads elsewhere by name,", 64: "an external link, which leads to another file,"}
        raise WeightsError(f"{what.get(kind, 'a link of a foreign kind')} is refused")
    place += (8 if flags & 4 else 0) + (1 if flags & 16 else 0)
    width = 1 << (flags & 3)
    length = int.from_bytes(message[place : place + width], "little")
    place += width
    name = message[place : place + length]
    if len(name) != length:
        raise WeightsError("damaged HDF5: a structure ends early")
    (address,) = unpack("Q", message, place + length)
    return name, address


def tree_leaves(file: Window, root: int, *, kind: int, key_size: int, most: int) -> Iterator[tuple[int, bytes]]:
    """The children of a version 1 B-tree's lowest nodes, in order, each with the key before it.

    `kind` is 0 for the members of a group and 1 for the chunks of a data set. The levels must fall from node to node
    and at most `most` nodes are read, so that no tree is endless.
    """
    nodes: list[tuple[int, int | None]] = [(root, None)]
    read = 0
    while nodes:
        address, expected = nodes.pop()
        if address == UNDEFINED and expected is None:
            return  # an empty tree
        signature, found, level, count = unpack("4sBBH", file.read(address, 8))
        read += 1
        if signature != b"TREE" or found != kind or (expected is not None and level != expected) or read > most:
            raise WeightsError("damaged HDF5: a B-tree that is none")
        data = file.read(address + 24, count * (key_size + 8) + key_size)
        children = []
        for i in range(count):
            place = i * (key_size + 8)
            children.append((unpack("Q", data, place + key_size)[0], data[place : place + key_size]))
        if level:
            nodes += [(child, level - 1) for child, _ in reversed(children)]
        else:
            yield from children


# ------------------------------------------------------------------------------------- many links or attributes


def _dense_links(file: Window, info: bytes) -> Iterator[bytes]:
    flags = unpack("BB", info)[1]
    heap, index = unpack("QQ", info, 2 + (8 if flags & 1 else 0))
    if heap != UNDEFINED:
        from_heap = FractalHeap(file, heap)
        for record in tree_records(file, index, kind=5, size=4 + from_heap.id_size):
            yield from_heap.read(record[4:])


def _dense_attributes(file: Window, info: bytes) -> Iterator[bytes]:
    flags = unpack("BB", info)[1]
    heap, index = unpack("QQ", info, 2 + (2 if flags & 1 else 0))
    if heap != UNDEFINED:
        from_heap = FractalHeap(file, heap)
        for record in tree_records(file, index, kind=8, size=from_heap.id_size + 9):
            yield from_heap.read(record[: from_heap.id_size])


def tree_records(file: Window, address: int, *, kind: int, size: int) -> Iterator[bytes]:
    """The records of a version 2 B-tree, each of `size` bytes; see `_MAX_MEMBERS` for how many."""
    signature, version, found, node_size, record_size, depth = unpack("4sBBIHH", file.read(address, 14))
    root, root_count, total = unpack("QHQ", file.read(address + 16, 18))
    if signature != b"BTHD" or version != 0 or found != kind or record_size != size:
        raise WeightsError("damaged HDF5: a B-tree that is none")
    if total > _MAX_MEMBERS or depth > 8 or not 64 <= node_size <= 1 << 20:
        raise WeightsError("damaged HDF5: a B-tree of impossible size")
    # Of each level: how many records a node can have, and how many there can be below it.
    fits = [(node_size - 10) // size]
    below = [fits[0]]
    for _ in range(depth):
        pointer = 8 + _width(fits[0]) + (_width(below[-1]) if len(fits) > 1 else 0)
        fits.append((node_size - 10 - pointer) // (size + pointer))
        below.append((fits[-1] + 1) * below[-1] + fits[-1])
    nodes, read = [(root, root_count, depth)] if total else [], 0
    while nodes:
        place, count, level = nodes.pop()
        read += count
        if file.read(place, 6) != (b"BTIN" if level else b"BTLF") + bytes((0, kind)) or read > total:
            raise WeightsError("damaged HDF5: a B-tree that is none")
        data = file.read(place + 6, count * size)
        yield from (data[i * size : (i + 1) * size] for i in range(count))
        if level:
            widths = (8, _width(fits[0]), _width(below[level - 1]) if level > 1 else 0)
            pointers = file.read(place + 6 + count * size, (count + 1) * sum(widths))
            for i in range(count + 1):
                begin = i * sum(widths)
                child = int.from_bytes(pointers[begin : begin + 8], "little")
                children = int.from_bytes(pointers[begin + 8 : begin + 8 + widths[1]], "little")
                nodes.append((child, children, level - 1))
            if len(nodes) > _MAX_MEMBERS:
                raise WeightsError("damaged HDF5: a B-tree of impossible size")


def _width(largest: int) -> int:
    """How many bytes a number up to `largest` takes."""
    return max(1, (largest.bit_length() + 7) // 8)


class FractalHeap:
    """Where a group with many members keeps its link messages: blocks that double in size, row by row."""

    def __init__(self, file: Window, address: int) -> None:
        self._file = file
        data = file.read(address, 142)
        signature, version, self.id_size, filters, _, largest_object = unpack("4sBHHBI", data)
        self._columns, self._start, self._largest, bits, _, self._root, self._rows = unpack("HQQHHQH", data, 110)
        sound = (
            signature == b"FRHP" and version == 0 and filters == 0 and 1 <= self._columns <= 64 and 8 <= bits <= 64
            and 64 <= self._start <= self._largest <= 1 << 24
        )  # fmt: skip
        if not sound:
            raise WeightsError("damaged HDF5, or of a kind that is not read: a heap that is none")
        self._offset_width = (bits + 7) // 8
        self._length_width = _width(min(self._largest, largest_object))

    def read(self, identifier: bytes) -> bytes:
        """The bytes of an object, by its heap ID."""
        if not identifier or identifier[0] >> 4:
            raise WeightsError("damaged HDF5, or of a kind that is not read: an entry outside its heap's blocks")
        offset = int.from_bytes(identifier[1 : 1 + self._offset_width], "little")
        length = int.from_bytes(identifier[1 + self._offset_width :][: self._length_width], "little")
        block, begin, size = self._find(offset)
        if self._file.read(block, 4) != b"FHDB" or offset + length > begin + size:
            raise WeightsError("damaged HDF5: an entry outside its heap")
        return self._file.read(block + offset - begin, length)

    def _find(self, offset: int) -> tuple[int, int, int]:
        """The direct block that holds `offset`: its address, the offset it begins at, its size."""
        block, begin, size, rows = self._root, 0, self._start, self._rows
        for _ in range(16):
            if rows == 0:
                return block, begin, size
            if self._file.read(block, 4) != b"FHIB":
                raise WeightsError("damaged HDF5: a heap that is none")
            place, row = begin, 0
            while row < rows and offset >= place + self._columns * self._row_size(row):
                place += self._columns * self._row_size(row)
                row += 1
            if row == rows or offset < place:
                break
            size = self._row_size(row)
            column = (offset - place) // size
            entry = block + 13 + self._offset_width + 8 * (row * self._columns + column)
            block, begin = unpack("Q", self._file.read(entry, 8))[0], place + column * size
            rows = 0 if size <= self._largest else (size // self._start // self._columns).bit_length()
        raise WeightsError("damaged HDF5: an entry outside its heap")

    def _row_size(self, row: int) -> int:
        """The size of each block in a row: the first two rows are of one size, then it doubles."""
        return int(self._start) << max(row - 1, 0)
