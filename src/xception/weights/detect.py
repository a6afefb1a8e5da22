"""Which kind of file this is, by its content and never by its name."""

from __future__ import annotations

import os
import zipfile
from typing import BinaryIO, Literal

from xception.errors import WeightsError
from xception.weights.container import read_header
from xception.weights.files import open_regular, shown

Container = Literal["bundle", "safetensors", "torch-zip", "torch-legacy", "keras-zip", "hdf5"]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_ACCEPTED = "a bundle, a Keras file (.keras, .h5) or a PyTorch file (.pth, .safetensors)"


def container_of(path: str | os.PathLike[str]) -> Container:
    """How the file at `path` stores its tensors; `WeightsError` naming it where it is nothing that is read here.

    An HDF5 signature counts at the file's start only: one behind a user block is a trick, or no Keras file.
    """
    with open_regular(path) as stream:
        start = stream.read(16)
        if not start:
            raise WeightsError(f"cannot load {shown(path)}: the file is empty")
        if start.startswith(_HDF5):
            return "hdf5"
        if start.startswith(b"PK"):
            return _kind_of_zip(path, stream)
        if start.startswith(_PICKLE):
            return "torch-legacy"
        stream.seek(0)
        try:
            header = read_header(stream)
        except WeightsError as error:
            raise WeightsError(f"cannot load {shown(path)}: {error} (expected {_ACCEPTED})") from None
    return "bundle" if header.metadata.get("format") == "xception-bundle" else "safetensors"


def _kind_of_zip(path: str | os.PathLike[str], stream: BinaryIO) -> Container:
    try:
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"cannot load {shown(path)}: a damaged zip archive ({reason})") from None
    if "model.weights.h5" in names and "config.json" in names:
        return "keras-zip"
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return "torch-zip"
    raise WeightsError(f"cannot load {shown(path)}: a zip archive that is neither PyTorch's nor Keras's")
