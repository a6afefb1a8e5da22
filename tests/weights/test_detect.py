"""What a file is, by its content alone; hostile archives cost neither time nor memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from keras_networks import NARROW, info_of, our_network

from xception.errors import WeightsError
from xception.weights.detect import container_of
from xception.weights.keras_write import write_keras
from xception.weights.torch_file import read_torch_file

STATE = {"weight": torch.arange(6.0).reshape(2, 3)}


def test_our_bundle(bundle: Path) -> None:
    assert container_of(bundle) == "bundle"
    other = bundle.rename(bundle.with_name("model.h5"))
    assert container_of(other) == "bundle"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pytorch_files(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "w.keras"  # a name says nothing
    torch.save(STATE, path, pickle_protocol=protocol)
    assert container_of(path) == "torch-zip"
    torch.save(STATE, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    assert container_of(path) == "torch-legacy"


def test_keras_files(tmp_path: Path) -> None:
    model = our_network(**NARROW)
    path = tmp_path / "w.pth"
    write_keras(path, model, info_of(model), "keras-h5")
    assert container_of(path) == "hdf5"
    write_keras(path, model, info_of(model), "keras")
    assert container_of(path) == "keras-zip"
    deflated = tmp_path / "deflated"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    assert container_of(deflated) == "keras-zip"


# Lengths of headers whose first bytes are the beginnings of other files: pickles, a zip archive, gzip, GIF.
LENGTHS = [0x10280, 0x10380, 0x10480, 0x10580, 0x280, 0x4B50, 0x8B1F, 0x4947]


@pytest.mark.parametrize("length", LENGTHS, ids=hex)
def test_a_safetensors_header_may_have_any_length(tmp_path: Path, length: int) -> None:
    data = safetensors.torch.save(STATE)
    end = 8 + int.from_bytes(data[:8], "little")
    path = tmp_path / "w"
    path.write_bytes(struct.pack("<Q", length) + data[8:end].ljust(length) + data[end:])
    assert container_of(path) == "safetensors"
    assert torch.equal(read_torch_file(path).tensors["weight"].read(), STATE["weight"])


def packed(write: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, name * 50)
    return stream.getvalue()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.ckpt.index"))
    return stream.getvalue()


NEITHER = "neither PyTorch's nor Keras's"
OTHERS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "the file is empty"),
    "a letter": (b"x", "not a safetensors file, or cut short"),
    "text": (b"weights of the network\n" * 9, "not a safetensors file, or cut short"),
    "zeros": (bytes(1000), "not a safetensors file, or cut short"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(300), "got a PNG image"),
    "gzip": (gzip.compress(tar()), "got a gzip archive"),
    "tar": (tar(), "a tar archive"),
    "a pickle of Python 1": (pickle.dumps(3, protocol=1), "not a safetensors file"),
    "photographs": (zipped("a.jpg", "b.jpg"), NEITHER),
    "many photographs": (zipped(*map(str, range(600))), NEITHER),
    "an empty archive": (zipped(), NEITHER),
    "NumPy's": (packed(lambda stream: np.savez(stream, a=np.ones(3))), NEITHER),
    "half a Keras file": (zipped("metadata.json", "config.json"), "no Keras file: it holds other members"),
    "JSON": (b'{"a": 1}', "not a safetensors file, or cut short"),
    "a header that is not JSON": (struct.pack("<Q", 9) + b"{ no JSON", "the header is not JSON"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_not_read_is_told_by_its_name(tmp_path: Path, what: str) -> None:
    data, expected = OTHERS[what]
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsError) as error:
        container_of(path)
    message = str(error.value)
    assert message.startswith(f"cannot load {path}: ")
    assert expected in message
    assert message.isprintable()
    assert message.count("cannot load") == 1


def test_hdf5_behind_a_user_block_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "w", "w", userblock_size=512) as file:
        file["a"] = [1.0]
    with pytest.raises(WeightsError, match="not a safetensors file"):
        container_of(tmp_path / "w")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none", tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(WeightsError, match=f"cannot read {path}: "):
            container_of(path)


# ---------------------------------------------------------------------------------------------------- hostile archives

_END, _PLACE_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")


def end(count: int, size: int, begin: int, comment: bytes = b"") -> bytes:
    return _END.pack(b"PK\5\6", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), size, begin, len(comment)) + comment


def end_64(count: int, size: int, begin: int, place: int) -> bytes:
    """The three records that end a large archive; `place` is where the first of them stands."""
    record = _END_64.pack(b"PK\6\6", _END_64.size - 12, 45, 45, 0, 0, count, count, size, begin)
    return record + _PLACE_64.pack(b"PK\6\7", 0, place, 1) + end(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)


def write_sparse(path: Path, size: int, data: bytes) -> None:
    """Zeros that take no room on the disk, with `data` behind them."""
    with path.open("wb") as stream:
        stream.write(b"PK\3\4")
        stream.seek(size)
        stream.write(data)


def entries(names: list[bytes], offset: int = 0) -> bytes:
    """A directory whose members are all at `offset`."""
    fields = "<4s6H3L5H2L"
    head = (20, 20, 0, 0, 0, 0, 0, 0, 0)
    return b"".join(struct.pack(fields, b"PK\1\2", *head, len(name), 0, 0, 0, 0, 0, offset) + name for name in names)


def with_directory(names: list[bytes], extra: bytes = b"") -> bytes:
    first = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    directory = entries(names)
    return first + directory + end(len(names), len(directory), len(first), extra)


def hostile_archives(folder: Path) -> list[str]:
    """Files with their genuine like in `folder`; their names say what was done."""
    good = io.BytesIO()
    torch.save(STATE, good)
    data = good.getvalue()
    large, million = 1 << 30, 10_000_000
    made: list[str] = []

    def sparse(what: str, size: int, tail: bytes) -> None:
        write_sparse(folder / what, size, tail)
        made.append(what)

    def plain(what: str, contents: bytes) -> None:
        (folder / what).write_bytes(contents)
        made.append(what)

    size = 46 * million
    sparse("10 million members, 460 MB of directory", large, end_64(million, size, large - size, large))
    sparse("10 million members, no directory", large, end_64(million, 0, large, large))
    sparse("4 billion members", large, end_64(1 << 32, size, large - size, large))
    sparse("2^63 bytes of directory", large, end_64(3, 1 << 63, 0, large))
    sparse("a directory before the file", large, end_64(3, large + 100, (1 << 64) - 100, large))
    sparse("an end record elsewhere", large, end_64(3, size, large - size, large - 1))
    sparse("a directory of 900 MB", large, end(3, 900 << 20, large - (900 << 20)))
    sparse("65,535 members in 900 MB", large, end(0xFFFF, 900 << 20, large - (900 << 20)))
    sparse("a directory of 15 MB of zeros", large, end(40_000, 15 << 20, large - (15 << 20)))
    sparse("nothing but zeros", large, b"")
    plain("60,000 members", with_directory([b"%d" % i for i in range(60_000)]))
    plain("40,000 members at one place", with_directory([b"%d" % i for i in range(40_000)]))
    plain("members with names of 65,535 letters", with_directory([b"%05d" % i + b"a" * 65_530 for i in range(200)]))
    plain("one name 40,000 times", with_directory([b"archive/data.pkl"] * 40_000))
    plain("a comment full of end records", data[:-22] + end(1, 46, 0, end(9, 9, 9) * 2978))
    plain("a comment longer than the file", data[:-2] + b"\xff\xff")
    plain("a second archive behind the first", data + zipped("config.json", "model.weights.h5", "a")[:-1])
    plain("the directory cut out", data[: data.index(b"PK\1\2")])
    plain("an archive of its end alone", end(5, 0, 0))
    for part in range(1, 40):
        plain(f"the first {part} of 40 parts", data[: len(data) * part // 40])
    keras = zipped("metadata.json", "config.json", "model.weights.h5")
    for part in range(1, 20):
        plain(f"a Keras file's first {part} of 20 parts", keras[: len(keras) * part // 20])
    return made


_CHILD = """
import json, os, resource, sys, time
from pathlib import Path
import torch
from xception.errors import WeightsError
from xception.weights.detect import container_of
from xception.weights.imports import import_weights

