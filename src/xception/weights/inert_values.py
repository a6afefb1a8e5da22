"""What a pickle asks for, written down and nothing more: a class is its name, a call the note that it was asked for.

Dicts are lists of pairs, so that no key is ever hashed or compared; sets are lists. Texts, numbers, None, lists and
tuples stand for themselves.
"""

from __future__ import annotations


class Global:
    """The name of a class or function: nothing more than two texts."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Table:
    """A dict as the pairs it was filled with, in order."""

    __slots__ = ("pairs",)

    def __init__(self) -> None:
        self.pairs: list[tuple[object, object]] = []


class Record(Table):
    """An object that would have been made by calling `function` with `args`; `state` would have been set on it.

    `pairs` are what was put into it as into a dict; what was appended to it as to a list is dropped.
    """

    __slots__ = ("args", "function", "state")

    def __init__(self, function: object, args: object) -> None:
        super().__init__()
        self.function = function
        self.args = args
        self.state: object = None


class PersistentId:
    """What stands outside of the pickle: for PyTorch the tuple that names a storage, or a class with its source."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


class Skipped:
    """A long text or byte string, of which only the length was kept."""

    __slots__ = ("length",)

    def __init__(self, length: int) -> None:
        self.length = length
