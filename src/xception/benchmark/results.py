"""Result files, and the documents' tables that are made of them: ``python -m xception.benchmark.results README.md``.

A file in ``benchmarks/results/`` holds JSON lines: the machine first (``"system": "machine"``), then a line a case. Its
name begins with what it is of: ``inference``, ``training`` or, measured with ``--scaling``, ``scaling``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
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


def marks(kind: Kind) -> tuple[str, str]:
    """Between which lines of a document the table of this kind stands."""
    return f"<!-- benchmark:{kind} -->", f"<!-- /benchmark:{kind} -->"


def with_table(text: str, made: str, kind: Kind) -> str:
    """`text` with `made` between the two marks. Raises `ConfigError` where they are missing."""
    first, last = marks(kind)
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ConfigError(f"expected {first} and, after it, {last}")
    return f"{before}{first}\n{made}{last}{after}"


def main(paths: Sequence[str]) -> None:
    """Put the tables of the result files beside each document, or beside its folder, between the marks it has."""
    from xception.benchmark.tables import table

    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8")
        kinds = [kind for kind in KINDS if marks(kind)[0] in text]
        if not kinds:
            raise ConfigError(f"{path}: expected {' or '.join(marks(kind)[0] for kind in KINDS)}")
        places = [folder / FOLDER for folder in path.resolve().parents[:2]]
        folder = next((place for place in places if place.is_dir()), places[0])
        for kind in kinds:
            text = with_table(text, table(folder, kind), kind)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
