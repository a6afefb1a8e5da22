"""BMP: as it is, once its header makes sense; it holds nothing but pixels."""

from __future__ import annotations

import struct

from xception.data.containers.reader import Payload, Reader, SizeCheck
from xception.errors import ImageError

_MAX_RLE = 4_000_000  # pixels and bytes of a run-length-coded BMP, which Pillow decodes in Python


def walk_bmp(reader: Reader, check_size: SizeCheck) -> Payload:
    """Keeps the whole file."""
    start = reader.take(18)
    header_size = int.from_bytes(start[14:18], "little")
    if header_size not in (12, 40, 52, 56, 64, 108, 124):
        raise ImageError("damaged BMP: header of an unknown kind")
    header = reader.take(header_size - 4)
    compression = 0
    if header_size == 12:
        width, height = struct.unpack("<HH", header[:4])
    else:
        width, height, _, _, compression = struct.unpack("<iiHHI", header[:16])
    check_size(width, abs(height))  # a negative height means rows from the top
    if compression in (1, 2) and max(width * abs(height), reader.left) > _MAX_RLE:
        raise ImageError(f"run-length-coded BMP over {_MAX_RLE} pixels or bytes")
    return Payload("BMP", start + header + reader.rest(), 1)
