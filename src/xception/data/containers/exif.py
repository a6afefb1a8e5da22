"""Orientation, the one thing in EXIF that pixels need (CIPA DC-008, 4.6)."""

from __future__ import annotations

import struct


def exif_orientation(data: bytes) -> int:
    """The orientation, 1 to 8, that an EXIF block states; 1 where it states none or is damaged."""
    data = data.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
        for i in range(count):
            tag, kind, number, value = struct.unpack_from(order + "HHIH", data, start + 2 + 12 * i)
            if tag == 0x0112:
                return value if kind == 3 and number == 1 and 1 <= value <= 8 else 1
    except struct.error:
        pass  # a damaged EXIF block is no reason to refuse the picture
    return 1
