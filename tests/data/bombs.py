"""Files made to cost far more than they weigh."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Iterator

from image_files import encode, picture


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes, data: bytes | None = None, colour: int = 0) -> bytes:
    """A PNG of 8-bit pixels with `extra` chunks before the data; a valid one, black, where `data` is left out."""
    if data is None:
        data = zlib.compress(bytes(height * (width + 1)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@functools.cache
def inflating(mib: int) -> bytes:
    """Zeros, compressed a thousandfold."""
    compressor = zlib.compressobj()
    return b"".join(compressor.compress(bytes(1 << 20)) for _ in range(mib)) + compressor.flush()


def jpeg_parts() -> tuple[bytes, bytes]:
    """A progressive JPEG cut behind its first marker."""
    data = encode(picture(), "JPEG", progressive=True)
    return data[:2], data[2:]


def jpeg_with_size(width: int, height: int, **options: object) -> bytes:
    data = bytearray(encode(picture(), "JPEG", **options))
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def progressive_of_many_scans(scans: int) -> bytes:
    """A few bytes a scan, each of which goes over all coefficients of a 4000 x 4000 image."""
    data = jpeg_with_size(4000, 4000, progressive=True)
    empty = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 63, 0x10) + b"\0" * 16
    return data[:-2] + empty * scans + data[-2:]


def gif_of_many_frames(frames: int) -> bytes:
    data = encode(picture()[..., 0], "GIF")
    start = 13 + (3 << (data[10] & 7) + 1)
    return data[:start] + data[start:-1] * frames + b";"


def gif_of_many_comments(blocks: int) -> bytes:
    data = encode(picture()[..., 0], "GIF")
    start = 13 + (3 << (data[10] & 7) + 1)
    return data[:start] + b"!\xfe" + b"\x01c" * blocks + b"\0" + data[start:]


def apng_of_many_frames(frames: int) -> bytes:
    control = chunk(b"acTL", struct.pack(">II", frames, 0))
    data = png(16, 12, control)
    frame = b"".join(
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 2 * n, 16, 12, 0, 0, 1, 10, 0, 0))
        + chunk(b"fdAT", struct.pack(">I", 2 * n + 1) + zlib.compress(bytes(12 * 17)))
        for n in range(frames)
    )
    return data[:-12] + frame + data[-12:]


def tiff(entries: list[tuple[int, int, int, int]], tail: bytes = b"", next_directory: int = 0) -> bytes:
    """A little-endian TIFF: (tag, type, count, value or offset) each, followed by `tail`."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", next_directory) + tail


def tiff_of(width: int, height: int, *extra: tuple[int, int, int, int], tail: bytes = b"") -> bytes:
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1)]
    known = {entry[0] for entry in extra}
    return tiff(sorted([*(e for e in entries if e[0] not in known), *extra]), tail)


def bmp_rle(width: int, height: int, data: bytes) -> bytes:
    header = struct.pack("<IiiHHIIIIII", 40, width, height, 1, 8, 1, len(data), 0, 0, 2, 0)
    return b"BM" + struct.pack("<III", 62 + len(data), 0, 62) + header + bytes(8) + data


def webp_canvas(width: int, height: int) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0])
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def bombs() -> Iterator[tuple[str, bytes]]:
    """Name and bytes; names that begin with 'fine' are valid images that hide something expensive."""
    start, rest = jpeg_parts()
    yield "png of 100,000 x 100,000", png(100_000, 100_000, data=inflating(10))
    yield "jpeg of 65,500 x 65,500", jpeg_with_size(65_500, 65_500)
    yield "jpeg whose bytes cannot hold its pixels", jpeg_with_size(9_000, 9_000)
    yield "gif of 65,535 x 65,535", b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0)
    yield "webp of 16,000,000 x 16", webp_canvas(16_000_000, 16)
    yield (
        "bmp of 2 giga x 2 giga",
        b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 2**31 - 1, 2**31 - 1, 1, 24, 0) + bytes(20),
    )
    yield "tiff of 100,000 x 100,000", tiff_of(100_000, 100_000)
    yield "tiff with a tile of 100,000 x 100,000", tiff_of(9, 9, (322, 4, 1, 100_000), (323, 4, 1, 100_000))
    yield "tiff of a million strips", tiff_of(9, 1_000_000, (273, 4, 1_000_000, 200), tail=bytes(4_000_100))
    yield (
        "tiff of strips on top of each other",
        tiff_of(1000, 1000, (278, 4, 1, 999), (273, 4, 1000, 200), tail=bytes(5000)),
    )
    yield "fine: png with text that inflates to 200 MiB", png(16, 12, chunk(b"zTXt", b"k\0\0" + inflating(200)))
    yield "fine: png with 40 MiB of text", png(16, 12, chunk(b"tEXt", b"k\0" + b"t" * (1 << 20)) * 40)
    yield "fine: png with a profile that inflates to 200 MiB", png(16, 12, chunk(b"iCCP", b"k\0\0" + inflating(200)))
    yield "fine: jpeg with 40 MiB of comments", start + (b"\xff\xfe\xff\xff" + b"c" * 65_533) * 640 + rest
    yield "fine: jpeg with 40 MiB of EXIF", start + (b"\xff\xe1\xff\xffExif\0\0" + b"c" * 65_527) * 640 + rest
    yield "fine: gif of 10,000 frames", gif_of_many_frames(10_000)
    yield "fine: png of 10,000 frames", apng_of_many_frames(10_000)
    yield (
        "fine: tiff that points to itself",
        tiff([(256, 4, 1, 4), (257, 4, 1, 2), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8)], next_directory=8),
    )
    yield "gif of 5 million one-byte comments", gif_of_many_comments(5_000_000)
    yield "png of 2 million chunks", png(16, 12, chunk(b"abCd", b"") * 2_000_000)
    yield "jpeg after 20 MiB of stray bytes", start + b"\xff\xfe\0\2" + bytes(20 << 20) + rest
    yield "jpeg with 20 MiB of tables", start + (b"\xff\xdb" + struct.pack(">H", 65_522) + bytes(65_520)) * 320 + rest
    yield "jpeg of 100,000 scans", progressive_of_many_scans(100_000)
    yield "bmp of 50 million run-length-coded pixels", bmp_rle(10_000, 5_000, b"\1\0" * 1000)
    yield "bmp of 10 million runs of nothing", bmp_rle(1, 2, b"\1\0" * 10_000_000)
