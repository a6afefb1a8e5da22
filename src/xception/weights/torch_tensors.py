"""The tensors that an inert pickle of PyTorch speaks of: which storage, from where, in which shape.

PyTorch writes a tensor as a call of one of its `_rebuild` functions over a storage, which the pickle names by a
persistent id, and whose numbers stand elsewhere in the file. Here the call is read, not made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO, TypeGuard

import torch

from xception.errors import WeightsError
from xception.weights.foreign import ForeignTensor
from xception.weights.inert_values import Global, PersistentId, Record, Table
from xception.weights.lazy_file import LazyFile, span

MAX_DIMENSIONS = 8
_MAX_INTEGER = 1 << 48
_MAX_WRAPPINGS = 4

STORAGE_DTYPES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.uint8,
}
_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_PLAIN = {"_rebuild_tensor": 4, "_rebuild_tensor_v2": 6, "_rebuild_tensor_v3": 7}  # and how many arguments they take
_WRAPPING = ("_rebuild_parameter", "_rebuild_parameter_with_state")
_SUBCLASS = ("_rebuild_from_type", "_rebuild_from_type_v2")
_REFUSED = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without numbers",
    "_rebuild_wrapper_subclass": "a tensor of a special kind",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "_rebuild_xla_tensor": "a tensor of another device",
    "_reconstruct": "a NumPy array",
    "UninitializedParameter": "a tensor without numbers",
}


@dataclass(frozen=True)
class Declared:
    """What a persistent id says of a storage; `window` is a part of it, first element and how many."""

    key: str
    dtype: torch.dtype
    elements: int
    window: tuple[int, int] | None = None


@dataclass(frozen=True)
class Place:
    """Where a storage's bytes are; `check` looks at their checksum, once."""

    begin: int
    size: int
    check: Callable[[BinaryIO], None] | None = None


def declared_storage(found: PersistentId) -> Declared:
    """What a persistent id declares. Raises `WeightsError` for one that names no storage."""
    value = found.value
    if not isinstance(value, tuple) or not 5 <= len(value) <= 6 or value[0] != "storage":
        raise WeightsError("its pickle refers to something that is no storage")
    kind, key, _location, elements = value[1:5]
    dtype = STORAGE_DTYPES.get(kind.name) if isinstance(kind, Global) and kind.module.split(".")[0] == "torch" else None
    if dtype is None:
        raise WeightsError(
            f"its pickle has a storage of an unknown kind: {str(kind)[:80]!r}"
            if isinstance(kind, Global)
            else "its pickle has a storage of no kind"
        )
    if not isinstance(key, str) or len(key) > 100:
        raise WeightsError("its pickle has a storage without a name")
    if not _is_size(elements):
        raise WeightsError(f"storage {key!r:.80} declares a size that is none")
    window = None
    if len(value) == 6 and value[5] is not None:
        view = value[5]
        if not isinstance(view, tuple) or len(view) != 3 or not _is_size(view[1]) or not _is_size(view[2]):
            raise WeightsError(f"storage {key!r:.80} has a part that is none")
        window = (view[1], view[2])
        if sum(window) > elements:
            raise WeightsError(f"storage {key!r:.80} has a part that lies outside of it")
    return Declared(key, dtype, elements, window)


def declared_storages(found: Iterable[PersistentId]) -> dict[str, Declared]:
    """Key -> storage, of all persistent ids that name one; those of classes are passed over."""
    storages: dict[str, Declared] = {}
    for reference in found:
        if isinstance(reference.value, tuple) and reference.value[:1] == ("module",):
            continue
        storage = declared_storage(reference)
        known = storages.setdefault(storage.key, storage)
        if (known.dtype, known.elements) != (storage.dtype, storage.elements):
            raise WeightsError(f"storage {storage.key!r:.80} is declared in two ways")
    return storages


