"""What is where in an uncompressed tar: names, offsets and sizes of its files, read from the headers alone.

Nothing is extracted and no name becomes a path, so that '../x', absolute names and links reach nothing. Why not
`tarfile`: it takes a header's word for how much of it to read into memory, guesses at what it cannot read, and takes a
file that breaks off for one that ends. Here the limits come first, and a shard that is damaged or truncated is refused.

Read are ustar, GNU and pax headers (POSIX.1-2017, pax, "ustar Interchange Format"): regular files; folders are passed
over. Links, devices and sparse files have no place among samples and are refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from xception.data.labels import printable
from xception.errors import DataError

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 16  # a long name, or a pax header
MAX_NAME = 4096
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    """Of its first byte in the tar."""
    size: int


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on, fewer where the file ends."""
    file.seek(offset)
    return file.read(size)


def read_members(file: BinaryIO, shown: str) -> Iterator[Member]:
    """The regular files of an open tar, in order; `shown` names it in errors. Opened without a buffer it is faster.

    Raises:
        DataError: Compressed, damaged, truncated, without the mark of its end, or with members that are no files.
    """
    end = file.seek(0, os.SEEK_END)
    _check_not_compressed(read_at(file, 0, 6), shown)
    position, long_name, pax = 0, None, _Pax()
    while True:
        header = read_at(file, position, BLOCK)
        if len(header) < BLOCK:
            raise DataError(f"{shown}: truncated: it breaks off at byte {position + len(header):,}, without its end")
        if not any(header):
            _check_nothing_follows(file, position, shown)
            return
        where = f"{shown}, byte {position:,}"
        _check_sum(header, where)
        kind, size = header[156:157], _number(header[124:136], where)
        start = position + BLOCK
        if kind in b"xgLK":
            if size > MAX_EXTENSION_BYTES:
                raise DataError(f"{where}: a header of {size:,} bytes, more than {MAX_EXTENSION_BYTES:,}")
            text = read_at(file, start, size)
            if len(text) < size:
                raise DataError(f"{where}: truncated: it breaks off within a header")
            if kind == b"L":
                long_name = text.rstrip(b"\0")
            elif kind in b"xg":
                found = _parse_pax(text, where)
                if kind == b"g" and found != _Pax():
                    raise DataError(f"{where}: a name or size for all members, which cannot be")
                pax = found if kind == b"x" else pax
        else:
            size = size if pax.size is None else pax.size
            name = pax.path or long_name or _short_name(header)
            if len(name) > MAX_NAME:
                raise DataError(f"{where}: a name of {len(name):,} bytes, more than {MAX_NAME:,}")
            if kind == b"5" or (kind == b"\0" and name.endswith(b"/")):
                size = 0  # a folder
            else:
                member = Member(name.decode("utf-8", "surrogateescape"), start, size)
                _check_plain(member, kind, end, where)
                yield member
            long_name, pax = None, _Pax()
        position = start + -(-size // BLOCK) * BLOCK


def _check_not_compressed(first: bytes, shown: str) -> None:
    for magic, program in _COMPRESSED.items():
        if first.startswith(magic):
            raise DataError(
                f"{shown}: is compressed ({program}), but images are read from anywhere in it: unpack it to a .tar"
            )


def _check_sum(header: bytes, where: str) -> None:
    """The sum of a header's bytes, its own field taken as spaces; old programs summed signed bytes."""
    field, rest = header[148:156], header[:148] + header[156:]
    unsigned = sum(rest) + 8 * ord(" ")
    signed = unsigned - 256 * sum(byte > 127 for byte in rest)
    if not field.strip(b"\0 ") or _number(field, where) not in (unsigned, signed):
        raise DataError(f"{where}: expected a tar header, got something else: not a tar, or damaged")


def _check_plain(member: Member, kind: bytes, end: int, where: str) -> None:
    shown = f"member {printable(member.name)!r}"
    if kind not in (b"0", b"\0", b"7"):
        what = _KINDS.get(kind, f"of an unknown kind ({kind!r})")
        raise DataError(f"{where}: {shown} is {what}; expected plain files only")
    if member.offset + member.size > end:
        raise DataError(
            f"{where}: truncated: {shown} should end at byte {member.offset + member.size:,}, the file has {end:,}"
        )


def _check_nothing_follows(file: BinaryIO, position: int, shown: str) -> None:
    """What stands behind the end is not read, as by any program; tars joined by `cat` would lose all but the first."""
    while block := read_at(file, position, 1 << 20):
        if block.count(0) < len(block):
            raise DataError(
                f"{shown}: has something behind its end, at byte {position:,} or later: several tars joined?"
            )
        position += len(block)


class _Pax(NamedTuple):
    """The records of a pax header that matter here."""

    path: bytes | None = None
    size: int | None = None


def _parse_pax(text: bytes, where: str) -> _Pax:
    """Records of the form b"<length> <key>=<value>\\n", the length being that of the whole record."""
    path, size, at = None, None, 0
    while at < len(text):
        digits, space, _ = text[at : at + 8].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = text[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not space or length <= len(digits) + 2 or len(record) < length or record[-1:] != b"\n" or not equals:
            raise DataError(f"{where}: a malformed pax header")
        if key == b"path":
            path = value
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise DataError(f"{where}: a pax header with a size that is no number")
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise DataError(f"{where}: a sparse file; expected plain files only")
        at += length
    return _Pax(path, size)


def _short_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(field: bytes, where: str) -> int:
    """Octal digits, or for what does not fit in them base 256 with the top bit set (GNU)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    if digits.strip(b"01234567"):
        raise DataError(f"{where}: expected a tar header, got one with a number that is none: not a tar, or damaged")
    return int(digits or b"0", 8)
