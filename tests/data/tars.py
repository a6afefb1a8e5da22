"""Tars for tests, from whole ones by Python's own writer to forged headers."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from image_files import encode, picture


def tar_bytes(members: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of files, as `tarfile` writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def image_bytes(seed: int = 0) -> bytes:
    return encode(picture(12, 16, seed))


def sample(name: str, labels: Any, *, ending: str = "json", seed: int = 0) -> dict[str, bytes]:
    """An image and its labels."""
    text = labels if isinstance(labels, str) and ending == "cls" else json.dumps(labels)
    return {f"{name}.png": image_bytes(seed), f"{name}.{ending}": text.encode()}


def write_tar(path: Path, *samples: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of some samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes({name: data for found in samples for name, data in found.items()}, format))
    return path


def header(name: bytes = b"a.png", size: bytes = b"00000000003\0", kind: bytes = b"0") -> bytes:
    """A ustar header with a right checksum, whatever stands in it."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)
