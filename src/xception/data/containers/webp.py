"""WebP: canvas and first frame (RFC 9649)."""

from __future__ import annotations

import struct

from xception.data.containers.exif import exif_orientation
from xception.data.containers.reader import MAX_EXIF_BYTES, MAX_PIECES, Payload, Reader, SizeCheck
from xception.errors import ImageError

_KEPT = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")  # in the order in which they are written
_MAX_CANVAS_SHARE = 16  # canvas to first frame; the decoder fills several canvases, whatever the frame brings


def walk_webp(reader: Reader, check_size: SizeCheck) -> Payload:
    """Keeps the canvas and the first picture, of an animation its first frame."""
    reader.skip(12)
    kept: dict[bytes, bytes] = {}
    orientation = 1
    for _ in range(MAX_PIECES):
        if reader.left < 8:
            break
        kind, length = struct.unpack("<4sI", reader.take(8))
        if kind in _KEPT and kind not in kept:
            kept[kind] = reader.take(length)
            if kind in (b"VP8X", b"VP8 ", b"VP8L"):
                check_size(*_size(kind, kept[kind]))
        elif kind == b"EXIF" and length <= MAX_EXIF_BYTES and orientation == 1:
            orientation = exif_orientation(reader.take(length))
        else:
            reader.skip(min(length, reader.left))
        reader.skip(min(length & 1, reader.left))  # padding
    else:
        raise ImageError(f"WebP with more than {MAX_PIECES} chunks")

    if b"VP8X" in kept:
        flags, rest = kept[b"VP8X"][0], kept[b"VP8X"][1:10]
        kept[b"VP8X"] = bytes([flags & 0b0001_0010]) + rest  # alpha, animation; the other chunks are gone
        if b"ANMF" in kept:
            (width, height), (frame_width, frame_height) = (_size(kind, kept[kind]) for kind in (b"VP8X", b"ANMF"))
            if width * height > _MAX_CANVAS_SHARE * frame_width * frame_height:
                raise ImageError("WebP whose first frame is tiny on its canvas")
    body = b"".join(
        struct.pack("<4sI", kind, len(kept[kind])) + kept[kind] + b"\0" * (len(kept[kind]) & 1)
        for kind in _KEPT
        if kind in kept
    )
    return Payload("WebP", struct.pack("<4sI4s", b"RIFF", len(body) + 4, b"WEBP") + body, orientation)


def _size(kind: bytes, body: bytes) -> tuple[int, int]:
    """Width and height that a chunk states."""
    start = {b"VP8X": 4, b"ANMF": 6}.get(kind)
    if start is not None and len(body) >= start + 6:
        width, height = body[start : start + 3], body[start + 3 : start + 6]
        return 1 + int.from_bytes(width, "little"), 1 + int.from_bytes(height, "little")
    if kind == b"VP8 " and len(body) >= 10:
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    if kind == b"VP8L" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise ImageError("damaged WebP: short frame or header")
