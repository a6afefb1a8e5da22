"""Image files -> RGB pixels, the same for every format, with limits checked before memory is taken.

Pillow does the decoding: one decoder for six formats under the same limits, where `torchvision.io` is deprecated and
knows four. It is given only the parts of a file that pixels need (`containers` says why), and its plugins are called
directly: `Image.open` would add its own size guard, a process-wide setting that warns or raises at sizes of its own.

What becomes of each kind of pixel:

| in the file                           | in the array                                                              |
| ------------------------------------- | ------------------------------------------------------------------------- |
| 8-bit RGB, YCbCr                      | as it is                                                                  |
| grey of 1, 2, 4, 8 bits               | R = G = B, spread over 0..255                                             |
| palette                               | the palette's colours                                                     |
| alpha, transparent palette entries,   | composited over white: round((c a + 255 (255 - a)) / 255)                 |
| transparent colour (PNG)              |                                                                           |
| CMYK, YCCK                            | R = (255 - C) (255 - K) / 255 and so on, as Pillow does, without profile; |
|                                       | four-channel JPEG is taken to be inverted, as Adobe writes it             |
| 16-bit grey, 32-bit integers (TIFF)   | round(v / 257); values outside 0..65535 are refused                       |
| 16-bit colour                         | the high byte                                                             |
| float grey (TIFF)                     | round(255 v); values outside 0..1 are refused                             |
| Lab and anything else                 | refused                                                                   |
| animations, several pages             | the first picture (APNG: the default picture)                             |

Colour profiles and gamma are ignored. The orientation in EXIF, or in TIFF's own tag, is applied (all eight).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib
import io
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from xception.data.containers import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from xception.data.containers import open_container
from xception.data.containers.reader import Format, Reader
from xception.data.labels import printable
from xception.errors import ConfigError, ImageError

Pixels = npt.NDArray[np.uint8]
Encoded: TypeAlias = bytes | bytearray | memoryview
Reduction: TypeAlias = Callable[[int, int], int]
"""Called with an upright picture's height and width; gives how many times smaller it may be: 1, 2, 4 or 8."""


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What a single image may cost. Both are checked before anything of that size is read or allocated."""

    max_bytes: int = 64 * 2**20
    """Size of the encoded file."""
    max_pixels: int = 100_000_000
    """Width times height; decoding takes up to about 10 bytes a pixel. For TIFF and WebP limits of Pillow's own come on
    top (`PIL.Image.MAX_IMAGE_PIXELS`, about 89 million, and twice that)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{field.name}: expected a whole number above 0, got {value!r}")


DEFAULT_LIMITS = DecodeLimits()


def decode_image(
    source: Encoded | str | os.PathLike[str] | BinaryIO,
    limits: DecodeLimits = DEFAULT_LIMITS,
    *,
    reduction: Reduction | None = None,
) -> Pixels:
    """Decode one JPEG, PNG, WebP, GIF, BMP or TIFF image.

    Args:
        source: The encoded bytes, a path, or a binary file, read from where it stands.
        limits: What is refused before decoding, by the size in the file.
        reduction: Allows JPEGs of grey or three colours to be decoded at a half, a quarter or an eighth of their size
            (rounded up), for which the decoder computes fewer pixels from each 8 x 8 block. Others come in full.

    Returns:
        uint8 H W 3, RGB, contiguous and writable.

    Raises:
        ImageError: Anything but one of these images, whole and within the limits; one line, without the file's name.
            Never another error, whatever the bytes. Only regular files are opened: a pipe or device cannot hang it.
    """
    try:
        if isinstance(source, bytes | bytearray | memoryview):
            return _decode(io.BytesIO(source), len(source), limits, reduction)
        if isinstance(source, str | os.PathLike):
            return _decode_path(source, limits, reduction)
        data = source.read(limits.max_bytes + 1)
        if not isinstance(data, bytes):
            raise ImageError(f"expected a binary file, got one that yields {type(data).__name__}")
        return _decode(io.BytesIO(data), len(data), limits, reduction)
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(f"cannot be read: {_one_line(error)}") from error
    except Exception as error:
        raise ImageError(f"cannot be decoded: {_one_line(error)}") from error