class TensorReader:
    """Makes tensors of records: `places` maps a storage's key to its bytes in `file`."""

    def __init__(self, file: LazyFile, places: Mapping[str, Place]) -> None:
        self._file = file
        self._places = places
        self._made: set[tuple[object, ...]] = set()
        self.total_bytes = 0
        """Of all tensors made so far; one that was made twice, as by a module that has two names, counts once."""

    def tensor(self, value: object) -> ForeignTensor | None:
        """The tensor that a record stands for, unread; None where it stands for something else.

        Raises `WeightsError` (without a name before it) for a kind of tensor that is not read, and for one that does
        not lie inside of its storage.
        """
        call = _call_of(value)
        if call is None:
            return None
        name, args = call
        storage, offset, shape, stride = args[:4]
        if not isinstance(storage, PersistentId):
            raise WeightsError("has no storage")
        declared = declared_storage(storage)
        place = self._places.get(declared.key)
        if place is None:
            raise WeightsError(f"is in storage {declared.key!r:.80}, which the file does not have")
        dtype, elements, first = declared.dtype, declared.elements, 0
        if place.size != elements * dtype.itemsize:
            raise WeightsError(
                f"is in storage {declared.key!r:.80} of {elements * dtype.itemsize:,} bytes, "
                f"for which the file has {place.size:,}"
            )
        if declared.window is not None:
            first, elements = declared.window
        if name == "_rebuild_tensor_v3":
            dtype, elements = _retyped(args[6], elements * dtype.itemsize)
        _check_metadata(args[_PLAIN[name] :])
        sizes, steps = _sizes(shape), _sizes(stride)
        if sizes is None or steps is None or len(sizes) != len(steps) or not _is_size(offset):
            raise WeightsError("has a shape that is none")
        if offset + span(sizes, steps) > elements:
            raise WeightsError("reaches beyond its storage")
        if math.prod(sizes) > elements:
            raise WeightsError("repeats its storage, so that it would take more memory than the file")
        begin = place.begin + first * declared.dtype.itemsize + offset * dtype.itemsize
        identity = (begin, dtype, sizes, steps)
        if identity not in self._made:
            self._made.add(identity)
            self.total_bytes += math.prod(sizes) * dtype.itemsize
        return self._file.tensor(begin, dtype, sizes, steps, check=place.check)


def is_tensor(value: object) -> bool:
    """Whether a record stands for a tensor of any kind, read here or not."""
    try:
        return _call_of(value) is not None
    except WeightsError:
        return True


def _call_of(value: object) -> tuple[str, tuple[object, ...]] | None:
    """Name and arguments of the function that makes the tensor itself, inside of what wraps it."""
    for _ in range(_MAX_WRAPPINGS):
        if not isinstance(value, Record) or not isinstance(value.function, Global):
            return None
        module, name, args = value.function.module, value.function.name, value.args
        if name in _REFUSED and module.split(".")[0] in ("torch", "numpy"):
            raise WeightsError(f"is {_REFUSED[name]}, which is not read")
        if module not in ("torch._utils", "torch._tensor", "torch.tensor") or not isinstance(args, tuple):
            return None
        if name in _PLAIN and len(args) >= _PLAIN[name]:
            return name, args
        if name in _WRAPPING and args:
            value = args[0]
        elif name in _SUBCLASS and len(args) >= 3:
            value = Record(args[0], args[2])
        else:
            return None
    return None


def _retyped(kind: object, size: int) -> tuple[torch.dtype, int]:
    dtype = _DTYPES.get(kind.name) if isinstance(kind, Global) and kind.module == "torch" else None
    if dtype is None:
        raise WeightsError("has a dtype that is not read")
    return dtype, size // dtype.itemsize


def _check_metadata(rest: tuple[object, ...]) -> None:
    """A tensor may be kept as its negative or conjugate; nobody trains one."""
    for item in rest:
        if isinstance(item, Table) and any(value is not False for _, value in item.pairs):
            raise WeightsError("is stored as a negative or conjugate, which is not read")


def _sizes(value: object) -> tuple[int, ...] | None:
    if isinstance(value, Record) and isinstance(value.args, tuple) and len(value.args) == 1:
        value = value.args[0]  # torch.Size of a tuple, as old versions wrote it
    if not isinstance(value, tuple | list) or len(value) > MAX_DIMENSIONS:
        return None
    return tuple(value) if all(map(_is_size, value)) else None


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MAX_INTEGER
