"""Damaged and hostile bundles, made from a genuine one.

A flipped bit is found by a checksum; whoever forges a file computes the checksums anew, as `sealed` does, so
that what lies behind them is tested too.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

BLANK = "0" * 64


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header fields and tensor bytes of a genuine file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_header(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def sealed(fields: dict[str, Any], body: bytes) -> bytes:
    """A file with these contents and matching checksums, written here independently of the package."""
    metadata = fields["__metadata__"]
    metadata["tensors_sha256"], metadata["header_sha256"] = hashlib.sha256(body).hexdigest(), BLANK
    blank = json.dumps(fields)
    return with_header(blank.replace(BLANK, hashlib.sha256(blank.encode()).hexdigest()).encode(), body)


def edited(data: bytes, change: Callable[[dict[str, Any]], object], body: bytes | None = None) -> bytes:
    fields, own_body = split(data)
    change(fields)
    return sealed(fields, own_body if body is None else body)


def described(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """As `edited`, of the JSON inside the metadata."""

    def inner(fields: dict[str, Any]) -> None:
        info = json.loads(fields["__metadata__"]["bundle"])
        change(info)
        fields["__metadata__"]["bundle"] = json.dumps(info)

    return edited(data, inner)


def truncations(data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    chosen = random.Random(1)
    header_end = 8 + int.from_bytes(data[:8], "little")
    points = {0, 1, 7, 8, 9, header_end - 1, header_end, header_end + 1, len(data) - 1}
    while len(points) < count:
        points.add(chosen.randrange(len(data)))
    for point in sorted(points):
        yield f"cut to {point} bytes", data[:point]


def bit_flips(data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """One flipped bit each: every bit of the length, and as many of the header as of the tensors."""
    chosen = random.Random(2)
    header_end = 8 + int.from_bytes(data[:8], "little")
    places = [(byte, bit) for byte in range(8) for bit in range(8)]
    places += [(chosen.randrange(8, header_end), chosen.randrange(8)) for _ in range(count // 2)]
    places += [(chosen.randrange(header_end, len(data)), chosen.randrange(8)) for _ in range(count // 2)]
    for byte, bit in places:
        flipped = bytearray(data)
        flipped[byte] ^= 1 << bit
        yield f"bit {bit} of byte {byte} flipped", bytes(flipped)


def hostile_headers(data: bytes) -> Iterator[tuple[str, bytes, str]]:
    """(what was done, file, part of the expected message)"""
    fields, body = split(data)
    names = [name for name in fields if name != "__metadata__"]
    first, second = names[0], names[1]
    size = len(body)

    def entry(name: str, **values: Any) -> bytes:
        return edited(data, lambda f: f[name].update(values))

    yield "huge header", (2**63).to_bytes(8, "little") + data[8:], "should have 9,223,372,036,854,775,808 bytes"
    yield "header of 100 MB", (100_000_000).to_bytes(8, "little") + data[8:], "should have 100,000,000 bytes"
    large = 9 << 20
    yield "header over the limit", with_header(b"{" + b" " * large + b"}", b""), "at most 8,388,608 are read"
    yield "header of nothing", with_header(b"", data[8:]), "should have 0 bytes"
    yield "negative offset", entry(first, data_offsets=[-8, 8]), "has offsets that are none"
    yield "offsets backwards", entry(first, data_offsets=[16, 8]), "do not fit its shape"
    yield "offset beyond the end", entry(first, data_offsets=[2**40, 2**40 + 8]), "do not fit"
    yield "offset of 2**70", entry(first, data_offsets=[2**70, 2**70]), "has offsets that are none"
    yield "three offsets", entry(first, data_offsets=[0, 8, 8]), "has offsets that are none"
    yield "boolean offsets", entry(first, data_offsets=[False, True]), "has offsets that are none"
    yield "float offsets", entry(first, data_offsets=[0.0, 8.0]), "has offsets that are none"
    yield "text offsets", entry(first, data_offsets="08"), "has offsets that are none"
    yield "overlap", edited(data, lambda f: f[second].update(f[first])), "overlaps another, or leaves a gap"
    yield "giant shape", entry(first, shape=[2**30, 2**30, 2**30]), "do not fit"
    yield "giant shape that wraps to 0", entry(first, shape=[2**32, 2**32]), "do not fit"
    yield "zero times giant", entry(first, shape=[0, 2**50]), "do not fit"
    yield "negative shape", entry(first, shape=[-1, -8]), "has a shape that is none"
    yield "nine dimensions", entry(first, shape=[1] * 9), "has a shape that is none"
    yield "shape of true", entry(first, shape=[True]), "has a shape that is none"
    yield "shape as text", entry(first, shape="12"), "has a shape that is none"
    yield "unknown dtype", entry(first, dtype="F8_E4M3"), "unknown dtype"
    yield "dtype as list", entry(first, dtype=["F32"]), "unknown dtype"
    yield "wider dtype", entry(first, dtype="F64" if fields[first]["dtype"] != "F64" else "F32"), "do not fit"
    floating = next(name for name in names if fields[name]["dtype"] == "F32")
    yield "integers for floats", entry(floating, dtype="I32"), "expected torch.float32, got torch.int32"
    yield "other shape of equal size", entry(floating, shape=fields[floating]["shape"] + [1]), "expected shape"
    yield "extra field", entry(first, more=1), "must have exactly dtype, shape and data_offsets"
    yield "missing field", edited(data, lambda f: f[first].pop("shape")), "must have exactly"
    yield "no fields", edited(data, lambda f: f.update({first: []})), "must have exactly"
    yield "metadata of numbers", edited(data, lambda f: f["__metadata__"].update(more=1)), "must map names to texts"
    yield "metadata as list", with_header(b'{"__metadata__":[]}', b""), "must map names to texts"
    yield "renamed tensor", edited(data, lambda f: f.update({"evil": f.pop(first)})), "unexpected 'evil'"
    yield "no tensors at all", sealed({"__metadata__": fields["__metadata__"]}, b""), "larger network"
    more = {"dtype": "U8", "shape": [8], "data_offsets": [size, size + 8]}
    yield "one tensor more", edited(data, lambda f: f.update(extra=more), body + bytes(8)), "unexpected 'extra'"
    yield "bytes after the end", data + b"x", "the file has"
    yield "bytes after the end, sealed", sealed(split(data)[0], body + bytes(8)), "the file has"
    yield (
        "million tiny tensors",
        with_header(("{" + ",".join(f'"{k}":{{}}' for k in range(500_000)) + "}").encode(), b""),
        "more than 196,608 lists and objects",
    )
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    yield (
        "60,000 empty tensors",
        with_header(("{" + ",".join(f'"{k}":{empty}' for k in range(60_000)) + "}").encode(), b""),
        "but no bundle",
    )
    yield "deep nesting", with_header(b'{"a":' + b"[" * 190_000 + b"]" * 190_000 + b"}", b""), "too deeply"
    yield "deep objects", with_header(b'{"a":' * 190_000 + b"1" + b"}" * 190_000, b""), "too deeply"
    yield "giant number", with_header(b'{"a":' + b"9" * 1_000_000 + b"}", b""), "is not JSON"
    yield "not JSON", with_header(b"{'a': 1}", b""), "is not JSON"
    yield "not UTF-8", with_header(b'{"\xff": 1}', b""), "is not JSON"
    yield "NaN", with_header(b'{"a":NaN}', b""), "which is not JSON"
    yield "a list", with_header(b"[1,2]", b""), "must be a JSON object"
    twice = json.dumps(fields)[:-1] + f", {json.dumps(first)}: {json.dumps(fields[first])}" + "}"
    yield "repeated name", with_header(twice.encode(), body), "repeats a name"
    yield "no metadata", edited(data, lambda f: f["__metadata__"].clear()), "but no bundle"
    yield "other format", edited(data, lambda f: f["__metadata__"].update(format="pt")), "but no bundle"
    yield "next version", edited(data, lambda f: f["__metadata__"].update(version="2")), "bundle version '2'"
    yield "no checksum", with_header(json.dumps(_without_digests(data)).encode(), body), "checksum does not match"
    yield "swapped tensors", sealed(split(data)[0], body)[:-size] + body[::-1], "weights are damaged"


def _without_digests(data: bytes) -> dict[str, Any]:
    fields, _ = split(data)
    fields["__metadata__"].pop("header_sha256")
    return fields


def hostile_descriptions(data: bytes) -> Iterator[tuple[str, bytes, str]]:
    """(what was done, file, part of the expected message)"""

    def config(**values: Any) -> bytes:
        return described(data, lambda info: info["config"].update(values))

    for field in ("num_classes", "in_channels", "middle_modules", "middle_units", "input_size"):
        for value in (10**9, 10**30, -1, 0.5, True, None, "8", [8], {"a": 8}):
            yield f"{field} = {value!r}", config(**{field: value}), ""
    for field in ("stem_widths", "entry_widths", "exit_widths", "fully_connected"):
        for value in ([10**9] * 2, [16_000] * 1000, [1] * 100_000, [[[8]]], ["8", "8"], {}, "88", 8, [-4, 4]):
            yield f"{field} = {str(value)[:30]}", config(**{field: value}), ""
    yield "all modules that are allowed", config(middle_modules=1000, middle_units=1000), "larger network"
    yield "tied modules", config(middle_modules=1000, middle_units=1000, tied_middle=True), "larger network"
    yield "wide and deep", config(entry_widths=[16_000] * 500), "larger network"
    yield "fully connected", config(fully_connected=[16_000] * 4), "larger network"
    yield "unknown field", config(evil=1), "evil"
    for model in ("nothing", "", "a" * 10_000, "../../etc/passwd", "timm/hf-hub:evil/evil", "torchvision/get_model"):
        yield f"model {model[:20]!r}", described(data, lambda info, m=model: info.update(model=m)), ""
    yield "model as list", described(data, lambda info: info.update(model=["xception"])), "model must be str"
    yield "other network", described(data, lambda info: info.update(model="inception_v3")), ""
    yield "large network", described(data, lambda info: info.update(model="xception", config={"num_classes": 3})), ""
    yield "two names", described(data, lambda info: info["class_names"].pop()), "2 class names"
    yield "names of numbers", described(data, lambda info: info.update(class_names=[1, 2, 3])), "class_names"
    yield "names missing", described(data, lambda info: info.pop("class_names")), "'class_names'"
    yield "extra field", described(data, lambda info: info.update(code="import os")), "'code'"
    yield "multi_label as text", described(data, lambda info: info.update(multi_label="no")), "multi_label must be"
    sizes: list[Any] = [[10**9, 10**9], [10**5, 1], [0, 16], [-1, 16], [16], "16", None, [1.5, 16], [True, True]]
    for size in sizes:
        yield f"size {size}", described(data, lambda info, s=size: info["preprocess"].update(size=s)), ""
    for share in (1e-9, 0, -1, 1e300, "1", None):
        change = {"crop_fraction": share}
        yield f"crop {share}", described(data, lambda info, c=change: info["preprocess"].update(c)), ""
    yield "odd mean", described(data, lambda info: info["preprocess"].update(mean=[0.5, 0.4])), ""
    yield "zero std", described(data, lambda info: info["preprocess"].update(std=[0, 0, 0])), ""
    yield "grey", described(data, lambda info: info["preprocess"].update(channels=1, mean=[0.5], std=[0.5])), ""
    deep = "[" * 100_000 + "]" * 100_000
    yield "deep description", edited(data, lambda f: f["__metadata__"].update(bundle=deep)), "too deeply"
    yield "no description", edited(data, lambda f: f["__metadata__"].pop("bundle")), "is not JSON"


def foreign_files() -> Iterator[tuple[str, bytes, str]]:
    """(what it is, file, part of the expected message)"""
    yield "empty", b"", "the file is empty"
    yield "zip", b"PK\x03\x04" + bytes(200), "got a zip archive"
    yield "pickle", b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00cposix\nsystem\n.", "got a Python pickle"
    yield "HDF5", b"\x89HDF\r\n\x1a\n" + bytes(200), "got an HDF5 file"
    yield "PNG", b"\x89PNG\r\n\x1a\n" + bytes(200), "got a PNG image"
    yield "text", b"hello, world, this is a text\n" * 20, "not a safetensors file, or cut short"
    yield "zeros", bytes(1000), "should have 0 bytes"
    yield (
        "foreign safetensors",
        with_header(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "a safetensors file, but no bundle",
    )
