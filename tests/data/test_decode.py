"""Every kind of pixel becomes what the table in decode.py says, and Pillow's own reading agrees where it is defined."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from bombs import chunk
from image_files import RLE8_BMP, encode, picture, samples
from PIL import Image, ImageOps, PngImagePlugin

from xception.data import containers
from xception.data.containers.exif import exif_orientation
from xception.data.decode import decode_image, rgb_pixels
from xception.errors import ImageError

LOSSLESS = [
    ("PNG", {}),
    ("PNG", {"interlace": True}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "packbits"}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", {"big_tiff": True}),
    ("WEBP", {"lossless": True, "exact": True}),
]


@pytest.mark.parametrize(("format", "options"), LOSSLESS)
@pytest.mark.parametrize(("height", "width"), [(12, 16), (1, 1), (1, 50), (50, 1), (33, 17), (300, 200)])
def test_lossless_formats_give_back_the_pixels(format: str, options: dict, height: int, width: int) -> None:
    pixels = picture(height, width)
    assert np.array_equal(decode_image(encode(pixels, format, **options)), pixels)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"quality": 30}, {"subsampling": 0}, {"restart_marker_rows": 1}]
)
def test_jpeg_is_what_pillow_makes_of_the_whole_file(options: dict) -> None:
    profile = bytes(100 if "progressive" in options else 70_000)  # more makes older Pillows fail to write it
    data = encode(picture(40, 56), "JPEG", comment=b"x" * 500, icc_profile=profile, **options)
    assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("name", samples())
def test_the_reduced_file_decodes_like_the_whole_one(name: str) -> None:
    data = samples()[name]
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
        assert np.array_equal(decode_image(data), rgb_pixels(image))


def test_paths_bytes_and_files_are_alike(tmp_path) -> None:
    data = encode(picture())
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with open(path, "rb") as file:
        for source in (data, bytearray(data), memoryview(data), path, str(path), io.BytesIO(data), file):
            assert np.array_equal(decode_image(source), picture())
    with pytest.raises(ImageError, match="binary"):
        decode_image(io.StringIO("text"))  # type: ignore[arg-type]


def test_the_result_belongs_to_the_caller() -> None:
    data = encode(picture())
    first = decode_image(data)
    first[:] = 0
    assert np.array_equal(decode_image(data), picture())


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_are_undone(format: str, orientation: int) -> None:
    """An upright picture of four colours, stored turned as each orientation says (CIPA DC-008, tag 274)."""
    upright = np.kron(
        np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8), np.ones((32, 48, 1), np.uint8)
    )
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = decode_image(encode(np.ascontiguousarray(stored), format, exif=exif))
    assert got.shape == upright.shape
    assert np.abs(got[8::16, 8::16].astype(int) - upright[8::16, 8::16]).max() < 16


def test_exif_behind_the_pixels_of_a_png_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encode(picture())
    moved = data[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[-12:]
    assert np.array_equal(decode_image(moved), picture()[::-1, ::-1])


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_found_in_both_byte_orders(order: str) -> None:
    start = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(order + "HHIHH", 0x010F, 3, 1, 9, 0) + struct.pack(order + "HHIHH", 0x0112, 3, 1, 6, 0)
    block = start + struct.pack(order + "IH", 8, 2) + entries
    assert exif_orientation(block) == 6
    assert exif_orientation(b"Exif\0\0" + block) == 6


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_makes_no_sense_is_none(value: int) -> None:
    block = b"II*\0" + struct.pack("<IHHHIHH", 8, 1, 0x0112, 3, 1, value, 0)
    assert exif_orientation(block) == 1


def test_damaged_exif_leaves_the_picture_as_it_is() -> None:
    good = b"II*\0" + struct.pack("<IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0)
    assert exif_orientation(good) == 6
    blocks = [good[:n] for n in range(len(good) - 2)] + [b"II*\0\xff\xff\xff\xff", b"", b"XX*\0" + good[4:]]
    assert {exif_orientation(block) for block in blocks} == {1}
    data = encode(picture(), "PNG", exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\xff")
    assert np.array_equal(decode_image(data), picture())


def test_grey_is_repeated() -> None:
    grey = picture(channels=1)
    for format in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(decode_image(encode(grey, format)), np.repeat(grey, 3, 2))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_is_spread_over_the_range(bits: int) -> None:
    levels = 2**bits
    values = np.arange(16) % levels
    packed = np.packbits([[value >> bit & 1 for bit in reversed(range(bits))] for value in values])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 1, bits, 0, 0, 0, 0))

    def png(*extra: bytes) -> bytes:
        data = chunk(b"IDAT", zlib.compress(b"\0" + packed.tobytes()))
        return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + chunk(b"IEND", b"")

    expected = values * 255 // (levels - 1)
    assert np.array_equal(decode_image(png())[0, :, 0], expected)
    key = chunk(b"tRNS", struct.pack(">H", levels - 2))  # the colour that is to be transparent, hence white
    assert np.array_equal(decode_image(png(key))[0, :, 0], np.where(values == levels - 2, 255, expected))


def test_bitmaps_are_black_and_white() -> None:
    bits = Image.fromarray(picture(channels=1)[..., 0]).convert("1")
    expected = np.repeat(np.asarray(bits)[..., None] * np.uint8(255), 3, 2)
    for format, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "group4"})):
        assert np.array_equal(decode_image(encode(bits, format, **options)), expected)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_rounded_to_eight(format: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(values / 257).astype(np.uint8)  # exact: no value lies halfway, 257 being odd
    got = decode_image(encode(Image.fromarray(values), format))
    assert np.array_equal(got, np.repeat(expected[..., None], 3, 2))


@pytest.mark.parametrize("kind", ["I;16B", "I;16"])
def test_sixteen_bit_tiff_in_both_byte_orders(kind: str) -> None:
    values = np.arange(0, 65536, 400, dtype=np.uint16)[:160].reshape(10, 16)
    image = Image.frombytes(kind, (16, 10), values.astype(">u2" if kind == "I;16B" else "<u2").tobytes())
    got = decode_image(encode(image, "TIFF"))
    assert np.array_equal(got[..., 0], np.round(values / 257))


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    values = np.array([[0, 1000, 1001, 65535]], np.uint16)
    data = encode(Image.fromarray(values))
    keyed = data[:33] + chunk(b"tRNS", struct.pack(">H", 1000)) + data[33:]
    assert decode_image(keyed)[0, :, 0].tolist() == [0, 255, 4, 255]


def test_sixteen_bit_colour_keeps_the_high_byte() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0))
    for extra in (b"", chunk(b"tRNS", values[0, 0].astype(">u2").tobytes())):
        data = b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        assert np.array_equal(decode_image(data), values >> 8)


def test_wide_integers_are_taken_as_sixteen_bits_or_refused() -> None:
    def tiff(*values: int) -> bytes:
        return encode(Image.fromarray(np.array([values], np.int32)), "TIFF")

    assert decode_image(tiff(0, 257, 65535))[0, :, 0].tolist() == [0, 1, 255]
    for wrong in (-1, 65536):
        with pytest.raises(ImageError, match=r"outside 0\.\.65535"):
            decode_image(tiff(0, wrong))


def test_floats_are_taken_from_0_to_1_or_refused() -> None:
    def tiff(*values: float) -> bytes:
        return encode(Image.fromarray(np.array([values], np.float32)), "TIFF")

    assert decode_image(tiff(0, 0.1, 0.5, 1))[0, :, 0].tolist() == [0, 26, 128, 255]
    for wrong in (-0.01, 1.01, 255.0, float("nan"), float("inf")):
        with pytest.raises(ImageError, match=r"outside 0\.\.1"):
            decode_image(tiff(0.5, wrong))


def white_under(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Exact compositing, rounded to nearest, halves up."""
    weighed = colour.astype(int) * alpha[..., None] + 255 * (255 - alpha[..., None].astype(int))
    return (2 * weighed + 255) // 510


