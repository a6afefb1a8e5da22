"""The directory of a zip archive whose members are stored as they are, read without trust.

PyTorch writes such archives: nothing compressed, nothing encrypted, one member after the other. Only that is read, so
a member is a range of bytes of the file and there is nothing to unpack. Source: APPNOTE.TXT 6.3 of PKWARE.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from xception.errors import WeightsError

MAX_MEMBERS = 50_000  # a network with its optimiser and an average has a few thousand tensors
MAX_DIRECTORY_BYTES = 16 << 20
_MAX_COMMENT = 0xFFFF

_END = struct.Struct("<4s4H2LH")
_END_64_PLACE = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True)
class Member:
    """A range of bytes of the file: `size` of them from `begin` on. `crc` is None where the writer left it out."""

    begin: int
    size: int
    crc: int | None


@dataclass(frozen=True)
class _Entry:
    name: str
    header: int
    size: int
    crc: int


def read_directory(stream: BinaryIO) -> dict[str, Member]:
    """Name -> member, for every member of the archive.

    Raises `WeightsError` (without the file's name) for an archive that is damaged, cut short, compressed, encrypted
    or in parts, whose members overlap or share a name, or whose two accounts of a member differ.
    """
    file_bytes = os.fstat(stream.fileno()).st_size
    count, begin, size = _find_directory(stream, file_bytes)
    if count > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        raise WeightsError(
            f"the archive lists {count:,} members in {size:,} bytes; "
            f"at most {MAX_MEMBERS:,} in {MAX_DIRECTORY_BYTES:,} are read"
        )
    entries = _read_entries(_read_at(stream, begin, size), count)
    computed = any(entry.crc for entry in entries)  # PyTorch can be told not to compute them: then all are 0
    members: dict[str, Member] = {}
    position = 0
    for entry in sorted(entries, key=lambda entry: entry.header):
        if entry.name in members:
            raise WeightsError(f"the archive has two members {entry.name!r:.90}")
        if entry.header < position:
            raise WeightsError(f"the archive's member {entry.name!r:.90} overlaps another one")
        first = _data_begin(stream, entry, limit=begin)
        position = first + entry.size
        if position > begin:
            raise WeightsError(f"the archive's member {entry.name!r:.90} does not fit into the file")
        members[entry.name] = Member(first, entry.size, entry.crc if computed else None)
    return members


def check_crc(stream: BinaryIO, member: Member, what: str) -> None:
    """Raise `WeightsError`, beginning with `what`, where the member's bytes are not the ones that were written."""
    if member.crc is None:
        return
    stream.seek(member.begin)
    left, crc = member.size, 0
    while left:
        piece = stream.read(min(left, 1 << 20))
        if not piece:
            raise WeightsError("the file was cut short while it was read")
        crc = zlib.crc32(piece, crc)
        left -= len(piece)
    if crc != member.crc:
        raise WeightsError(f"{what} is damaged: its checksum does not match")


def _find_directory(stream: BinaryIO, file_bytes: int) -> tuple[int, int, int]:
    """Number of members, first byte and size of the central directory, which ends where the end record begins."""
    tail_bytes = min(file_bytes, _END.size + _MAX_COMMENT)
    tail_begin = file_bytes - tail_bytes
    tail = _read_at(stream, tail_begin, tail_bytes)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise WeightsError("the archive is damaged or cut short: it has no directory at its end")
    _, disk, first_disk, count_here, count, size, begin, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail):
        raise WeightsError("the archive is damaged: bytes follow its end")
    end = tail_begin + at
    large = _find_large_end(stream, end)
    if large is not None:
        end, wide = large
        for narrow, value, limit in zip(
            (disk, first_disk, count_here, count, size, begin), wide, (0xFFFF,) * 4 + (0xFFFFFFFF,) * 2, strict=True
        ):
            if narrow not in (value, limit):
                raise WeightsError("the archive is damaged: its two end records differ")
        disk, first_disk, count_here, count, size, begin = wide
    if disk or first_disk or count_here != count:
        raise WeightsError("the archive is one part of several")
    if begin + size != end:
        raise WeightsError("the archive is damaged: its directory is not where it should be")
    return count, begin, size