folder = Path(sys.argv[1])
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
for path in sorted(folder.iterdir()):
    for read in (container_of, import_weights):
        began = time.process_time()
        try:
            outcome = repr(read(path))[:80]
        except WeightsError as error:
            outcome = str(error)
        except BaseException as error:
            outcome = f"another error: {error!r}"[:300]
        print(json.dumps([path.name, outcome, time.process_time() - began]))
"""


def test_hostile_archives_are_refused_with_little_memory(tmp_path: Path) -> None:
    """In a child that may take 300 MB, whatever the size of the file."""
    names = hostile_archives(tmp_path)
    done = subprocess.run([sys.executable, "-c", _CHILD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) == 2 * len(names) > 140
    for what, message, seconds in outcomes:
        assert message.startswith(f"cannot load {tmp_path / what}: "), (what, message)
        assert message.isprintable(), (what, message)
        assert len(message) < 500, (what, message)
        assert message.count("cannot load") == 1, (what, message)
        assert seconds < 3, (what, seconds)


def test_the_archives_that_they_were_made_from_are_read(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    torch.save(STATE, tmp_path / "w")
    assert container_of(tmp_path / "w") == "torch-zip"
    with (tmp_path / "w").open("r+b") as stream:  # the longest comment there can be
        stream.seek(-2, os.SEEK_END)
        stream.write(b"\xff\xff" + b"x" * 65_535)
    assert container_of(tmp_path / "w") == "torch-zip"
    (tmp_path / "w").write_bytes(zipped("metadata.json", "config.json", "model.weights.h5"))
    assert container_of(tmp_path / "w") == "keras-zip"


def test_a_damaged_file_is_called_what_it_was(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w")
    data = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(data[:-30])
    with pytest.raises(WeightsError, match="/w: no PyTorch file: the archive is damaged or cut short"):
        container_of(tmp_path / "w")
    (tmp_path / "w").write_bytes(zipped("metadata.json", "config.json", "model.weights.h5")[:-1])
    with pytest.raises(WeightsError, match="/w: no Keras file: a zip archive that was cut short"):
        container_of(tmp_path / "w")