@pytest.mark.parametrize(
    ("format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})]
)
def test_alpha_is_composited_over_white(format: str, options: dict) -> None:
    rgba = np.random.default_rng(1).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    rgba[0, :3, 3] = 0, 255, 128
    got = decode_image(encode(Image.fromarray(rgba), format, **options))
    assert np.array_equal(got, white_under(rgba[..., :3], rgba[..., 3]))
    assert got[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(got[0, 1], rgba[0, 1, :3])


def test_grey_with_alpha_is_composited_over_white() -> None:
    grey, alpha = np.random.default_rng(1).integers(0, 256, (2, 64, 64), dtype=np.uint8)
    image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    assert np.array_equal(decode_image(encode(image)), white_under(np.repeat(grey[..., None], 3, 2), alpha))


def test_a_transparent_colour_becomes_white() -> None:
    pixels = picture()
    info = {"transparency": tuple(int(v) for v in pixels[3, 4])}
    keyed = (pixels == pixels[3, 4]).all(-1)
    got = decode_image(encode(pixels, **info))
    assert np.array_equal(got, np.where(keyed[..., None], 255, pixels))
    grey = picture(channels=1)
    got = decode_image(encode(grey, transparency=int(grey[3, 4, 0])))
    assert np.array_equal(got, np.repeat(np.where(grey == grey[3, 4, 0], 255, grey), 3, 2))


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palettes_with_and_without_transparency(format: str) -> None:
    image = Image.fromarray(picture()).quantize(8)
    indices = np.asarray(image)
    colours = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode_image(encode(image, format)), colours)
    chosen = int(indices[5, 5])
    expected = np.where((indices == chosen)[..., None], 255, colours)
    assert np.array_equal(decode_image(encode(image, format, transparency=chosen)), expected)


def test_palettes_with_graded_transparency() -> None:
    image = Image.fromarray(picture()).quantize(8)
    alphas = bytes([0, 40, 80, 120, 160, 200, 240, 255])
    expected = white_under(np.asarray(image.convert("RGB")), np.frombuffer(alphas, np.uint8)[np.asarray(image)])
    assert np.array_equal(decode_image(encode(image, transparency=alphas)), expected)


@pytest.mark.parametrize(("format", "tolerance"), [("TIFF", 1), ("JPEG", 24)])
def test_cmyk_becomes_the_colours_it_prints(format: str, tolerance: int) -> None:
    inks = {(0, 0, 0, 0): (255, 255, 255), (0, 0, 0, 255): (0, 0, 0), (255, 0, 0, 0): (0, 255, 255)}
    inks |= {(0, 255, 0, 0): (255, 0, 255), (0, 0, 255, 0): (255, 255, 0), (0, 0, 0, 128): (127, 127, 127)}
    for ink, colour in inks.items():
        got = decode_image(
            encode(Image.new("CMYK", (16, 16), ink), format, **({"quality": 95} if format == "JPEG" else {}))
        )
        assert np.abs(got.astype(int) - colour).max() <= tolerance, ink


def test_adobe_cmyk_is_read_with_its_marker() -> None:
    """YCCK (transform 2) and plain CMYK (transform 0) differ only in Adobe's segment, which must reach the decoder."""
    data = encode(Image.new("CMYK", (16, 16), (200, 30, 30, 10)), "JPEG")
    at = data.index(b"Adobe")
    assert data[at + 11] == 0
    other = data[: at + 11] + b"\2" + data[at + 12 :]
    assert np.array_equal(decode_image(other), np.asarray(Image.open(io.BytesIO(other)).convert("RGB")))
    assert not np.array_equal(decode_image(other), decode_image(data))


def test_rgb_jpeg_without_jfif_is_read_with_its_marker() -> None:
    data = encode(picture(32, 32), "JPEG", keep_rgb=True, quality=95)
    assert np.abs(decode_image(data).astype(int) - picture(32, 32)).mean() < 4


def test_lab_is_refused() -> None:
    image = Image.fromarray(picture()).convert("RGB")
    lab = Image.merge("LAB", image.split())
    with pytest.raises(ImageError, match="LAB"):
        decode_image(encode(lab, "TIFF"))


def test_run_length_coded_bmp() -> None:
    red, green = [255, 0, 0], [0, 255, 0]
    assert decode_image(RLE8_BMP).tolist() == [[red, green, red, red], [green] * 4]


def test_bmp_from_the_top_down() -> None:
    data = bytearray(encode(picture(), "BMP"))
    data[22:26] = struct.pack("<i", -12)
    assert np.array_equal(decode_image(bytes(data)), picture()[::-1])


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_picture_of_several(format: str) -> None:
    first = Image.fromarray(picture()).quantize(8) if format == "GIF" else Image.fromarray(picture())
    others = [first.rotate(90 * n) for n in (1, 2, 3)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(first, format, save_all=True, append_images=others, **options)
    assert np.array_equal(decode_image(data), np.asarray(first.convert("RGB")))


def test_a_gif_frame_smaller_and_larger_than_its_screen() -> None:
    data = bytearray(encode(Image.new("P", (4, 3), 1), "GIF"))
    assert struct.unpack("<HH", data[6:10]) == (4, 3)
    data[6:10] = struct.pack("<HH", 6, 2)
    assert decode_image(bytes(data)).shape == (3, 6, 3)


@pytest.mark.parametrize("name", samples())
def test_texts_and_profiles_do_not_reach_the_decoder(name: str) -> None:
    data = samples()[name]
    reduced = containers.open_container(containers.Reader(io.BytesIO(data), len(data)), lambda width, height: None)
    assert reduced.format.lower() == name.split("-")[0]
    for known in (b"eXIf", b"Exif\0\0", b"EXIF", b"acTL", b"fdAT"):
        assert known not in reduced.data


def test_text_profile_and_comments_are_dropped() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("secret", "watchword")
    for format, options in (
        ("PNG", {"pnginfo": info, "icc_profile": b"watchword" * 9}),
        ("JPEG", {"comment": b"watchword", "icc_profile": b"watchword" * 9}),
        ("GIF", {"comment": b"watchword"}),
        ("WEBP", {"icc_profile": b"watchword" * 9, "xmp": b"watchword"}),
    ):
        image = Image.fromarray(picture()).quantize(8) if format == "GIF" else Image.fromarray(picture())
        data = encode(image, format, **options)
        reduced = containers.open_container(containers.Reader(io.BytesIO(data), len(data)), lambda width, height: None)
        assert b"watchword" not in reduced.data
        assert len(reduced.data) < len(data)


def test_large_pictures_are_converted_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: decode_image(data) for name, data in samples().items()}
    monkeypatch.setattr("xception.data.decode._STRIP_PIXELS", 50)
    for name, data in samples().items():
        assert np.array_equal(decode_image(data), whole[name]), name


@pytest.mark.parametrize(("kind", "at"), [(b"IHDR", 20), (b"IDAT", -20)])
def test_a_flipped_bit_in_a_png_is_noticed(kind: bytes, at: int) -> None:
    data = bytearray(encode(picture()))
    data[at] ^= 1
    with pytest.raises(ImageError, match=kind.decode()):
        decode_image(bytes(data))


def test_a_second_png_header_does_not_get_past_the_limits() -> None:
    data = encode(picture())
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    assert decode_image(data[:33] + second + data[33:]).shape == (12, 16, 3)


def test_a_tiff_whose_strips_do_not_cover_it_is_refused() -> None:
    data = bytearray(encode(picture(), "TIFF"))
    at = data.index(struct.pack("<HHI", 257, 4, 1))
    data[at + 8 : at + 12] = struct.pack("<I", 120)
    with pytest.raises(ImageError, match="strips"):
        decode_image(bytes(data))
