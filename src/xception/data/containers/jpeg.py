"""JPEG: tables, frame header, the segments that say how colours are coded, and the scans (ITU T.81, annex B)."""

from __future__ import annotations

import struct

from xception.data.containers.exif import exif_orientation
from xception.data.containers.reader import MAX_PIECES, Payload, Reader, SizeCheck
from xception.errors import ImageError

_MAX_HEADER = 1 << 18  # bytes of tables before the first scan; real files hold about one thousand
_MAX_SCANNED = 4_000_000_000  # pixels times scans: about three seconds of libjpeg
_PIXELS_PER_BYTE = 1024  # a Huffman-coded 8 x 8 block takes at least one bit: 512, doubled for safety

_TABLES = {0xC4, 0xCC, 0xDB, 0xDD}  # Huffman, arithmetic, quantization, restart interval
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_APPLICATIONS = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}  # what says how colours are coded
_BARE = {0x01, *range(0xD0, 0xD9)}  # markers without a body


def walk_jpeg(reader: Reader, check_size: SizeCheck) -> Payload:
    """Keeps what decoding needs up to the first scan, and everything from there on."""
    kept = [reader.take(2)]
    header_bytes = 0
    orientation = 1
    pixels = 0
    arithmetic = False
    for _ in range(MAX_PIECES):
        if reader.take(1) != b"\xff":
            continue  # stray bytes between segments are skipped, as decoders do
        marker = reader.take(1)[0]
        if marker == 0xFF:
            reader.skip(-1)  # a fill byte; the second one may begin the marker
            continue
        if marker == 0 or marker in _BARE:
            continue
        if marker == 0xD9:
            raise ImageError("damaged JPEG: ends before its pixels")
        length = int.from_bytes(reader.take(2), "big")
        if length < 2:
            raise ImageError("damaged JPEG: segment of impossible length")
        keep = marker in _TABLES or marker in _FRAMES or marker == 0xDA
        if not keep and marker not in (0xE0, 0xE1, 0xEE):
            reader.skip(length - 2)
            continue
        body = reader.take(length - 2)
        if marker in _FRAMES:
            if pixels or len(body) < 6:
                raise ImageError("damaged JPEG: more than one frame header, or a short one")
            height, width = struct.unpack(">HH", body[1:5])
            check_size(width, height)
            pixels = width * height
            arithmetic = marker >= 0xC9
        elif marker == 0xE1:
            if body.startswith(b"Exif\0\0") and orientation == 1:
                orientation = exif_orientation(body)
            continue
        elif not body.startswith(_APPLICATIONS.get(marker, b"")):
            continue
        kept.append(struct.pack(">BBH", 0xFF, marker, length) + body)
        header_bytes += length
        if header_bytes > _MAX_HEADER:
            raise ImageError("JPEG with oversized tables")
        if marker == 0xDA:
            break
    else:
        raise ImageError(f"JPEG with more than {MAX_PIECES} segments or stray bytes before its pixels")
    scans = reader.rest()
    # Each scan of a progressive file goes over the whole image again, however few bytes it takes.
    if pixels * (1 + scans.count(b"\xff\xda")) > _MAX_SCANNED:
        raise ImageError("JPEG with too many scans for its size")
    if not arithmetic and pixels > _PIXELS_PER_BYTE * (len(scans) + 64):
        raise ImageError("truncated file")
    kept.append(scans)
    return Payload("JPEG", b"".join(kept), orientation)
