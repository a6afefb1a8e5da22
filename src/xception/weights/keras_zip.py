"""The members of a `.keras` archive, found and bounded before anything is unpacked.

Keras writes a plain zip: no comment, members side by side, stored or deflated. Exactly that is read; what zip allows
beyond it (64-bit records, encryption, other compressions, overlapping members, names that lead outside) is refused.
Nothing is ever extracted under a name: a stored member is read where it lies, a deflated one is unpacked into an
unnamed temporary file. Source: PKWARE APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.16 (end).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xception.errors import WeightsError
from xception.weights.regions import FileRegion, Region, TemporaryRegion, Window

MAX_MEMBERS = 256
_MAX_DIRECTORY_BYTES = 256 << 10
_MAX_EXPANSION = 20  # of a deflated member; weights gain a tenth, zeros of an untrained optimiser more
_ALWAYS_ALLOWED_BYTES = 16 << 20
_PIECE = 1 << 20
_STORED, _DEFLATED = 0, 8


@dataclass(frozen=True)
class Member:
    """A member, its data at `begin` of the archive: `stored` bytes, which unpack to `size`."""

    name: str
    begin: int
    stored: int
    size: int
    deflated: bool
    checksum: int


def read_members(file: Window) -> dict[str, Member]:
    """All members by name; raises `WeightsError` (without the file's name) for whatever Keras does not write."""
    if file.size < 22:
        raise WeightsError("a zip archive that was cut short")
    signature, disk, start, here, total, size, begin, comment = _unpack("4s4H2IH", file.read(file.size - 22, 22))
    if signature != b"PK\5\6" or comment:
        raise WeightsError("a zip archive that was cut short, or has something behind its end")
    if disk or start or here != total or total > MAX_MEMBERS or size > _MAX_DIRECTORY_BYTES:
        raise WeightsError(f"a zip archive of {total:,} members in a directory of {size:,} bytes: no Keras file")
    if begin + size != file.size - 22:  # also so with 64-bit records, which stand between
        raise WeightsError("a zip archive whose directory is not where it should be")
    directory, place = file.read(begin, size), 0
    members: dict[str, Member] = {}
    for _ in range(total):
        member, place = _read_entry(file, directory, place, begin)
        if member.name in members:
            raise WeightsError(f"a zip archive with two members of the name {member.name[:80]!r}")
        members[member.name] = member
    if place != size:
        raise WeightsError("a damaged zip archive: its directory holds something else besides")
    ends = 0
    for member in sorted(members.values(), key=lambda m: m.begin):
        if member.begin < ends:
            raise WeightsError(f"a zip archive whose members overlap: {member.name[:80]!r}")
        ends = member.begin + member.stored
    return members


def _read_entry(file: Window, directory: bytes, place: int, end: int) -> tuple[Member, int]:
    fields = _unpack("4s6H3I5H2I", directory, place)
    signature, _, _, flags, method, _, _, checksum, stored, size = fields[:10]
    name_size, extra_size, comment_size, _, _, attributes, header = fields[10:]
    raw = directory[place + 46 : place + 46 + name_size]
    if signature != b"PK\1\2" or len(raw) != name_size or b"\0" in raw:
        raise WeightsError("a damaged zip archive: no directory entry where one should be")
    name = raw.decode("utf-8", "surrogateescape")
    shown = name[:80]
    if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
        raise WeightsError(f"a zip archive with a member that leads outside: {shown!r}")
    if attributes >> 28 == 0xA:
        raise WeightsError(f"a zip archive with a symbolic link: {shown!r}")
    if flags & 0x2041:
        raise WeightsError(f"a zip archive with an encrypted member: {shown!r}")
    if method not in (_STORED, _DEFLATED):
        raise WeightsError(f"a zip archive with a member packed by method {method}: {shown!r}")
    deflated = method == _DEFLATED
    if (not deflated and stored != size) or size > max(_MAX_EXPANSION * stored, _ALWAYS_ALLOWED_BYTES):
        raise WeightsError(f"a zip archive whose member {shown!r} would unpack from {stored:,} to {size:,} bytes")
    local = _unpack("4s5H3I2H", file.read(header, 30))
    if local[0] != b"PK\3\4" or file.read(header + 30, local[9]) != raw or local[3] != method:
        raise WeightsError(f"a damaged zip archive: {shown!r} has another header than its directory says")
    begin = header + 30 + local[9] + local[10]
    if begin + stored > end:
        raise WeightsError(f"a damaged zip archive: {shown!r} reaches beyond its end")
    member = Member(name=name, begin=begin, stored=stored, size=size, deflated=deflated, checksum=checksum)
    return member, place + 46 + name_size + extra_size + comment_size


def read_small(file: Window, member: Member, limit: int) -> bytes:
    """The contents of a member of at most `limit` bytes, its checksum verified."""
    if member.size > limit:
        raise WeightsError(f"{member.name} has {member.size:,} bytes; at most {limit:,} are read")
    return b"".join(_unpacked(file, member))


def member_region(archive: FileRegion, file: Window, member: Member) -> Region:
    """The contents of a member as a region, its checksum verified."""
    if member.deflated:
        return TemporaryRegion(_unpacked(file, member))
    for _ in _unpacked(file, member):
        pass
    return FileRegion(archive.path, archive.begin + member.begin, member.stored, archive.stamp)


def _unpacked(file: Window, member: Member) -> Iterator[bytes]:
    """The contents piece by piece; an error where they are not exactly what was declared."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS) if member.deflated else None
    checksum, size = 0, 0
    for offset in range(0, member.stored, _PIECE):
        data = file.read(member.begin + offset, min(_PIECE, member.stored - offset))
        for piece in _inflated(inflater, data) if inflater else (data,):
            checksum, size = zlib.crc32(piece, checksum), size + len(piece)
            if size > member.size:
                break
            yield piece
    if size != member.size or checksum != member.checksum:
        raise WeightsError(f"{member.name} is damaged: its size or its checksum does not match")


def _inflated(inflater: Any, data: bytes) -> Iterator[bytes]:
    try:
        while data:
            yield inflater.decompress(data, _PIECE)
            data = inflater.unconsumed_tail
    except zlib.error:
        return  # what is missing then shows in the size and the checksum


def _unpack(form: str, data: bytes, offset: int = 0) -> tuple[Any, ...]:
    try:
        return struct.unpack_from("<" + form, data, offset)
    except struct.error:
        raise WeightsError("a damaged zip archive: it ends early") from None
