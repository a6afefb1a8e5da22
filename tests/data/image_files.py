"""Small image files of every format and kind, made in memory, and what is known to be in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(height: int = 12, width: int = 16, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Smooth uint8 H W C, so that lossy formats stay close to it."""
    phases = np.random.default_rng(seed).uniform(0, 6, channels)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127.5 + 100 * np.sin(phase + x / 6 + y / 9) for phase in phases]
    return np.stack(waves, -1).round().astype(np.uint8)


def encode(image: Image.Image | np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (12, 16), format: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(picture(*size, seed=seed), format))
    return path


def write_classes(root: Path, counts: dict[str, int], size: tuple[int, int] = (12, 16)) -> Path:
    """ROOT/<class>/<n>.png, every image a different one."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            write_image(root / name / f"{index:03d}.png", seed=1000 * number + index, size=size)
    return root


def samples() -> dict[str, bytes]:
    """One small valid file of each kind that a decoder treats differently."""
    rgb = Image.fromarray(picture())
    grey, rgba, palette = rgb.convert("L"), rgb.convert("RGBA"), rgb.quantize(16)
    rgba.putalpha(grey)
    grey16 = Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16) * 300)
    real = Image.fromarray(np.linspace(0, 1, 192, dtype=np.float32).reshape(12, 16))
    frames: dict[str, Any] = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "jpeg": encode(rgb, "JPEG", exif=exif),
        "jpeg-progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg-grey": encode(grey, "JPEG"),
        "jpeg-cmyk": encode(rgb.convert("CMYK"), "JPEG"),
        "png": encode(rgb, exif=exif),
        "png-grey": encode(grey),
        "png-grey16": encode(grey16),
        "png-bits": encode(rgb.convert("1")),
        "png-palette": encode(palette, transparency=3),
        "png-rgba": encode(rgba),
        "png-la": encode(rgba.convert("LA")),
        "png-animated": encode(rgb, **frames),
        "webp": encode(rgb, "WEBP", exif=exif),
        "webp-lossless": encode(rgba, "WEBP", lossless=True),
        "webp-alpha": encode(rgba, "WEBP"),
        "webp-animated": encode(rgb, "WEBP", **frames),
        "gif": encode(palette, "GIF", transparency=2),
        "gif-animated": encode(palette, "GIF", save_all=True, append_images=[palette.rotate(90)], comment=b"c" * 300),
        "bmp": encode(rgb, "BMP"),
        "bmp-palette": encode(palette, "BMP"),
        "bmp-rle8": RLE8_BMP,
        "tiff": encode(rgb, "TIFF"),
        "tiff-float": encode(real, "TIFF"),
        "tiff-grey16": encode(grey16, "TIFF"),
        "tiff-cmyk": encode(rgb.convert("CMYK"), "TIFF"),
        "tiff-big": encode(rgb, "TIFF", big_tiff=True),
        "tiff-fax": encode(rgb.convert("1"), "TIFF", compression="group4"),
        "tiff-pages": encode(rgb, "TIFF", **frames),
    }
    for compression in ("packbits", "tiff_lzw", "tiff_adobe_deflate", "jpeg"):
        files[f"tiff-{compression}"] = encode(rgb, "TIFF", compression=compression)
    return files


def _rle8_bmp() -> bytes:
    """4 x 2 pixels of palette colours 0 and 1, run-length coded: rows, from the bottom, of 1 1 1 1 and 0 1 0 0."""
    palette = bytes([0, 0, 255, 0]) + bytes([0, 255, 0, 0])  # blue, green, red, unused: red, then green
    data = bytes([4, 1, 0, 0]) + bytes([1, 0, 1, 1, 2, 0, 0, 1])
    header = b"".join(
        n.to_bytes(size, "little")
        for n, size in ((40, 4), (4, 4), (2, 4), (1, 2), (8, 2), (1, 4), (len(data), 4), (0, 4), (0, 4), (2, 4), (0, 4))
    )
    offset = 14 + len(header) + len(palette)
    return (
        b"BM"
        + (offset + len(data)).to_bytes(4, "little")
        + bytes(4)
        + offset.to_bytes(4, "little")
        + header
        + (palette + data)
    )


RLE8_BMP = _rle8_bmp()
