"""Damaged and hostile PyTorch files, made by hand: a pickle is a program, and these are the programs of an attacker."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch

SENTINEL = "executed"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MACHINE = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


class Stored:
    """Stands for a storage: becomes a persistent id."""

    def __init__(self, kind: Any = torch.FloatStorage, key: Any = "0", numel: Any = 4, *more: Any) -> None:
        self.id: Any = ("storage", kind, key, "cpu", numel, *more)


class Call:
    """Becomes the call of `function` with `args`, and `state` set on what it returns."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.id if isinstance(value, Stored) else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(value)
    return stream.getvalue()


def tensor(
    storage: Any = None, offset: Any = 0, shape: Any = (2, 2), stride: Any = (2, 1), *more: Any, rebuild: Any = None
) -> Call:
    """A tensor of four floats, or what is asked for."""
    function = rebuild or torch._utils._rebuild_tensor_v2
    return Call(function, storage or Stored(), offset, shape, stride, False, OrderedDict(), *more)


def global_(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


FLOATS = struct.pack("<4f", 1, 2, 3, 4)
GOOD = pickled({"weight": tensor()})


def zip_file(data: bytes = GOOD, storages: dict[str, bytes] | None = None, **members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in ({"0": FLOATS} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return stream.getvalue()


LEGACY_FLOATS = struct.pack("<q", 4) + FLOATS


def legacy_file(
    data: bytes = GOOD,
    keys: Any = ("0",),
    storages: bytes = LEGACY_FLOATS,
    *,
    magic: Any = MAGIC,
    protocol: Any = PROTOCOL,
    machine: Any = MACHINE,
) -> bytes:
    head = b"".join(pickle.dumps(value, 2) for value in (magic, protocol, machine))
    return head + data + pickle.dumps(list(keys), 2) + storages


Case = tuple[str, bytes, str]


def everything() -> Iterator[Case]:
    """(what was done, file, part of the expected message)"""
    for make in (calls, opcodes, bombs, structures, tensors, modules, legacy_streams, archives):
        yield from make()


def in_both(what: str, data: bytes, expected: str) -> Iterator[Case]:
    """The same pickle in either container."""
    yield f"{what}, zip", zip_file(data), expected
    if b"X\x01\0\0\0" + b"0" in data:  # it speaks of storage 0
        yield f"{what}, legacy", legacy_file(data), expected
    else:
        yield f"{what}, legacy", legacy_file(data, keys=(), storages=b""), expected


def calls() -> Iterator[Case]:
    """Pickles that would run something, if they were run."""
    text = f"open({SENTINEL!r}, 'w').close()"
    mark = b"X" + struct.pack("<I", len(text)) + text.encode()
    shell = f"touch {SENTINEL}"
    for module, name, argument in (
        ("os", "system", shell),
        ("posix", "system", shell),
        ("nt", "system", shell),
        ("subprocess", "check_output", f"touch {SENTINEL}"),
        ("builtins", "eval", text),
        ("builtins", "exec", text),
        ("__builtin__", "exec", text),
        ("builtins", "__import__", "antigravity"),
        ("builtins", "open", SENTINEL),
        ("runpy", "run_path", SENTINEL),
        ("importlib", "import_module", "antigravity"),
        ("pickle", "loads", text),
        ("webbrowser", "open", "http://localhost"),
        ("timeit", "timeit", text),
    ):
        called = global_(module, name) + pickled(argument)[2:-1] + b"\x85R"
        yield from in_both(f"{module}.{name} as the whole", b"\x80\x02" + called + b".", "malicious")
        yield from in_both(f"{module}.{name} beside a tensor", GOOD[:-1] + called + b"0.", "malicious")
        yield f"{module}.{name} alone", b"\x80\x02" + called + b".", "malicious"
    stack = b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + mark + b"\x85R."
    yield from in_both("STACK_GLOBAL", stack, "malicious")
    yield from in_both("INST", b"\x80\x02(" + mark + b"ios\nsystem\n.", "the instruction INST")
    yield from in_both("OBJ", b"\x80\x02(" + global_("a", "b") + mark + b"o.", "the instruction OBJ")
    for name, code in (("EXT1", b"\x82\x01"), ("EXT2", b"\x83\x01\0"), ("EXT4", b"\x84\x01\0\0\0")):
        yield from in_both(name, b"\x80\x02" + code + b".", f"the instruction {name}")
    yield from in_both("NEXT_BUFFER", b"\x80\x05\x97.", "the instruction NEXT_BUFFER")
    yield from in_both("a class of nobody's", pickled(Call(io.BytesIO, b"x")), "an object of '_io.BytesIO'")
    # Nothing is malicious about these names; called, they would do harm all the same.
    getter = global_("builtins", "getattr") + global_("torch", "hub") + b"X\x04\0\0\0load\x86R" + mark + b"\x85R"
    yield from in_both("getattr", b"\x80\x02" + getter + b".", "no weights found")
    yield from in_both("torch.load inside", pickled(Call(torch.load, SENTINEL)), "no weights found")
    yield from in_both("BUILD on a function", b"\x80\x02" + global_("torch", "load") + b"}b.", "without attributes")
    yield from in_both("NEWOBJ", b"\x80\x02" + global_("torch", "load") + mark + b"\x85\x81.", "no weights found")
    inner = pickled(Call(torch.load, SENTINEL))
    yield from in_both("a pickle inside of bytes", pickled({"model": inner}, 4), "no weights found")


def opcodes() -> Iterator[Case]:
    """Programs that no pickler writes."""
    for what, code, expected in (
        ("nothing", b"", "cut short"),
        ("only PROTO", b"\x80\x02", "cut short"),
        ("no STOP", b"\x80\x02}", "cut short"),
        ("an empty stack", b"\x80\x02.", "nothing to work on"),
        ("TUPLE3 of two", b"\x80\x02NN\x87.", "nothing to work on"),
        ("REDUCE of nothing", b"\x80\x02R.", "nothing to work on"),
        ("POP of nothing", b"\x80\x020N.", "nothing to work on"),
        ("APPEND below a mark", b"\x80\x02](Na.", "nothing to work on"),
        ("TUPLE without a mark", b"\x80\x02Nt.", "never began"),
        ("APPENDS to a text", b"\x80\x02X\x01\0\0\0a(Ne.", "takes none"),
        ("SETITEMS to a list", b"\x80\x02](NNu.", "takes none"),
        ("an odd number of items", b"\x80\x02}(NNNu.", "takes none"),
        ("BUILD on a dict", b"\x80\x02}}b.", "without attributes"),
        ("BINGET of nothing", b"\x80\x02h\x07.", "never stored"),
        ("LONG_BINGET of nothing", b"\x80\x02j\xff\xff\xff\xff.", "never stored"),
        ("two values at the end", b"\x80\x02}}.", "more than one value"),
        ("a mark at the end", b"\x80\x02}(.", "nothing to work on"),
        ("something behind STOP", b"\x80\x02}.N.", "cut short|follows its end|no weights|list of storages"),
        ("an unknown instruction", b"\x80\x02\xff.", "0xff"),
        ("PERSID", b"\x80\x02P0\n.", "the instruction PERSID"),
        ("STRING", b"\x80\x02S'a'\n.", "the instruction STRING"),
        ("text that is not UTF-8", b"\x80\x02X\x02\0\0\0\xff\xfe.", "not UTF-8"),
        ("a lone surrogate", b"\x80\x02X\x03\0\0\0\xed\xa0\x80.", "not UTF-8"),
        ("a name of a class that is a number", b"\x80\x04K\x01K\x02\x93.", "is no text"),
        ("a line without an end", b"\x80\x02c" + b"a" * 5000, "without an end"),
        ("INT of letters", b"\x80\x02Iabc\n.", "integer that is none"),
        ("LONG of 5000 digits", b"\x80\x02L" + b"9" * 500 + b"L\n.", "integer that is none"),
        ("FLOAT of letters", b"\x80\x02Fabc\n.", "number that is none"),
    ):
        yield f"{what}, zip", zip_file(code), expected
        yield f"{what}, legacy", legacy_file(code, keys=(), storages=b""), ""  # it goes on into what follows


def bombs() -> Iterator[Case]:
    """Pickles that ask for more memory or time than they are long; the long ones in one container."""
    declared = struct.pack("<Q", 1 << 62)
    for what, code, expected in (
        ("BINUNICODE8 of 2**62", b"\x80\x04\x8d" + declared, "declares more than the file holds"),
        ("BINBYTES8 of 2**62", b"\x80\x04\x8e" + declared, "declares more than the file holds"),
        ("BYTEARRAY8 of 2**62", b"\x80\x05\x96" + declared, "declares more than the file holds"),
        ("BINBYTES of 2**31", b"\x80\x03B\xff\xff\xff\x7f", "declares more than the file holds"),
        ("BINUNICODE of 2**31", b"\x80\x02X\xff\xff\xff\x7f", "declares more than the file holds"),
        ("BINSTRING of 2**32", b"\x80\x02T\xff\xff\xff\xff", "declares more than the file holds"),
        ("LONG4 of 2**31", b"\x80\x02\x8b\xff\xff\xff\x7f", "an integer of 2,147,483,647 bytes"),
        ("LONG4 below 0", b"\x80\x02\x8b\xff\xff\xff\xff", "an integer of 4,294,967,295 bytes"),
        ("LONG1 of 255 bytes", b"\x80\x02\x8a\xff" + bytes(255) + b".", "an integer of 255 bytes"),
        ("LONG_BINPUT 2**31", b"\x80\x02}r\xff\xff\xff\x7f.", "no weights found"),
        ("a memo of many", b"\x80\x02" + b"".join(b"}r" + struct.pack("<I", i << 12) for i in range(90_000)) + b".",
         "more than one value"),
        ("600,000 lists", b"\x80\x02" + b"]" * 600_000 + b".", "more than 500,000 instructions"),
        ("600,000 marks", b"\x80\x02" + b"(" * 600_000 + b".", "more than 500,000 instructions"),
        ("600,000 copies", b"\x80\x02}" + b"2" * 600_000 + b".", "more than 500,000 instructions"),
        ("150,000 calls", b"\x80\x02" + b"N)R0" * 150_000 + b".", "more than 500,000 instructions"),
        ("lists 100,000 deep", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "no weights found: expected"),
        ("tuples 200,000 deep", b"\x80\x02)" + b"\x85" * 200_000 + b".", "no weights found: expected"),
        ("dicts 50,000 deep", b"\x80\x02" + b"}K\x01" * 50_000 + b"}" + b"s" * 50_000 + b".", "no weights found"),
        ("a deep tuple as key", b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.", "no weights found"),
        ("dicts in `model`s", b"\x80\x02" + b"}X\x05\0\0\0model" * 50_000 + b"}" + b"s" * 50_000 + b".", "no weights"),
    ):  # fmt: skip
        yield f"{what}, zip", zip_file(code), expected
        if len(code) < 1000:
            yield f"{what}, legacy", legacy_file(code, keys=(), storages=b""), expected
    # Each list holds the one before ten times; then a tuple of the last.
    laughs = b"\x80\x02]q\0" + b"".join(b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(200))
    yield from in_both("a billion laughs", laughs + b"h\xc8\x85.", "more than one value")
    # Each dict holds the one before under three names that are searched.
    names = [b"X" + struct.pack("<I", len(name)) + name for name in (b"model", b"net", b"module")]
    wrappers = b"\x80\x02}q\0" + b"".join(
        b"0}q" + bytes([i + 1]) + b"(" + b"".join(name + b"h" + bytes([i]) for name in names) + b"u" for i in range(200)
    )
    yield from in_both("a billion wrappers", wrappers + b".", "no weights found")
    yield from in_both("a dict in itself", b"\x80\x02}q\x00X\x05\0\0\0modelh\x00s.", "no weights found")
    yield from in_both("a dict in itself thrice", b"\x80\x02}q\x00(X\x05\0\0\0modelh\x00X\x03\0\0\0neth\x00"
                       b"X\x03\0\0\0emah\x00u.", "no weights found")  # fmt: skip
    ordered = (
        b"\x80\x02"
        + global_("collections", "OrderedDict")
        + b"q\x00]("
        + b"NN\x86" * 1000
        + b"e\x85q\x01"
        + (b"h\x00h\x01R" * 100_000)
    )
    yield "OrderedDicts of one list", zip_file(ordered + b"."), "more than one value"


def structures() -> Iterator[Case]:
    """Values that are no state dict."""
    for what, value in (
        ("None", None),
        ("a number", 7),
        ("a text", "weights"),
        ("a list of tensors", [tensor()]),
        ("an empty dict", {}),
        ("a dict of numbers", {"a": 1}),
        ("only an optimiser", {"optimizer": {"state": {0: {"exp_avg": tensor()}}}}),
        ("an empty state dict", {"state_dict": {}}),
        ("numbers for names", {1: tensor()}),
        ("a set", {"a", "b"}),
    ):
        yield from in_both(what, pickled(value), "no weights found")
    twice = b"\x80\x02}(" + (b"X\x01\0\0\0w" + pickled(tensor())[2:-1]) * 2 + b"u."
    yield from in_both("a name twice", twice, "two tensors have the name 'w'")
    yield from in_both("a name of 4000 letters", pickled({"w" * 4000: tensor()}), "a name of 4,000 characters")


def tensors() -> Iterator[Case]:
    """Tensors that are not where they say."""
    utils: Any = torch._utils
    for what, value, expected in (
        ("a negative offset", tensor(offset=-1), "has a shape that is none"),
        ("an offset beyond the end", tensor(offset=1), "reaches beyond its storage"),
        ("an offset of 2**62", tensor(offset=1 << 62), "has a shape that is none"),
        ("an offset of 2**70", tensor(offset=1 << 70), "has a shape that is none"),
        ("an offset of true", tensor(offset=True), "has a shape that is none"),
        ("an offset of None", tensor(offset=None), "has a shape that is none"),
        ("a stride beyond the end", tensor(stride=(2, 2)), "reaches beyond its storage"),
        ("a stride of 2**40", tensor(stride=(1 << 40, 1)), "reaches beyond its storage"),
        ("a negative stride", tensor(offset=3, stride=(-2, -1)), "has a shape that is none"),
        ("a stride of 0", tensor(shape=(1 << 20, 1 << 20), stride=(0, 0)), "repeats its storage"),
        ("too few strides", tensor(stride=(1,)), "has a shape that is none"),
        ("strides of text", tensor(stride="21"), "has a shape that is none"),
        ("a huge shape", tensor(shape=(1 << 30, 1 << 30)), "reaches beyond its storage"),
        ("a negative shape", tensor(shape=(-2, -2)), "has a shape that is none"),
        ("a shape of floats", tensor(shape=(2.0, 2.0)), "has a shape that is none"),
        ("nine dimensions", tensor(shape=(1,) * 9, stride=(1,) * 9), "has a shape that is none"),
        ("no storage", tensor(storage=Call(torch.Size, (4,))), "has no storage"),
        ("a negation", tensor(None, 0, (2, 2), (2, 1), {"neg": True}), "negative or conjugate"),
        (
            "a storage larger than its bytes",
            tensor(Stored(numel=1 << 40), 0, (1 << 40,), (1,)),
            "cut short|the file has",
        ),
        ("a storage of doubles", tensor(Stored(torch.DoubleStorage)), "cut short|the file has 16"),
        ("a storage of 2 elements", tensor(Stored(numel=2), 0, (2,), (1,)), "cut short|the file has 16"),
        ("a storage that is missing", tensor(Stored(key="7")), "which the file does not have"),
        ("a storage outside", tensor(Stored(key="../../../../etc/passwd")), "which the file does not have"),
        ("a storage of no name", tensor(Stored(key=7)), "without a name"),
        ("a storage of a long name", tensor(Stored(key="0" * 1000)), "without a name"),
        ("a storage of a negative size", tensor(Stored(numel=-4)), "a size that is none"),
        ("a storage of unknown kind", tensor(Stored(torch.load)), "unknown kind: 'torch.serialization.load'"),
        ("a storage of text", tensor(Stored("FloatStorage")), "storage of no kind"),
        ("a part outside of the storage", tensor(Stored(torch.FloatStorage, "0", 4, ("v", 3, 2))), "lies outside"),
        ("a part that is none", tensor(Stored(torch.FloatStorage, "0", 4, "part")), "a part that is none"),
        ("beyond its part", tensor(Stored(torch.FloatStorage, "0", 4, ("v", 1, 3))), "reaches beyond its storage"),
        ("a sparse tensor", Call(utils._rebuild_sparse_tensor, torch.sparse_coo, ()), "is a sparse tensor"),
        ("a quantised tensor", Call(utils._rebuild_qtensor, Stored(), 0, (4,), (1,)), "is a quantised tensor"),
        ("a tensor on meta", Call(utils._rebuild_meta_tensor_no_storage, (), (4,)), "without numbers"),
        ("a parameter of a text", Call(utils._rebuild_parameter, "x", True, ()), "no weights found|no tensor"),
        (
            "an unknown dtype",
            tensor(None, 0, (2, 2), (2, 1), torch.load, rebuild=utils._rebuild_tensor_v3),
            "has a dtype",
        ),
    ):
        yield from in_both(what, pickled({"w": value}), expected)
    twice = {"w": tensor(), "v": tensor(Stored(torch.IntStorage))}
    yield from in_both("a storage of two kinds", pickled(twice), "declared in two ways")
    large = pickled({f"w{i}": tensor(Stored(numel=10_000), i, (9_000,), (1,)) for i in range(50)})
    yield "50 tensors of one storage, zip", zip_file(large, {"0": bytes(40_000)}), "share their numbers"
    streamed = struct.pack("<q", 10_000) + bytes(40_000)
    yield "50 tensors of one storage, legacy", legacy_file(large, storages=streamed), "share their numbers"
    identity = {"w": tensor(), "x": Stored.__new__(Stored)}
    identity["x"].id = ("storage",)  # type: ignore[attr-defined]
    yield from in_both("a persistent id of one", pickled(identity), "no storage")
    identity["x"].id = "0"  # type: ignore[attr-defined]
    yield from in_both("a persistent id of text", pickled(identity), "no storage")
    nested = tensor()
    for _ in range(50):
        nested = Call(utils._rebuild_parameter, nested, True, OrderedDict())
    yield from in_both("a parameter of a parameter of ...", pickled({"w": nested}), "no weights found")


def _module(**parts: Any) -> Call:
    state = {"_parameters": OrderedDict(), "_buffers": OrderedDict(), "_modules": OrderedDict(), **parts}
    return Call(OrderedDict, state=state)


def modules() -> Iterator[Case]:
    """Whole modules that cannot be walked."""
    yield from in_both("a module without weights", pickled(_module()), "no weights found")
    yield from in_both("parameters that are a list", pickled(_module(_parameters=[1])), "its parts have no names")
    yield from in_both("a submodule that is none", pickled(_module(_modules={"a": 7})), "its module 'a' is none")
    yield from in_both("a parameter that is none", pickled(_module(_parameters={"w": 7})), "is no tensor")
    yield from in_both("a name with a dot", pickled(_module(_parameters={"a.b": tensor()})), "have no names")
    yield from in_both("a name of numbers", pickled(_module(_modules={1: _module()})), "have no names")
    deep = _module(_parameters={"w": tensor()})
    for _ in range(100):
        deep = _module(_modules={"m": deep})
    yield from in_both("modules 100 deep", pickled(deep), "nested too deeply")
    wide = _module(_parameters={"w": tensor()})
    for _ in range(40):
        wide = _module(_modules={"a": wide, "b": wide})
    yield from in_both("2**40 modules", pickled(wide), "nested too widely")
    # OrderedDict, {..., "_modules": {"m": itself}}
    own = b"\x80\x02" + global_("a", "M") + b")\x81q\x00}(X\x0b\0\0\0_parameters}X\x08\0\0\0_buffers}"
    yield from in_both("a module in itself", own + b"X\x08\0\0\0_modules}X\x01\0\0\0mh\x00sub.", "nested too")


def legacy_streams() -> Iterator[Case]:
    """What is not the pickle in a legacy file."""
    yield "another magic number", legacy_file(magic=MAGIC + 1), "none that torch.save wrote"
    yield "a magic list", legacy_file(magic=[MAGIC]), "none that torch.save wrote"
    yield "another protocol", legacy_file(protocol=1002), "protocol 1001"
    yield "big-endian", legacy_file(machine={**MACHINE, "little_endian": False}), "big-endian"
    yield "no machine", legacy_file(machine=None), "big-endian"
    yield "no keys", legacy_file(keys=()), "follow its last storage"
    yield "keys of numbers", legacy_file(keys=(0,)), "list of storages is none"
    yield "a key twice", legacy_file(keys=("0", "0")), "names it twice"
    yield "a key too many", legacy_file(keys=("0", "1")), "which its pickle does not"
    yield "a wrong number of elements", legacy_file(storages=struct.pack("<q", 5) + FLOATS), "another size"
    yield "a negative number of elements", legacy_file(storages=struct.pack("<q", -4) + FLOATS), "another size"
    yield "bytes behind the end", legacy_file() + b"x", "1 bytes follow its last storage"
    yield "storages cut short", legacy_file()[:-1], "is cut short"
    yield "no storages", legacy_file(storages=b""), "is cut short"
    yield "a plain pickle", pickle.dumps({"w": [1.0]}), "none that torch.save wrote"
    yield "another kind of file", b"\x89PNG\r\n\x1a\n" + bytes(100), "neither a PyTorch file nor"
    yield "an empty file", b"", "is empty"
    yield "a tar archive", bytes(257) + b"ustar" + bytes(300), "a tar archive"


def _patched(data: bytes, signature: bytes, offset: int, value: bytes, *, last: bool = False) -> bytes:
    at = (data.rfind(signature) if last else data.find(signature)) + offset
    return data[:at] + value + data[at + len(value) :]


def archives() -> Iterator[Case]:
    """Zip archives that lie."""
    good, central, local, end = zip_file(), b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"
    yield "compressed", _compressed(), "is compressed"
    yield "a zip bomb", _compressed(pickled({"w": "a" * (64 << 20)})), "is compressed"
    yield "said to be deflated", _patched(good, central, 10, b"\x08\0"), "is compressed"
    yield "encrypted", _patched(good, central, 8, b"\x01\0"), "is encrypted"
    yield "two sizes", _patched(good, central, 20, struct.pack("<I", 5)), "is compressed"
    huge = struct.pack("<2I", (1 << 32) - 2, (1 << 32) - 2)
    yield "a size of 4 GB", _patched(good, central, 20, huge), "does not begin where it should|does not fit"
    yield "a zip64 size that is missing", _patched(good, central, 20, b"\xff" * 8), "size of a large member is missing"
    yield "a place beyond the end", _patched(good, central, 42, b"\xfe\xff\xff\xff"), "does not fit"
    yield "overlapping members", _patched(good, central, 42, struct.pack("<I", 0), last=True), "does not begin|overlaps"
    yield "members in each other", _overlapping(), "overlaps another"
    yield "another name inside", _patched(good, local, 30, b"Archive"), "does not begin where it should"
    yield "another size inside", _patched(good, local, 22, struct.pack("<I", 5)), "does not begin where it should"
    yield "a checksum of the pickle", _patched(good, central, 16, b"abcd"), "its pickle is damaged"
    yield "a checksum of a storage", _patched(good, central, 16, b"abcd", last=True), "storage '0' is damaged"
    changed = good.replace(FLOATS, FLOATS[::-1])
    yield "another storage", changed, "storage '0' is damaged"
    yield "too many members", _patched(good, end, 8, struct.pack("<2H", 9, 9)), "directory is too short"
    yield "too few members", _patched(good, end, 8, struct.pack("<2H", 1, 1)), "directory is too long"
    yield "of several parts", _patched(good, end, 4, b"\x01\0"), "one part of several"
    yield "a directory elsewhere", _patched(good, end, 16, struct.pack("<I", 7)), "not where it should be"
    yield "bytes behind the end", good + b"x", "bytes follow its end"
    yield "bytes before it", b"PK\x03\x04" + good, "not where it should be"
    yield "no directory", good[: good.find(end)], "no directory at its end"
    yield "a giant directory", _giant_directory(), "at most 50,000"
    yield "no pickle", zip_file().replace(b"data.pkl", b"data.pkx"), "it has no data.pkl"
    yield (
        "two pickles",
        zip_file(other__data_pkl=GOOD).replace(b"other/data_pkl", b"other/data.pkl"),
        "it has no data.pkl",
    )
    yield "TorchScript", zip_file(archive__constants_pkl=b"").replace(b"constants_pkl", b"constants.pkl"), "TorchScript"
    yield "big-endian", zip_file(archive__byteorder=b"big"), "big-endian"
    yield "no byte order", zip_file(archive__byteorder=b"little" + bytes(1 << 20)), "says nothing of its byte order"
    yield "a twin", zip_file(archive__dataX0=FLOATS).replace(b"archive/dataX0", b"archive/data/0"), "two members"
    for what, name in (
        ("absolute", b"/rchive/dataX1"),
        ("upwards", b"../hive/dataX1"),
        ("backslash", b"a\\chive/dataX1"),
    ):
        renamed = zip_file(archive__dataX1=b"").replace(b"archive/dataX1", name)
        yield f"a name that is {what}", renamed, "which PyTorch does not write"
    yield "a name that is no text", zip_file(archive__dataX1=b"").replace(b"dataX1", b"data\xff1"), "not UTF-8"
    yield "a Keras file", zip_file().replace(b"archive/data.pkl", b"model.weights.h5"), "it has no data.pkl"


def _compressed(data: bytes = GOOD) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", FLOATS)
    return stream.getvalue()


def _overlapping() -> bytes:
    """The second member's header and bytes stand inside of the first one."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("archive/data/0", FLOATS)
    member = inner.getvalue()[: inner.getvalue().find(b"PK\x01\x02")]
    outer = zip_file(GOOD, {}, archive__x=member)
    at = outer.find(member)
    directory = outer.find(b"PK\x01\x02")
    end = outer.find(b"PK\x05\x06")
    entry = inner.getvalue()[inner.getvalue().find(b"PK\x01\x02") : inner.getvalue().find(b"PK\x05\x06")]
    entry = entry[:42] + struct.pack("<I", at) + entry[46:]
    listing = outer[directory:end] + entry
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 3, 3, len(listing), directory, 0)
    return outer[:directory] + listing + tail


def _giant_directory() -> bytes:
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    listing = entry * 60_000
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 60_000, 60_000, len(listing), 4, 0)
    return b"PK\x03\x04" + listing + tail


def truncations(data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    chosen = random.Random(1)
    points = {
        0,
        1,
        2,
        7,
        8,
        30,
        262,
        len(data) - 1,
        len(data) - 22,
        *(chosen.randrange(len(data)) for _ in range(count)),
    }
    for point in sorted(points):
        yield f"cut to {point} bytes", data[:point]


def bit_flips(data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    chosen = random.Random(2)
    for _ in range(count):
        byte, bit = chosen.randrange(len(data)), chosen.randrange(8)
        flipped = bytearray(data)
        flipped[byte] ^= 1 << bit
        yield f"bit {bit} of byte {byte} flipped", bytes(flipped)
