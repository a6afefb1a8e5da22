"""Result files of benchmarks.

A file in ``benchmarks/results/`` holds JSON lines: the machine first (``"system": "machine"``), then a line a case. Its
name begins with what it is of: ``inference``, ``training`` or, measured with ``--scaling``, ``scaling``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from xception.errors import ConfigError
from xception.weights.files import atomic_write

FOLDER = Path("benchmarks", "results")

Kind = Literal["inference", "training", "scaling"]
KINDS: tuple[Kind, ...] = ("inference", "training", "scaling")
"""Each has files and a table of its own."""

Line = Mapping[str, Any]


def write_lines(path: str | Path, lines: Iterable[Line]) -> None:
    """Write `lines` to `path` in one step. Raises `WeightsError` where it cannot be written."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)

    def write(stream: BinaryIO) -> None:
        stream.write(text.encode("ascii"))

    atomic_write(path, write)


def read_lines(path: Path) -> tuple[Line, list[Line]]:
    """The machine's line and those of the cases. Raises `ConfigError` for another file."""
    try:
        machine, *cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON lines of a benchmark: {error}") from None
    if not isinstance(machine, dict) or machine.get("system") != "machine":
        raise ConfigError(f"{path}: expected the machine in its first line")
    return machine, cases


def pattern(kind: Kind) -> str:
    """What the result files of this kind are called."""
    return f"{kind}*.jsonl"
