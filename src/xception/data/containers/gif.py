"""GIF: screen, palettes and the first picture (GIF89a)."""

from __future__ import annotations

import struct

from xception.data.containers.reader import MAX_PIECES, Payload, Reader, SizeCheck
from xception.errors import ImageError


def walk_gif(reader: Reader, check_size: SizeCheck) -> Payload:
    """Keeps the palettes, the transparent colour and the first picture."""
    screen = bytearray(reader.take(13))
    palette = reader.take(3 << (screen[10] & 7) + 1) if screen[10] & 0x80 else b""
    width, height = struct.unpack("<HH", screen[6:10])
    check_size(width, height)
    control = b""
    pieces = 0
    while True:
        introducer = reader.take(1)
        pieces += 1
        if introducer == b",":
            break
        if introducer == b";":
            raise ImageError("GIF without a picture")
        if introducer == b"!":
            label = reader.take(1)
            while count := reader.take(1)[0]:
                pieces += 1
                if label == b"\xf9" and count == 4:
                    flags, delay, transparent = struct.unpack("<BHB", reader.take(4))
                    control = struct.pack("<BBBBHBB", 0x21, 0xF9, 4, flags & 1, delay, transparent, 0)
                else:
                    reader.skip(count)
                if pieces > MAX_PIECES:
                    break
        if pieces > MAX_PIECES:
            raise ImageError(f"GIF with more than {MAX_PIECES} blocks before its first picture")
    descriptor = reader.take(9)
    left, top, frame_width, frame_height, flags = struct.unpack("<HHHHB", descriptor)
    # Pillow widens the screen to a frame that reaches beyond it; done here, so that the size is checked first.
    width, height = max(width, left + frame_width), max(height, top + frame_height)
    check_size(width, height)
    if max(width, height) > 0xFFFF:
        raise ImageError("damaged GIF: frame beyond the largest screen")
    screen[6:10] = struct.pack("<HH", width, height)
    local = reader.take(3 << (flags & 7) + 1) if flags & 0x80 else b""
    # A pixel takes at most one 12-bit code and one 12-bit clear code: later frames need not be read.
    pixels = reader.rest(limit=65_536 + 4 * frame_width * frame_height)
    return Payload("GIF", bytes(screen) + palette + control + b"," + descriptor + local + pixels, 1)