def rgb_pixels(image: Image.Image) -> Pixels:
    """An open Pillow image -> uint8 H W 3, by the table above; `ImageError` where that is not defined."""
    width, height = image.size
    transparency = image.info.get("transparency")
    convert = functools.partial(_convert, transparency=transparency)
    rows = max(1, _STRIP_PIXELS // width)
    if rows >= height:
        return convert(image)
    # Strip by strip, so that a large image is held once by Pillow and once here, without copies in between.
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = convert(image.crop((0, top, width, bottom)))
    return pixels


_STRIP_PIXELS = 4_000_000

_PLUGINS: dict[Format, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}


def _decode_path(path: str | os.PathLike[str], limits: DecodeLimits, reduction: Reduction | None) -> Pixels:
    _check_regular(os.stat(path))
    # Not blocking, in case a pipe has taken the file's place in the meantime; checked again on the open file.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        _check_regular(status)
        return _decode(stream, status.st_size, limits, reduction)


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = {
            stat.S_IFDIR: "a folder",
            stat.S_IFIFO: "a pipe",
            stat.S_IFSOCK: "a socket",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
        }.get(stat.S_IFMT(status.st_mode), "something else")
        raise ImageError(f"not a regular file but {kind}")


def _decode(stream: BinaryIO, size: int, limits: DecodeLimits, reduction: Reduction | None) -> Pixels:
    if size > limits.max_bytes:
        raise ImageError(f"file of more than {limits.max_bytes:,} bytes, the limit")

    payload = open_container(Reader(stream, size), functools.partial(_check_size, max_pixels=limits.max_pixels))
    max_pixels = limits.max_pixels
    if payload.format == "TIFF":
        _silence_libtiff()
        max_pixels = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)  # from there on the plugin itself warns
    try:
        with _PLUGINS[payload.format](io.BytesIO(payload.data)) as image:
            # Again: the header as the decoder reads it, should the two readings ever differ.
            _check_size(*image.size, max_pixels=max_pixels)
            if reduction is not None and payload.format == "JPEG":
                width, height = image.size[::-1] if payload.orientation >= 5 else image.size
                _reduce(image, reduction(height, width))
            image.load()
            return _turn(rgb_pixels(image), payload.orientation)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # by the plugin for WebP, which has a guard too
        raise ImageError("more pixels than Pillow's own limit for the format") from error
    except Exception as error:
        raise ImageError(f"damaged {payload.format}: {_one_line(error)}") from error


def _reduce(image: Image.Image, factor: int) -> None:
    """Have a JPEG that is open but not yet decoded decoded smaller by 2, 4 or 8 (1: as it is), its size rounded up."""
    # Four channels are left alone: their conversion to RGB is no linear one, so that it matters which comes first.
    if factor > 1 and image.mode in ("RGB", "L"):
        image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))


def _check_size(width: int, height: int, *, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError("the header states a size of nothing")
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels, over the limit of {max_pixels:,}")


def _convert(image: Image.Image, transparency: Any) -> Pixels:
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("integer grey values outside 0..65535")
        grey = (values * 255 + 32767) // 65535
        if isinstance(transparency, int):
            grey[values == transparency] = 255
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if mode == "F":
        floats = np.asarray(image)
        if not bool(((floats >= 0) & (floats <= 1)).all()):  # NaN fails both
            raise ImageError("floating-point grey values outside 0..1")
        return np.repeat((floats * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=2)
    if mode in ("La", "RGBa"):
        image, mode = image.convert(mode.upper()), mode.upper()
    if mode in ("RGBA", "LA", "PA") or (mode in ("P", "RGB", "L", "1") and transparency is not None):
        rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
        alpha = rgba[..., 3:]
        return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    if mode in ("RGB", "RGBX", "L", "1", "P", "CMYK", "YCbCr"):
        return np.array(image if mode == "RGB" else image.convert("RGB"))
    raise ImageError(f"pixels of an unsupported kind ({mode})")


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: row 0 of the result is the picture's top, column 0 its left (CIPA DC-008, 4.6.4)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


@functools.cache
def _silence_libtiff() -> None:
    """libtiff prints what it finds wrong, a line for each row of a damaged fax; the decoder's error says it once."""
    try:
        set_handler = ctypes.CDLL(str(importlib.import_module("PIL._imaging").__file__)).TIFFSetErrorHandler
    except (OSError, AttributeError):
        return  # linked in a way that hides it: noise, nothing worse
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    set_handler(None)


def _one_line(error: BaseException) -> str:
    """What a library said, fit for one line: no file names, no line breaks, no control characters."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno in errno.errorcode else "input/output error"
    text = printable(" ".join(str(error).split()))
    if not text or not isinstance(error, OSError | SyntaxError | ValueError):
        text = f"{type(error).__name__} {text}".rstrip()  # such as KeyError, whose text is the key alone
    return text if len(text) <= 160 else text[:157] + "..."
