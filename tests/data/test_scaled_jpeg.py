"""JPEG decoded at a fraction of its size: when that may be, how near it comes, and that nothing else changes."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
import torch
from image_files import encode, picture, samples
from PIL import Image

from xception.data.decode import DecodeLimits, decode_image
from xception.data.preprocess import Preprocess
from xception.errors import ImageError

FACTORS = (1, 2, 4, 8)


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Noise of a spectrum that falls with the frequency, as photographs have it, with a few sharp edges."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    layers = []
    for _ in range(3):
        spectrum = np.fft.rfft2(generator.normal(size=(height, width))) / np.maximum(frequency, 1)
        layer = np.fft.irfft2(spectrum, s=(height, width))
        layers.append(layer / layer.std())
    pixels = 128 + 45 * np.stack(layers, -1)
    y, x = np.mgrid[0:height, 0:width]
    pixels[(y * 3 + x * 2) % 700 < 90] += 70
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("options", "height", "width", "factor"),
    [
        ({}, 1200, 1600, 4),
        ({}, 1199, 1600, 1),
        ({}, 1196, 1604, 2),
        ({}, 600, 800, 2),
        ({}, 592, 800, 1),
        ({}, 3200, 2400, 8),
        ({}, 20_000, 24_000, 8),
        ({}, 1200, 9608, 1),  # cut to an eighth of its length before it is resized
        ({"crop_fraction": 0.5}, 1200, 1600, 2),
        ({"resize": "squash"}, 600, 3000, 2),
        ({"interpolation": "bicubic"}, 1200, 1600, 4),
        ({"interpolation": "nearest"}, 1200, 1600, 1),
        ({}, 1, 1, 1),
    ],
)
def test_when_an_image_may_be_smaller(options: dict[str, Any], height: int, width: int, factor: int) -> None:
    """The resize to 150 still halves it, and its sides divide."""
    preprocess = Preprocess(size=(150, 150), **options)
    assert preprocess.reduction(height, width) == factor


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 95}])
def test_a_reduced_image_is_the_mean_of_the_full_one(factor: int, options: dict[str, Any]) -> None:
    pixels = picture(160, 240)
    data = encode(pixels, "JPEG", **{"quality": 90, **options})
    seen: list[tuple[int, int]] = []

    def reduction(height: int, width: int) -> int:
        seen.append((height, width))
        return factor

    found = decode_image(data, reduction=reduction)
    assert seen == [(160, 240)]
    assert found.shape == (160 // factor, 240 // factor, 3)
    assert found.flags.writeable
    full = decode_image(data).astype(float)
    means = full.reshape(160 // factor, factor, 240 // factor, factor, 3).mean((1, 3))
    assert np.abs(found - means).mean() < 2
    if factor == 1:
        assert np.array_equal(found, full)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int, factor: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(64, 96), "JPEG", exif=exif, quality=95)
    full = decode_image(data)
    height, width = full.shape[:2]
    seen: list[tuple[int, int]] = []
    found = decode_image(data, reduction=lambda h, w: seen.append((h, w)) or factor)
    assert seen == [(height, width)]
    means = full.reshape(height // factor, factor, width // factor, factor, 3).astype(float).mean((1, 3))
    assert found.shape == means.shape
    assert np.abs(found - means).mean() < 4


def test_sizes_that_do_not_divide_are_rounded_up() -> None:
    for height, width in ((1, 1), (9, 8), (17, 33), (1, 100)):
        for factor in FACTORS if min(height, width) > 1 else (1,):
            data = encode(picture(height, width), "JPEG")
            found = decode_image(data, reduction=lambda h, w, factor=factor: factor)
            assert found.shape == (-(-height // factor), -(-width // factor), 3)


@pytest.mark.parametrize("name", samples())
def test_only_jpeg_of_one_or_three_channels(name: str) -> None:
    data = samples()[name]
    full = decode_image(data)
    for reduction in (None, lambda h, w: 1):
        assert np.array_equal(decode_image(data, reduction=reduction), full)
    found = decode_image(data, reduction=lambda h, w: 4)
    reduced = name.startswith("jpeg") and "cmyk" not in name
    assert (found.shape == full.shape) is not reduced
    if not reduced:
        assert np.array_equal(found, full)


def test_limits_are_on_the_size_in_the_file() -> None:
    data = encode(picture(80, 100), "JPEG")
    for limits in (DecodeLimits(max_pixels=7999), DecodeLimits(max_bytes=len(data) - 1)):
        with pytest.raises(ImageError, match="limit"):
            decode_image(data, limits, reduction=lambda h, w: pytest.fail("asked before the limits were checked"))
    huge = data.replace(struct.pack(">HH", 80, 100), struct.pack(">HH", 60_000, 60_000))
    assert huge != data
    with pytest.raises(ImageError, match="limit"):
        decode_image(huge, reduction=lambda h, w: 8)


def test_damaged_files_are_refused_alike() -> None:
    data = encode(photograph(128, 128), "JPEG", quality=95)
    generator = np.random.default_rng(0)
    refused = 0
    for trial in range(300):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 3):
            damaged[place] ^= int(generator.integers(1, 256))
        cut = bytes(damaged[: int(generator.integers(1, len(data)))] if trial % 3 == 0 else damaged)
        try:
            found = decode_image(io.BytesIO(cut), reduction=lambda h, w: 4)
        except ImageError:
            refused += 1
        else:
            assert found.ndim == 3
    assert refused > 20


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize(("height", "width", "factor"), [(960, 1280, 4), (640, 1000, 2), (1600, 2000, 8)])
def test_the_inputs_hardly_differ(resize: Any, height: int, width: int, factor: int) -> None:
    """By far less than between two filters of the resize, and everything stays in its place."""
    size = (height // (2 * factor) - 2, height // (2 * factor) - 2)
    preprocess = Preprocess(size=size, resize=resize)
    assert preprocess.reduction(height, width) == factor
    data = encode(photograph(height, width), "JPEG", quality=90)
    full = preprocess.geometry(decode_image(data))
    reduced = decode_image(data, reduction=preprocess.reduction)
    assert reduced.shape == (height // factor, width // factor, 3)
    found = preprocess.geometry(reduced)
    assert found.shape == full.shape
    other = Preprocess(size=size, resize=resize, interpolation="bicubic").geometry(decode_image(data))
    ours, filters = (float((x.float() - full.float()).square().mean().sqrt()) for x in (found, other))
    assert ours < 0.6 * filters
    shifted = torch.roll(full, 1, dims=2)
    assert float((found.float() - shifted.float()).square().mean().sqrt()) > 3 * ours
