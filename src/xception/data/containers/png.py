"""PNG: header, palette, transparency and pixels; no text, profiles or animation (W3C PNG, 3rd edition, section 5)."""

from __future__ import annotations

import struct
import zlib

from xception.data.containers.exif import exif_orientation
from xception.data.containers.reader import MAX_EXIF_BYTES, MAX_PIECES, Payload, Reader, SizeCheck
from xception.errors import ImageError


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def walk_png(reader: Reader, check_size: SizeCheck) -> Payload:
    """Keeps IHDR, PLTE, tRNS, IDAT and IEND, checksums verified; an animation is its default picture."""
    kept = [reader.take(8)]
    orientation = 1
    bits = colour = -1
    seen: set[bytes] = set()
    for _ in range(MAX_PIECES):
        if reader.left < 8:
            break  # no IEND: the decoder finds out whether pixels are missing
        length, kind = struct.unpack(">I4s", reader.take(8))
        if not seen and kind != b"IHDR":
            raise ImageError("damaged PNG: does not begin with its header")
        wanted = kind in (b"IHDR", b"PLTE", b"tRNS") and kind not in seen and b"IDAT" not in seen
        if kind == b"eXIf" and length <= MAX_EXIF_BYTES and orientation == 1:
            orientation = exif_orientation(reader.take(length))
            reader.skip(4)
        elif wanted or kind == b"IDAT":
            body = reader.take(length)
            if zlib.crc32(kind + body) != int.from_bytes(reader.take(4), "big"):
                raise ImageError(f"damaged PNG: wrong checksum of {kind.decode()}")
            if kind == b"IHDR":
                if length != 13:
                    raise ImageError("damaged PNG: header of the wrong length")
                width, height, bits, colour = struct.unpack(">IIBB", body[:10])
                check_size(width, height)
            if kind == b"tRNS":
                body = _png_transparency(body, bits, colour)
            if body or kind == b"IDAT":
                kept.append(_png_chunk(kind, body))
        elif kind == b"IEND":
            kept.append(_png_chunk(kind, b""))
            break
        else:
            reader.skip(length + 4)
        seen.add(kind)
    else:
        raise ImageError(f"PNG with more than {MAX_PIECES} chunks")
    return Payload("PNG", b"".join(kept), orientation)


def _png_transparency(body: bytes, bits: int, colour: int) -> bytes:
    """The colour key on the scale that Pillow expands pixels to; empty where it cannot be expressed."""
    if colour == 0 and bits in (2, 4) and len(body) == 2:
        highest = 2**bits - 1
        return int(255 // highest * (int.from_bytes(body, "big") & highest)).to_bytes(2, "big")
    if colour == 2 and bits == 16:
        return b""  # pixels are cut to their high byte, where a 16-bit key no longer means one colour
    return body
