"""Pickles read as data. Nothing is imported, called or executed: what the file asks for is only written down.

A pickle is a program for a small stack machine. This machine has no instruction that reaches Python: what it builds are
the values of `inert_values`. Instructions that no PyTorch file needs are refused by name. Each instruction costs a
bounded amount of memory and their number is bounded; what is left to the caller is that a structure may contain itself,
or the same part very often. Source of the instructions: Lib/pickletools.py of CPython.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import BinaryIO, Final

from xception.errors import WeightsError
from xception.weights.inert_values import Global, PersistentId, Record, Skipped, Table

MAX_OPERATIONS = 500_000  # Xception-71 with an average, an optimiser and once more as a module takes 200,000
MAX_BYTES = 32 << 20  # without what is skipped
KEPT_BYTES = 1 << 12  # longer texts and byte strings (source code, arrays of numbers) mean nothing here
MAX_INTEGER_BYTES = 32
_MAX_LINE = 1 << 10


_REFUSED: Final = {
    b"p": "PUT",
    b"g": "GET",
    b"i": "INST",
    b"o": "OBJ",
    b"P": "PERSID",
    b"S": "STRING",
    b"\x82": "EXT1",
    b"\x83": "EXT2",
    b"\x84": "EXT4",
    b"\x97": "NEXT_BUFFER",
    b"\x98": "READONLY_BUFFER",
}


# Not the protection, which is that nothing is ever called: a courtesy to who was sent such a file. No checkpoint that
# anybody trained asks for these.
_MALICIOUS_MODULES: Final = {
    *("os", "nt", "posix", "pty", "subprocess", "sys", "shutil", "socket", "runpy", "importlib", "code", "ctypes"),
    *("webbrowser", "bdb", "pdb", "timeit", "pickle", "marshal", "pip"),
}
_MALICIOUS_FUNCTIONS: Final = {"eval", "exec", "execfile", "compile", "open", "__import__", "breakpoint"}
_BUILTINS: Final = ("builtins", "__builtin__")


class InertPickle:
    """Reads one pickle after the other from `stream`, up to byte `end`; all of them share the bounds."""

    def __init__(self, stream: BinaryIO, *, end: int) -> None:
        self.persistent: list[PersistentId] = []
        """Every persistent id, in the order of the file."""
        self._stream = stream
        self._left = end - stream.tell()
        self._budget = min(self._left, MAX_BYTES)
        self._operations = MAX_OPERATIONS
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def load(self) -> object:
        """The next object. Raises `WeightsError` (without the file's name) where it cannot be read."""
        self._stack, self._marks, self._memo = [], [], {}
        read = self._stream.read
        while True:
            code = read(1)
            self._operations -= 1
            self._left -= 1
            if self._left < 0 or not code:
                raise WeightsError("its pickle is cut short, or declares more than the file holds")
            if self._operations < 0:
                raise WeightsError(f"its pickle has more than {MAX_OPERATIONS:,} instructions")
            if code == b".":
                value = self._pop()
                if self._stack or self._marks:
                    raise WeightsError("its pickle is damaged: it stops with more than one value")
                return value
            operation = _OPERATIONS.get(code)
            if operation is None:
                name = _REFUSED.get(code, f"0x{code.hex()}")
                raise WeightsError(f"its pickle has the instruction {name}, which no PyTorch file needs")
            operation(self)

    @property
    def position(self) -> int:
        """Of the first byte behind what was read."""
        return self._stream.tell()

    # ------------------------------------------------------------------------------------------- bytes of the file

    def _take(self, count: int) -> bytes:
        self._charge(count)
        self._budget -= count
        if self._budget < 0:
            raise WeightsError(f"its pickle is longer than the {MAX_BYTES:,} bytes that are read")
        data = self._stream.read(count)
        if len(data) != count:
            raise WeightsError("the file was cut short while it was read")
        return data

    def _charge(self, count: int) -> None:
        if count > self._left:
            raise WeightsError("its pickle is cut short, or declares more than the file holds")
        self._left -= count

    def _line(self) -> bytes:
        line = self._stream.readline(_MAX_LINE)
        self._charge(len(line))
        self._budget -= len(line)
        if not line.endswith(b"\n"):
            raise WeightsError("its pickle has a line without an end")
        return line[:-1]

    def _unsigned(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    # ------------------------------------------------------------------------------------------------- the stack

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise WeightsError("its pickle is damaged: an instruction finds nothing to work on")
        return self._stack.pop()

    def _top(self) -> object:
        value = self._pop()
        self._stack.append(value)
        return value

    def _pop_mark(self) -> list[object]:
        if not self._marks:
            raise WeightsError("its pickle is damaged: a group that never began ends")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    # --------------------------------------------------------------------------------- values

    def _text(self, length: int) -> None:
        data = self._kept(length)
        self._push(_decoded(data) if isinstance(data, bytes) else data)

    def _bytes(self, length: int) -> None:
        self._push(self._kept(length))

    def _old_text(self, length: int) -> None:
        """A str of Python 2, which holds text or bytes."""
        data = self._kept(length)
        self._push(data.decode("ascii") if isinstance(data, bytes) and data.isascii() else data)

    def _kept(self, length: int) -> bytes | Skipped:
        if length <= KEPT_BYTES:
            return self._take(length)
        self._charge(length)
        self._stream.seek(length, 1)
        return Skipped(length)

    def _long_integer(self, length: int) -> None:
        if length > MAX_INTEGER_BYTES:
            raise WeightsError(f"its pickle has an integer of {length:,} bytes; at most {MAX_INTEGER_BYTES} are read")
        self._push(int.from_bytes(self._take(length), "little", signed=True))

    def _integer_line(self) -> None:
        line = self._line().removesuffix(b"L")
        if line in (b"00", b"01"):
            self._push(line == b"01")
        elif len(line) <= 40 and line.removeprefix(b"-").isdigit():
            self._push(int(line))
        else:
            raise WeightsError("its pickle has an integer that is none")

    def _float_line(self) -> None:
        try:
            self._push(float(self._line()))
        except ValueError:
            raise WeightsError("its pickle has a number that is none") from None

    # ------------------------------------------------------------------------------------------------- containers

    def _set_items(self, values: list[object]) -> None:
        target = self._top()
        if not isinstance(target, Table) or len(values) % 2:
            raise WeightsError("its pickle is damaged: items are put into something that takes none")
        target.pairs.extend(zip(values[::2], values[1::2], strict=True))

    def _append(self, values: list[object]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Record):
            raise WeightsError("its pickle is damaged: items are appended to something that takes none")

    def _dict(self) -> None:
        values = self._pop_mark()
        self._push(Table())
        self._set_items(values)

    def _tuple(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self._push(tuple(reversed(values)))

    # ------------------------------------------------------------------------------- what would have reached Python

    def _global_line(self) -> None:
        module = _decoded(self._line())
        self._push(_checked_global(module, _decoded(self._line())))

    def _global_stack(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise WeightsError("its pickle is damaged: the name of a class is no text")
        self._push(_checked_global(module, name))

    def _reduce(self) -> None:
        args = self._pop()
        self._push(Record(self._pop(), args))

    def _new_object_with_keywords(self) -> None:
        self._pop()
        self._reduce()

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, Record):
            raise WeightsError("its pickle is damaged: something without attributes is given some")
        target.state = state

    def _persistent(self) -> None:
        found = PersistentId(self._pop())
        self.persistent.append(found)
        self._push(found)

    # ------------------------------------------------------------------------------------------------- the memo

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise WeightsError("its pickle is damaged: it recalls what it never stored")
        self._push(self._memo[index])


def _checked_global(module: str, name: str) -> Global:
    if module.partition(".")[0] in _MALICIOUS_MODULES or (module in _BUILTINS and name in _MALICIOUS_FUNCTIONS):
        wanted = f"{module}.{name}"
        raise WeightsError(f"its pickle asks for {wanted[:90]!r}, as weights never do: the file is malicious")
    return Global(module, name)


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise WeightsError("its pickle has a text that is not UTF-8") from None


def _double(data: bytes) -> float:
    value: float = struct.unpack(">d", data)[0]
    return value


_OPERATIONS: dict[bytes, Callable[[InertPickle], object]] = {
    b"\x80": lambda m: m._take(1),  # PROTO
    b"\x95": lambda m: m._take(8),  # FRAME
    b"(": lambda m: m._marks.append(len(m._stack)),  # MARK
    b"0": lambda m: m._marks.pop() if m._marks and m._marks[-1] == len(m._stack) else m._pop(),  # POP
    b"1": lambda m: m._pop_mark(),  # POP_MARK
    b"2": lambda m: m._push(m._top()),  # DUP
    # values
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"I": lambda m: m._integer_line(),
    b"L": lambda m: m._integer_line(),
    b"J": lambda m: m._push(int.from_bytes(m._take(4), "little", signed=True)),  # BININT
    b"K": lambda m: m._push(m._unsigned(1)),  # BININT1
    b"M": lambda m: m._push(m._unsigned(2)),  # BININT2
    b"\x8a": lambda m: m._long_integer(m._unsigned(1)),  # LONG1
    b"\x8b": lambda m: m._long_integer(m._unsigned(4)),  # LONG4
    b"F": lambda m: m._float_line(),
    b"G": lambda m: m._push(_double(m._take(8))),  # BINFLOAT
    b"V": lambda m: m._push(_decoded(m._line())),  # UNICODE
    b"X": lambda m: m._text(m._unsigned(4)),  # BINUNICODE
    b"\x8c": lambda m: m._text(m._unsigned(1)),  # SHORT_BINUNICODE
    b"\x8d": lambda m: m._text(m._unsigned(8)),  # BINUNICODE8
    b"U": lambda m: m._old_text(m._unsigned(1)),  # SHORT_BINSTRING
    b"T": lambda m: m._old_text(m._unsigned(4)),  # BINSTRING
    b"C": lambda m: m._bytes(m._unsigned(1)),  # SHORT_BINBYTES
    b"B": lambda m: m._bytes(m._unsigned(4)),  # BINBYTES
    b"\x8e": lambda m: m._bytes(m._unsigned(8)),  # BINBYTES8
    b"\x96": lambda m: m._bytes(m._unsigned(8)),  # BYTEARRAY8
    # containers; a set is as good as a list here
    b"}": lambda m: m._push(Table()),
    b"]": lambda m: m._push([]),
    b")": lambda m: m._push(()),
    b"\x8f": lambda m: m._push([]),  # EMPTY_SET
    b"d": lambda m: m._dict(),
    b"l": lambda m: m._push(m._pop_mark()),
    b"t": lambda m: m._push(tuple(m._pop_mark())),
    b"\x91": lambda m: m._push(tuple(m._pop_mark())),  # FROZENSET
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"a": lambda m: m._append([m._pop()]),
    b"e": lambda m: m._append(m._pop_mark()),
    b"\x90": lambda m: m._append(m._pop_mark()),  # ADDITEMS
    b"s": lambda m: m._set_items([*reversed([m._pop(), m._pop()])]),
    b"u": lambda m: m._set_items(m._pop_mark()),
    # what would have reached Python
    b"c": lambda m: m._global_line(),
    b"\x93": lambda m: m._global_stack(),
    b"R": lambda m: m._reduce(),
    b"\x81": lambda m: m._reduce(),  # NEWOBJ
    b"\x92": lambda m: m._new_object_with_keywords(),
    b"b": lambda m: m._build(),
    b"Q": lambda m: m._persistent(),
    # the memo
    b"q": lambda m: m._put(m._unsigned(1)),
    b"r": lambda m: m._put(m._unsigned(4)),
    b"h": lambda m: m._get(m._unsigned(1)),
    b"j": lambda m: m._get(m._unsigned(4)),
    b"\x94": lambda m: m._put(len(m._memo)),  # MEMOIZE
}
