"""TIFF and BigTIFF: the first picture and the tags that its pixels need (TIFF 6.0, section 2)."""

from __future__ import annotations

import struct
from typing import NamedTuple

from xception.data.containers.reader import MAX_PIECES, Payload, Reader, SizeCheck
from xception.errors import ImageError

_WIDTH, _LENGTH, _STRIPS, _SAMPLES, _ROWS_PER_STRIP, _PLANAR = 256, 257, 273, 277, 278, 284
_TILE_WIDTH, _TILE_LENGTH, _TILES = 322, 323, 324
_ORIENTATION = 274
# Tags that take one whole number: the ones above; compression, photometric interpretation, fill order, fax options,
# predictor, ink set, chroma positioning.
_SINGLE = {_WIDTH, _LENGTH, _SAMPLES, _ROWS_PER_STRIP, _PLANAR, _TILE_WIDTH, _TILE_LENGTH, _ORIENTATION}
_SINGLE |= {259, 262, 266, 292, 293, 317, 332, 531}
# Tags that take several: offsets and byte counts of strips and tiles; bits a sample, colour map, extra samples, sample
# format, JPEG tables new and old, chroma matrix, subsampling, reference black and white.
_MANY = {_STRIPS, 279, _TILES, 325, 258, 320, 338, 339, 347, *range(512, 522), 529, 530, 532}

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8}
_WHOLE_NUMBERS = {3, 4, 16}
_MAX_VALUES = 262_144  # numbers in one tag; strip offsets are the longest
_MAX_SAMPLES = 6  # a pixel; Pillow's limit, which it would report on standard error


class _Layout(NamedTuple):
    """How a directory is written: number of entries; entries of tag, type, count, value or offset; next directory."""

    order: str
    head: str
    entry: str
    pointer: str
    pointer_at: int

    @property
    def inline(self) -> int:
        """Bytes of values that stand in the entry itself."""
        return struct.calcsize(self.order + self.pointer)


def walk_tiff(reader: Reader, check_size: SizeCheck) -> Payload:
    """The file with its directory replaced by a new one at the end, which has only the tags that matter to pixels."""
    start = reader.take(4)
    order = "<" if start.startswith(b"II") else ">"
    big = start in (b"II+\0", b"MM\0+")
    layout = _Layout(order, "Q", "HHQ8s", "Q", 8) if big else _Layout(order, "H", "HHI4s", "I", 4)
    kept, numbers, counts = _read_directory(reader, layout)
    check_size(numbers.get(_WIDTH, 0), numbers.get(_LENGTH, 0))
    check_size(numbers.get(_TILE_WIDTH, 1), numbers.get(_TILE_LENGTH, 1))  # a tile is decoded whole
    _check_pieces(numbers, counts)

    reader.skip(-reader.position)
    data = bytearray(reader.rest())
    data += b"\0" * (len(data) % 2)
    struct.pack_into(order + layout.pointer, data, layout.pointer_at, len(data))
    data += struct.pack(order + layout.head, len(kept)) + b"".join(kept[tag] for tag in sorted(kept))
    data += struct.pack(order + layout.pointer, 0)  # no further picture
    orientation = numbers.get(_ORIENTATION, 1)
    return Payload("TIFF", bytes(data), orientation if 1 <= orientation <= 8 else 1)


def _read_directory(reader: Reader, layout: _Layout) -> tuple[dict[int, bytes], dict[int, int], dict[int, int]]:
    """Of the first directory: entries to keep, values of the tags that have one, numbers of values of all."""
    order = layout.order
    reader.skip(layout.pointer_at - reader.position)
    (start,) = struct.unpack(order + layout.pointer, reader.take(layout.inline))
    reader.skip(start - reader.position)
    (entries,) = struct.unpack(order + layout.head, reader.take(struct.calcsize(order + layout.head)))
    if entries > MAX_PIECES:
        raise ImageError(f"TIFF with more than {MAX_PIECES} tags")
    kept: dict[int, bytes] = {}
    numbers: dict[int, int] = {}
    counts: dict[int, int] = {}
    outside = 0
    for _ in range(entries):
        entry = reader.take(struct.calcsize(order + layout.entry))
        tag, kind, count, value = struct.unpack(order + layout.entry, entry)
        if tag in counts or count == 0 or (tag not in _SINGLE and tag not in _MANY):
            continue
        unit = _TYPE_BYTES.get(kind)
        if unit is None or (unit > 1 and count > _MAX_VALUES):
            raise ImageError(f"damaged TIFF: tag {tag} of an unknown type or with too many values")
        if tag in _SINGLE:
            if kind not in _WHOLE_NUMBERS or count != 1 or unit > layout.inline:
                raise ImageError(f"damaged TIFF: tag {tag} is not one whole number")
            numbers[tag] = int.from_bytes(value[:unit], "little" if order == "<" else "big")
        elif unit * count > layout.inline:
            (offset,) = struct.unpack(order + layout.pointer, value)
            outside += unit * count
            if offset + unit * count > reader.size or outside > reader.size:
                raise ImageError(f"damaged TIFF: tag {tag} lies outside the file")
        counts[tag] = count
        if tag != _ORIENTATION:  # we turn pictures of all formats alike; Pillow would have turned it already
            kept[tag] = entry
    return kept, numbers, counts


def _check_pieces(numbers: dict[int, int], counts: dict[int, int]) -> None:
    """The strips or tiles must cover the image, which decoders leave black otherwise, and no more than that: surplus
    ones would be decoded on top of each other, for hours."""
    width, length, samples = numbers[_WIDTH], numbers[_LENGTH], numbers.get(_SAMPLES, 1)
    if samples > _MAX_SAMPLES:
        raise ImageError(f"TIFF with {samples} samples a pixel; at most {_MAX_SAMPLES} are supported")
    planes = max(samples, 3) if numbers.get(_PLANAR) == 2 else 1
    for tag, rows, columns in (
        (_STRIPS, numbers.get(_ROWS_PER_STRIP, length), width),
        (_TILES, numbers.get(_TILE_LENGTH, length), numbers.get(_TILE_WIDTH, width)),
    ):
        cover = -(-length // max(rows, 1)) * -(-width // max(columns, 1))
        if tag in counts and not cover <= counts[tag] <= cover * planes:
            raise ImageError(f"damaged TIFF: {counts[tag]} strips or tiles, where the image takes {cover}")
