"""Bytes and paths made to hurt: an array or an ImageError, soon, in little memory, and nothing else."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bombs import bombs
from image_files import encode, picture, samples
from PIL import Image

from xception.data.decode import DecodeLimits, decode_image
from xception.errors import ConfigError, DataError, ImageError

MEASURE = """
import json, re, sys, time
from xception.data.decode import decode_image
from xception.errors import ImageError

def peak():
    with open("/proc/self/status") as status:  # getrusage would begin with the parent's peak
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) / 1024

first, *paths = sys.argv[1:]
for name in first.split(","):  # load what decoding any format needs
    decode_image(name)
for path in paths:
    before, start, error = peak(), time.process_time(), None
    try:
        decode_image(path)
    except ImageError as refused:
        error = str(refused)
    print(json.dumps([path, time.process_time() - start, peak() - before, error]))
"""


def outcome(data: bytes) -> np.ndarray | str:
    """The pixels, or the one line why not; any other error or warning fails the test."""
    try:
        pixels = decode_image(data)
    except ImageError as error:
        message = str(error)
        assert message
        assert message.isprintable()
        assert len(message) < 250
        return message
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    return pixels


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to eight changes, half of them near the start, where the headers are."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        if not changed:
            break
        at = chance.randrange(len(changed) if chance.random() < 0.5 else min(len(changed), 64))
        match chance.randrange(6):
            case 0:
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                changed[at] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + chance.randrange(1, 9)]
            case 4:
                changed[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 5:
                size = chance.choice((2, 4))
                changed[at : at + size] = chance.choice((b"\xff" * size, bytes(size), b"\x7f" + b"\xff" * (size - 1)))
    return bytes(changed)


def fuzz(seed: int, count: int) -> tuple[int, int]:
    """How many mutated images were decoded and how many refused."""
    chance, files = random.Random(seed), samples()
    names = list(files)
    decoded = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            data = mutate(files[chance.choice(names)], chance)
            start = time.monotonic()
            decoded += not isinstance(outcome(data), str)
            assert time.monotonic() - start < 5
    assert [str(warning.message) for warning in caught] == []
    return decoded, count - decoded


def test_mutated_images_give_pixels_or_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    decoded, refused = fuzz(seed=1, count=8000)
    assert decoded > 1000, "the mutations leave too little that is worth decoding"
    assert refused > 1000
    assert capfd.readouterr() == ("", ""), "the decoders' own messages reached the terminal"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_more_mutated_images(seed: int) -> None:
    fuzz(seed, 20_000)


@pytest.mark.parametrize("name", samples())
def test_every_truncation_gives_pixels_or_one_line(name: str) -> None:
    data = samples()[name]
    cut_short = [outcome(data[:size]) for size in range(0, len(data), max(1, len(data) // 60))]
    assert isinstance(cut_short[0], str)
    assert all(isinstance(result, str) for result in cut_short[: len(cut_short) // 4])


def test_noise_behind_each_signature() -> None:
    chance = random.Random(3)
    for data in samples().values():
        for length in (4, 16, 64, 1000):
            outcome(data[:16] + chance.randbytes(length))


@pytest.mark.skipif(sys.platform != "linux", reason="measures the peak of resident memory in KiB")
def test_bombs_cost_little_time_and_memory(tmp_path: Path) -> None:
    names = {}
    for number, (name, data) in enumerate(bombs()):
        path = tmp_path / f"{number:02d}"
        path.write_bytes(data)
        names[str(path)] = name
    known = [tmp_path / f"known-{number}" for number, _ in enumerate(samples())]
    for path, data in zip(known, samples().values(), strict=True):
        path.write_bytes(data)
    command = [sys.executable, "-W", "error", "-c", MEASURE, ",".join(map(str, known)), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [names[path] for path, *_ in lines] == list(names.values())
    for path, seconds, mebibytes, error in lines:
        what = f"{names[path]}: {seconds:.3f} s, {mebibytes:.0f} MiB, {error}"
        assert seconds < 0.1, what
        assert mebibytes < 50, what
        assert (error is None) == names[path].startswith("fine"), what


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    os.symlink("nowhere", tmp_path / "broken.png")
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)  # the names of sockets are short
    try:
        listener.bind("socket.png")
    finally:
        os.chdir(here)
        listener.close()
    expected = {
        tmp_path: "folder",
        tmp_path / "pipe.png": "pipe",
        tmp_path / "socket.png": "socket",
        Path("/dev/zero"): "device",
        tmp_path / "loop.png": "symbolic links",
        tmp_path / "broken.png": "No such file",
        tmp_path / "none.png": "No such file",
        "a\0b.png": "null",
        "/proc/self/mem/x": "",
        "x" * 5000: "too long",
    }
    for path, reason in expected.items():
        start = time.monotonic()
        with pytest.raises(ImageError) as caught:
            decode_image(path)
        assert reason in str(caught.value)
        assert str(tmp_path) not in str(caught.value), "the message does not name the file"
        assert time.monotonic() - start < 1


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encode(picture()))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("permissions do not bind this user")
    with pytest.raises(ImageError, match="Permission denied"):
        decode_image(path)


def test_names_that_are_not_utf8_open(tmp_path: Path) -> None:
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9\n.png"))
    Path(path).write_bytes(encode(picture()))
    assert np.array_equal(decode_image(path), picture())


def test_the_limit_on_bytes_comes_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a sparse terabyte
    with pytest.raises(ImageError, match="bytes"):
        decode_image(path)
    data = encode(picture())
    assert decode_image(data, DecodeLimits(max_bytes=len(data))).shape == (12, 16, 3)
    for source in (data, path_of(tmp_path, data), open_file(tmp_path, data)):
        with pytest.raises(ImageError, match="bytes"):
            decode_image(source, DecodeLimits(max_bytes=len(data) - 1))


def path_of(folder: Path, data: bytes) -> Path:
    path = folder / "small.png"
    path.write_bytes(data)
    return path


def open_file(folder: Path, data: bytes):
    import io

    return io.BytesIO(data)


@pytest.mark.parametrize("name", samples())
def test_the_limit_on_pixels_is_exact(name: str) -> None:
    data = samples()[name]
    pixels = decode_image(data)
    count = pixels.shape[0] * pixels.shape[1]
    assert decode_image(data, DecodeLimits(max_pixels=count)).shape == pixels.shape
    with pytest.raises(ImageError, match="limit"):
        decode_image(data, DecodeLimits(max_pixels=count - 1))


@pytest.mark.parametrize("field", ["max_bytes", "max_pixels"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "9"])
def test_limits_are_checked(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        DecodeLimits(**{field: value})


def test_large_images_below_the_limit_do_not_meet_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns from its MAX_IMAGE_PIXELS on and raises from twice that; that counts for TIFF and WebP alone."""
    files = samples()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12 * 16 // 3)
    for name, data in files.items():
        if name.startswith("tiff"):
            assert "limit" in outcome(data)
        elif isinstance(result := outcome(data), str):
            assert name.startswith("webp"), name  # older versions do not guard it
            assert result == "more pixels than Pillow's own limit for the format"


