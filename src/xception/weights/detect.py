"""Which kind of file this is, by its content and never by its name."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO, Literal

from xception.errors import WeightsError
from xception.weights.container import MAX_HEADER_BYTES, read_header
from xception.weights.files import open_regular, shown
from xception.weights.keras_zip import read_members
from xception.weights.regions import Window
from xception.weights.stored_zip import read_directory

Container = Literal["bundle", "safetensors", "torch-zip", "torch-legacy", "keras-zip", "hdf5"]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_TAR, _TAR_PLACE = b"ustar", 257  # where a tar archive says that it is one
_KERAS_MEMBERS = {"config.json", "model.weights.h5"}
_ACCEPTED = "a bundle, a Keras file (.keras, .h5) or a PyTorch file (.pth, .safetensors)"


def container_of(path: str | os.PathLike[str]) -> Container:
    """How the file at `path` stores its tensors; `WeightsError` naming it where it is nothing that is read here.

    An HDF5 signature counts at the file's start only: one behind a user block is a trick, or no Keras file.
    """
    with open_regular(path) as stream:
        start = stream.read(_TAR_PLACE + len(_TAR))
        stream.seek(0)
        try:
            if not start:
                raise WeightsError("the file is empty")
            # Before all others: the length of a header may look like their signatures. None of them goes on like this.
            if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
                return _kind_of_safetensors(stream)
            if start.startswith(_HDF5):
                return "hdf5"
            if start.startswith(_ZIP):
                return _kind_of_zip(stream)
            if start.startswith(_PICKLE):
                return "torch-legacy"
            if start[_TAR_PLACE:] == _TAR:
                raise WeightsError(f"a tar archive (expected {_ACCEPTED})")
            return _kind_of_safetensors(stream)  # which says what else it is
        except WeightsError as error:
            raise WeightsError(f"cannot load {shown(path)}: {error}") from None


def _kind_of_safetensors(stream: BinaryIO) -> Container:
    try:
        header = read_header(stream)
    except WeightsError as error:
        raise WeightsError(f"{error} (expected {_ACCEPTED})") from None
    return "bundle" if header.metadata.get("format") == "xception-bundle" else "safetensors"


def _kind_of_zip(stream: BinaryIO) -> Container:
    """By the members' names, which the readers of both kinds find without taking memory for more than they allow.

    Where neither can read the archive, its first member tells whose complaint to pass on.
    """
    keras = torch = "it holds other members"
    try:
        if read_members(Window(stream, 0, os.fstat(stream.fileno()).st_size)).keys() >= _KERAS_MEMBERS:
            return "keras-zip"
    except WeightsError as error:
        keras = str(error)
    try:
        if any(name.endswith("/data.pkl") or name == "data.pkl" for name in read_directory(stream)):
            return "torch-zip"
    except WeightsError as error:
        torch = str(error)
    first = _first_member(stream)
    if first in (*_KERAS_MEMBERS, "metadata.json"):
        raise WeightsError(f"no Keras file: {keras}")
    if first.endswith(".pkl"):
        raise WeightsError(f"no PyTorch file: {torch}")
    raise WeightsError("a zip archive that is neither PyTorch's nor Keras's, or a damaged one")


def _first_member(stream: BinaryIO) -> str:
    """The name in the header at the file's start; "" where there is none."""
    stream.seek(0)
    header = stream.read(30)
    if len(header) < 30 or not header.startswith(_ZIP[0]):
        return ""
    (size,) = struct.unpack_from("<H", header, 26)
    return stream.read(size).decode("utf-8", "replace")
