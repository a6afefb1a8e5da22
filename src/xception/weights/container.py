"""The safetensors container, read without trust and written in one pass.

Layout: 8 bytes little-endian header length, the header (JSON, padded with spaces), the tensors one after the
other. Source: https://github.com/huggingface/safetensors#format. The reader here is stricter than the
library's: the whole header is checked against the file's true size before any memory is taken for tensors,
and nothing in it can make the reader allocate more than a small multiple of the header itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from xception.errors import WeightsError

MAX_HEADER_BYTES = 8 << 20
MAX_HEADER_BRACKETS = 3 << 16  # a tensor has three; what takes the parser's time and memory is their number
_LENGTH_BYTES = 8
_ALIGNMENT = 8

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The digest of the header stands in the header: while it is computed, its own place holds zeros.
HEADER_DIGEST = "header_sha256"
TENSORS_DIGEST = "tensors_sha256"
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor as its header declares it; `begin` and `end` are bytes from the start of the tensors."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """A checked header: `entries` in the order of the file, without gap or overlap, ending where it ends."""

    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]
    raw: bytes

    @property
    def tensor_bytes(self) -> int:
        return self.entries[-1].end if self.entries else 0

    def check_digest(self) -> None:
        """Raise `WeightsError` unless the header is, byte for byte, the one that was written."""
        digest = self.metadata.get(HEADER_DIGEST, "")
        blank = self.raw.replace(digest.encode("ascii", "replace"), _NO_DIGEST.encode(), 1)
        if hashlib.sha256(blank).hexdigest() != digest:
            raise WeightsError("the header is damaged: its checksum does not match")


def read_header(stream: BinaryIO) -> Header:
    """Read and check the header, leaving the stream at the first tensor.

    Raises `WeightsError` (without the file's name) for anything that is not exactly a safetensors file whose
    declared contents fill the file's true size.
    """
    file_bytes = os.fstat(stream.fileno()).st_size
    if file_bytes == 0:
        raise WeightsError("the file is empty")
    start = stream.read(_LENGTH_BYTES)
    if foreign := _foreign_format(start):
        raise WeightsError(f"expected a safetensors file, got {foreign}")
    header_bytes = int.from_bytes(start, "little")
    available = file_bytes - _LENGTH_BYTES
    if not 2 <= header_bytes <= max(available, 0):
        raise WeightsError(
            f"not a safetensors file, or cut short: the header should have {header_bytes:,} bytes "
            f"in a file of {file_bytes:,}"
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise WeightsError(f"the header has {header_bytes:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    raw = stream.read(header_bytes)
    if len(raw) != header_bytes:
        raise WeightsError("the file was cut short while it was read")
    if raw.count(b"{") + raw.count(b"[") > MAX_HEADER_BRACKETS:
        raise WeightsError(f"the header holds more than {MAX_HEADER_BRACKETS:,} lists and objects")
    fields = parse_json_object(raw, "the header")
    metadata = _checked_metadata(fields.pop("__metadata__", {}))
    entries = sorted((_checked_entry(name, value) for name, value in fields.items()), key=_place)
    _check_layout(entries, tensor_bytes=available - header_bytes)
    return Header(entries=tuple(entries), metadata=metadata, raw=raw)


def read_tensors(stream: BinaryIO, header: Header, destinations: Mapping[str, Tensor | None]) -> None:
    """Fill `destinations` (contiguous CPU tensors of the declared dtype and shape) from the stream.

    The stream stands at the first tensor. A destination of None is read for the checksum and dropped. Raises
    `WeightsError` where the file ends early or its checksum does not match; what was read is garbage then.
    """
    digest = hashlib.sha256()
    scratch = bytearray(1 << 20)
    for entry in header.entries:
        destination = destinations[entry.name]
        if destination is None:
            for begin in range(entry.begin, entry.end, len(scratch)):
                _fill(stream, memoryview(scratch)[: min(len(scratch), entry.end - begin)], digest)
        else:
            _fill(stream, _bytes_of(destination), digest)
    if digest.hexdigest() != header.metadata.get(TENSORS_DIGEST):
        raise WeightsError("the weights are damaged: their checksum does not match")


def write_container(stream: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors with their metadata and both checksums to a seekable stream.

    The same tensors and metadata give the same bytes. One tensor at a time is brought to the CPU and made
    contiguous; no second copy of all of them is held. Raises `WeightsError` for a dtype or a layout that the
    container does not have, and for a header that the reader would refuse.
    """
    ordered = _file_order(tensors)
    digests = {HEADER_DIGEST: _NO_DIGEST, TENSORS_DIGEST: _NO_DIGEST}
    placeholder = _encode_header(ordered, {**metadata, **digests})
    stream.write(placeholder)
    tensors_digest = hashlib.sha256()
    for _, tensor in ordered:
        data = _bytes_of(tensor.detach().cpu().contiguous())
        stream.write(data)
        tensors_digest.update(data)
    digests[TENSORS_DIGEST] = tensors_digest.hexdigest()
    blank = _encode_header(ordered, {**metadata, **digests})
    digests[HEADER_DIGEST] = hashlib.sha256(blank[_LENGTH_BYTES:]).hexdigest()
    stream.seek(0)
    stream.write(_encode_header(ordered, {**metadata, **digests}))


def parse_json_object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object from an untrusted text; `WeightsError` for everything else, `what` names it there.

    Stricter than `json.loads`: a repeated name, NaN and infinity are refused, and nesting too deep for the
    parser is an error like any other.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except WeightsError as error:
        raise WeightsError(f"{what} {error}") from None
    except RecursionError:
        raise WeightsError(f"{what} is nested too deeply") from None
    except ValueError:  # not UTF-8, not JSON, or a number of thousands of digits
        raise WeightsError(f"{what} is not JSON") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{what} must be a JSON object, got {type(value).__name__}")
    return value


def encode_json(value: object) -> str:
    """JSON in one canonical form: sorted names, ASCII only (lone surrogates survive), no NaN."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise WeightsError("repeats a name")
    return result


def _no_constant(name: str) -> NoReturn:
    raise WeightsError(f"holds {name}, which is not JSON")


def _foreign_format(start: bytes) -> str | None:
    """The kind of file that these first bytes belong to, for a helpful message; None if they may be ours."""
    kinds = {
        b"PK\x03\x04": "a zip archive (a PyTorch or Keras file?)",
        b"PK\x05\x06": "an empty zip archive",
        b"\x80\x02": "a Python pickle (an old PyTorch file?)",
        b"\x80\x03": "a Python pickle",
        b"\x80\x04": "a Python pickle",
        b"\x80\x05": "a Python pickle",
        b"\x89HDF": "an HDF5 file (Keras?)",
        b"\x1f\x8b": "a gzip archive",
        b"\x89PNG": "a PNG image",
        b"\xff\xd8\xff": "a JPEG image",
    }
    if len(start) == _LENGTH_BYTES and int.from_bytes(start, "little") <= MAX_HEADER_BYTES:
        return None
    return next((kind for magic, kind in kinds.items() if start.startswith(magic)), None)


def _checked_metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise WeightsError("the header's metadata must map names to texts")
    return value


def _checked_entry(name: str, value: object) -> TensorEntry:
    label = name[:80]
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"tensor {label!r} must have exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise WeightsError(f"tensor {label!r} has an unknown dtype; known are {', '.join(DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_sizes(shape) or len(shape) > 8:
        raise WeightsError(f"tensor {label!r} has a shape that is none")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise WeightsError(f"tensor {label!r} has offsets that are none")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise WeightsError(f"tensor {label!r} has offsets that do not fit its shape and dtype")
    return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), begin=begin, end=end)


def _are_sizes(value: object) -> bool:
    # `type`, not `isinstance`: true and false are ints to Python. Beyond 2**53 JSON numbers are not exact.
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= 2**53 for n in value)


def _place(entry: TensorEntry) -> tuple[int, int]:
    return entry.begin, entry.end


def _check_layout(entries: Iterable[TensorEntry], *, tensor_bytes: int) -> None:
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise WeightsError(f"tensor {entry.name[:80]!r} overlaps another, or leaves a gap before it")
        position = entry.end
    if position != tensor_bytes:
        raise WeightsError(
            f"cut short or too long: the header declares {position:,} bytes of tensors, the file has {tensor_bytes:,}"
        )


def _file_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Widest elements first, then by name, as the safetensors library does: every tensor is aligned."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_quantized:
            raise WeightsError(f"tensor {name!r} cannot be stored: {tensor.dtype}, {tensor.layout}")
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _encode_header(ordered: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    """Length and header; its size does not depend on the digests, which always have 64 characters."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in ordered:
        end = position + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    header = encode_json(entries).encode("ascii")
    header += b" " * (-len(header) % _ALIGNMENT)
    if len(header) > MAX_HEADER_BYTES or header.count(b"{") + header.count(b"[") > MAX_HEADER_BRACKETS:
        raise WeightsError(
            f"names and metadata are too large: at most {MAX_HEADER_BYTES:,} bytes and "
            f"{MAX_HEADER_BRACKETS:,} lists and objects could be read back"
        )
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory (CPU, contiguous) as bytes; writing there writes the tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _fill(stream: BinaryIO, place: memoryview, digest: Any) -> None:
    """Read exactly `len(place)` bytes; in pieces, so that the checksum finds them still in the cache."""
    piece = 1 << 20
    for begin in range(0, len(place), piece):
        part = place[begin : begin + piece]
        if stream.readinto(part) != len(part):  # type: ignore[attr-defined]  # a BufferedReader reads in full
            raise WeightsError("the file was cut short while it was read")
        digest.update(part)
