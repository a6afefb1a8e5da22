"""PyTorch's own files (.pth, .pt, .bin, .p) and .safetensors as data: names, shapes and where the numbers are.

`torch.save` writes one of two containers. Since PyTorch 1.6 it is a zip archive: ``NAME/data.pkl``, a pickle that
refers to storages, and ``NAME/data/KEY``, the bytes of each. Before, and with ``_use_new_zipfile_serialization=False``,
it is a stream: pickles of a magic number, the protocol, the machine, the object and the list of storage keys, then each
storage as its number of elements and its bytes. No pickle is run: `inert_pickle` reads them. Source of both formats:
torch/serialization.py of PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, BinaryIO

from xception.errors import WeightsError
from xception.weights.container import MAX_HEADER_BYTES, read_header
from xception.weights.foreign import ForeignFile, ForeignTensor
from xception.weights.inert_pickle import InertPickle
from xception.weights.inert_values import Table
from xception.weights.lazy_file import LazyFile
from xception.weights.stored_zip import Member, check_crc, read_directory
from xception.weights.torch_state import State, find_state
from xception.weights.torch_tensors import Place, TensorReader, declared_storages

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
_TAR_MAGIC = 257  # where a tar archive says that it is one


def read_torch_file(path: str | os.PathLike[str]) -> ForeignFile:
    """What a PyTorch or safetensors file holds, whatever its name; the numbers stay in the file.

    Of a checkpoint only the network's tensors are taken, an average of them first: ``facts["wrapper"]`` is the path of
    keys they were found under and ``facts["average"]`` tells whether that is an average. Of a whole pickled module
    ``facts["modules"]`` maps each module's path to its class and plain attributes. The file stays closed: each tensor
    that is read opens it, and refuses a file that has been changed.

    Raises `WeightsError`, naming the file, for anything else than such a file: a damaged, cut or hostile one too.
    """
    file = LazyFile(path)
    with file.open() as stream:
        start = stream.read(_TAR_MAGIC + 5)
        stream.seek(0)
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
            return _read_safetensors(file, stream)
        if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            container, value, tensors = "torch-zip", *_read_zip(file, stream)
        elif start.startswith(b"\x80"):
            container, value, tensors = "torch-legacy", *_read_legacy(file, stream)
        elif start[_TAR_MAGIC:] == b"ustar":
            raise WeightsError("a tar archive; those that PyTorch wrote before 0.2 are not read")
        else:
            raise WeightsError("neither a PyTorch file nor a safetensors file" if start else "the file is empty")
        state = find_state(value)
        found = _tensors(state, tensors, file_bytes=os.fstat(stream.fileno()).st_size)
    facts: dict[str, Any] = {"wrapper": ".".join(state.wrapper), "average": state.average}
    if state.modules:
        facts["modules"] = state.modules
    if state.class_names:
        facts["class_names"] = state.class_names
    return ForeignFile(path=file.shown, container=container, tensors=found, facts=facts)


def _tensors(state: State, reader: TensorReader, *, file_bytes: int) -> dict[str, ForeignTensor]:
    """The state dict's tensors, unread. Together they take no more memory than the file is large."""
    tensors: dict[str, ForeignTensor] = {}
    for name, record in state.tensors.items():
        try:
            tensor = reader.tensor(record)
        except WeightsError as error:
            raise WeightsError(f"tensor {name!r:.90} {error}") from None
        if tensor is None:
            raise WeightsError(f"tensor {name!r:.90} is no tensor that PyTorch writes")
        if reader.total_bytes > file_bytes:
            raise WeightsError(
                f"its tensors share their numbers: they would take more than the file's {file_bytes:,} bytes"
            )
        tensors[name] = tensor
    return tensors


# --------------------------------------------------------------------------------------------------- zip archives


def _read_zip(file: LazyFile, stream: BinaryIO) -> tuple[object, TensorReader]:
    members = read_directory(stream)
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise WeightsError("a zip archive, but none that torch.save wrote: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise WeightsError("a TorchScript program, which is not read: save its state_dict() instead")
    order = members.get(f"{root}byteorder")
    if order is not None and _small(stream, order) != b"little":
        raise WeightsError("it was written on a big-endian machine, or says nothing of its byte order")
    pickled = members[pickles[0]]
    check_crc(stream, pickled, "its pickle")
    stream.seek(pickled.begin)
    end = pickled.begin + pickled.size
    pickle = InertPickle(stream, end=end)
    value = pickle.load()
    if pickle.position != end:
        raise WeightsError("its pickle is damaged: something follows its end")
    places = {}
    for key in declared_storages(pickle.persistent):
        member = members.get(f"{root}data/{key}")
        if member is not None:
            places[key] = Place(member.begin, member.size, _checked_once(member, f"storage {key!r:.80}"))
    return value, TensorReader(file, places)


def _small(stream: BinaryIO, member: Member) -> bytes:
    stream.seek(member.begin)
    return stream.read(min(member.size, 16))


def _checked_once(member: Member, what: str) -> Callable[[BinaryIO], None]:
    """Looks at a storage's checksum when the first of its tensors is read."""
    checked = False

    def check(stream: BinaryIO) -> None:
        nonlocal checked
        if not checked:
            check_crc(stream, member, what)
            checked = True

    return check


# ---------------------------------------------------------------------------------------------------- legacy streams


def _read_legacy(file: LazyFile, stream: BinaryIO) -> tuple[object, TensorReader]:
    file_bytes = os.fstat(stream.fileno()).st_size
    pickle = InertPickle(stream, end=file_bytes)
    if pickle.load() != LEGACY_MAGIC:
        raise WeightsError("a Python pickle, but none that torch.save wrote")
    if pickle.load() != LEGACY_PROTOCOL:
        raise WeightsError(f"it is not of PyTorch's protocol {LEGACY_PROTOCOL}")
    _check_machine(pickle.load())
    value = pickle.load()
    keys = pickle.load()
    declared = declared_storages(pickle.persistent)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise WeightsError("its list of storages is none")
    places: dict[str, Place] = {}
    position = pickle.position
    for key in keys:
        if key not in declared or key in places:
            raise WeightsError(f"its list of storages names {key!r:.80}, which its pickle does not, or names it twice")
        storage = declared[key]
        stream.seek(position)
        elements = int.from_bytes(stream.read(8), "little")
        size = storage.elements * storage.dtype.itemsize
        position += 8 + size
        if elements != storage.elements or position > file_bytes:
            raise WeightsError(f"storage {key!r:.80} of {size:,} bytes is cut short, or of another size than declared")
        places[key] = Place(position - size, size)
    if position != file_bytes:
        raise WeightsError(f"{file_bytes - position:,} bytes follow its last storage")
    return value, TensorReader(file, places)


def _check_machine(value: object) -> None:
    """`torch.save` notes the machine's byte order and the sizes of its types; only the first means anything."""
    pairs = value.pairs if isinstance(value, Table) else []
    if not any(key == "little_endian" and item is True for key, item in pairs if isinstance(key, str)):
        raise WeightsError("it was written on a big-endian machine, or says nothing of its byte order")


# -------------------------------------------------------------------------------------------------------- safetensors


def _read_safetensors(file: LazyFile, stream: BinaryIO) -> ForeignFile:
    header = read_header(stream)
    start = stream.tell()
    tensors = {entry.name: file.tensor(start + entry.begin, entry.dtype, entry.shape) for entry in header.entries}
    return ForeignFile(
        path=file.shown,
        container="safetensors",
        tensors=tensors,
        facts={"wrapper": "", "average": False, "metadata": header.metadata},
    )
