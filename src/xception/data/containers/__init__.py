"""Image files taken apart: only what the pixels need reaches the decoder, and no size is believed unchecked.

Six walkers, one a file, read the structure of a file and hand on a small, clean copy of it: header, palette,
transparency, compressed pixels of the first frame. Texts, colour profiles, thumbnails, further frames and the like are
skipped without being read, so a bomb hidden in them costs nothing. Orientation is read here, from EXIF (JPEG, PNG,
WebP) or from the TIFF tag, because Pillow's own EXIF reader follows every pointer in it.

Why not leave this to Pillow: its guards are process-wide settings (`Image.MAX_IMAGE_PIXELS`, warning filters), which a
library used from threads cannot touch, and several of its header loops run byte by byte in Python, so that a crafted
64 MiB file keeps them busy for minutes. Every loop here is bounded by `MAX_PIECES`.

Sources: PNG (W3C, 3rd edition) section 5; ITU T.81 annex B; GIF89a; TIFF 6.0 section 2 and BigTIFF; RFC 9649 (WebP);
BITMAPFILEHEADER; CIPA DC-008 (EXIF) section 4.6.
"""

from __future__ import annotations

from collections.abc import Callable

from xception.data.containers.bmp import walk_bmp
from xception.data.containers.gif import walk_gif
from xception.data.containers.jpeg import walk_jpeg
from xception.data.containers.png import walk_png
from xception.data.containers.reader import Payload, Reader, SizeCheck
from xception.data.containers.tiff import walk_tiff
from xception.data.containers.webp import walk_webp
from xception.errors import ImageError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
)
"""Endings, in lower case, by which folders are searched for images; what a file holds decides how it is decoded."""

_Walk = Callable[[Reader, SizeCheck], Payload]
_FORMATS: tuple[tuple[Callable[[bytes], bool], _Walk], ...] = (
    (lambda start: start.startswith(b"\xff\xd8\xff"), walk_jpeg),
    (lambda start: start.startswith(b"\x89PNG\r\n\x1a\n"), walk_png),
    (lambda start: start.startswith(b"RIFF") and start[8:12] == b"WEBP", walk_webp),
    (lambda start: start.startswith((b"GIF87a", b"GIF89a")), walk_gif),
    (lambda start: start.startswith((b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0")), walk_tiff),
    (lambda start: start.startswith(b"BM"), walk_bmp),
)


def open_container(reader: Reader, check_size: SizeCheck) -> Payload:
    """Recognise the format by its content and reduce the file to what its pixels need.

    Raises `ImageError` for any other format, a structure that makes no sense, or a size that `check_size` refuses.
    """
    if reader.size == 0:
        raise ImageError("the file is empty")
    start = reader.rest(16)
    reader.skip(-len(start))
    for is_ours, walk in _FORMATS:
        if is_ours(start):
            return walk(reader, check_size)
    raise ImageError("not a JPEG, PNG, WebP, GIF, BMP or TIFF image")