def _find_large_end(stream: BinaryIO, end: int) -> tuple[int, tuple[int, ...]] | None:
    """Where the end record of a large archive begins, and what it holds; None if there is none."""
    if end < _END_64_PLACE.size + _END_64.size:
        return None
    signature, disk, begin, disks = _END_64_PLACE.unpack(_read_at(stream, end - _END_64_PLACE.size, _END_64_PLACE.size))
    if signature != b"PK\x06\x07":
        return None
    if disk or disks > 1 or begin != end - _END_64_PLACE.size - _END_64.size:
        raise WeightsError("the archive is damaged: its end record is not where it should be")
    signature, length, _, _, *wide = _END_64.unpack(_read_at(stream, begin, _END_64.size))
    if signature != b"PK\x06\x06" or length != _END_64.size - 12:
        raise WeightsError("the archive is damaged: its end record is none")
    return begin, tuple(wide)


def _read_entries(directory: bytes, count: int) -> list[_Entry]:
    entries = []
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(directory):
            raise WeightsError("the archive is damaged: its directory is too short")
        (
            signature,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            size,
            name_size,
            extra_size,
            comment_size,
            disk,
            _,
            _,
            place,
        ) = _CENTRAL.unpack_from(directory, at)
        at += _CENTRAL.size
        end = at + name_size + extra_size + comment_size
        if signature != b"PK\x01\x02" or end > len(directory):
            raise WeightsError("the archive is damaged: its directory is none")
        name = _name(directory[at : at + name_size])
        extra = directory[at + name_size : at + name_size + extra_size]
        at = end
        size, packed, place = _widened(extra, size, packed, place)
        if flags & 0x2041:
            raise WeightsError(f"the archive's member {name!r:.90} is encrypted")
        if method or packed != size:
            raise WeightsError(f"the archive's member {name!r:.90} is compressed; PyTorch writes members as they are")
        if disk not in (0, 0xFFFF):
            raise WeightsError("the archive is one part of several")
        entries.append(_Entry(name, place, size, crc))
    if at != len(directory):
        raise WeightsError("the archive is damaged: its directory is too long")
    return entries


def _widened(extra: bytes, size: int, packed: int, place: int) -> tuple[int, int, int]:
    """The three numbers, with those that did not fit into 32 bits taken from the extra field."""
    fields = _extra_fields(extra)
    wide = fields.get(0x0001, b"")
    values = []
    for value in (size, packed, place):
        if value == 0xFFFFFFFF:
            if len(wide) < 8:
                raise WeightsError("the archive is damaged: the size of a large member is missing")
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        values.append(value)
    return values[0], values[1], values[2]


def _extra_fields(extra: bytes) -> Mapping[int, bytes]:
    fields: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        fields.setdefault(kind, extra[at + 4 : at + 4 + length])
        at += 4 + length
    return fields


def _name(data: bytes) -> str:
    try:
        name = data.decode("utf-8")
    except UnicodeDecodeError:
        raise WeightsError("the archive has a member whose name is not UTF-8") from None
    if not name or "\0" in name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
        raise WeightsError(f"the archive has a member with the name {name!r:.90}, which PyTorch does not write")
    return name


def _data_begin(stream: BinaryIO, entry: _Entry, *, limit: int) -> int:
    """The member's first byte, behind its own header, which must tell the same name and method."""
    if entry.header + _LOCAL.size > limit:
        raise WeightsError(f"the archive's member {entry.name!r:.90} does not fit into the file")
    header = _read_at(stream, entry.header, _LOCAL.size)
    signature, _, flags, method, _, _, _, _, size, name_size, extra_size = _LOCAL.unpack(header)
    name = _read_at(stream, entry.header + _LOCAL.size, name_size) if signature == b"PK\x03\x04" else b""
    if name != entry.name.encode() or method or flags & 0x2041 or size not in (0, 0xFFFFFFFF, entry.size):
        raise WeightsError(f"the archive is damaged: its member {entry.name!r:.90} does not begin where it should")
    begin: int = entry.header + _LOCAL.size + name_size + extra_size
    return begin


def _read_at(stream: BinaryIO, begin: int, size: int) -> bytes:
    stream.seek(begin)
    data = stream.read(size)
    if len(data) != size:
        raise WeightsError("the archive is cut short")
    return data