def test_an_image_error_is_a_data_error() -> None:
    assert issubclass(ImageError, DataError)
    for data in (b"", b"hello", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7", b"<svg/>", bytes(100)):
        assert isinstance(outcome(data), str)


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really-a-jpeg.gif"
    path.write_bytes(encode(picture(), "JPEG"))
    assert decode_image(path).shape == (12, 16, 3)
    path.write_bytes(b"no image at all")
    with pytest.raises(ImageError, match="not a JPEG, PNG, WebP, GIF, BMP or TIFF"):
        decode_image(path)


def test_formats_that_pillow_knows_and_we_do_not_are_refused() -> None:
    for format in ("PPM", "ICO", "TGA", "PCX", "SGI"):
        assert isinstance(outcome(encode(picture(), format)), str), format


def test_a_file_replaced_by_a_pipe_between_look_and_open_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encode(picture()))
    status = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda p, **k: status if p == path else real(p, **k))
    with pytest.raises(ImageError, match="pipe"):
        decode_image(path)


def test_threads_decode_side_by_side() -> None:
    """The same results as one thread, and no global filter is touched on the way."""
    chance, files = random.Random(5), list(samples().values())
    work = [mutate(data, chance) if index % 2 else data for index, data in enumerate(files * 12)]
    alone = [outcome(data) for data in work]
    filters = list(warnings.filters)
    barrier = threading.Barrier(8)

    def together(index: int) -> list[np.ndarray | str]:
        barrier.wait()
        return [outcome(data) for data in work]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(together, range(8)))
    assert warnings.filters == filters
    for result in results:
        for one, other in zip(alone, result, strict=True):
            assert one == other if isinstance(one, str) else np.array_equal(one, other)
