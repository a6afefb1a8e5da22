"""results.jsonl: a line an arm and seed that is finished, with everything that plots and tables are made of.

The first line says what the experiment is (``"experiment"``); each other is an arm with a seed. The file is replaced as
a whole with every line that is added, so that a reader, or a run that was killed, finds all of a line or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from xception.errors import DataError
from xception.training.run_folder import differences
from xception.weights.files import atomic_write, shown

NAME = "results.jsonl"
Line = Mapping[str, Any]


@dataclass(kw_only=True)
class Results:
    """The results in a folder: `about` is the first line, None before it was written."""

    path: Path
    about: Line | None = None
    lines: list[Line] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Results:
        """What is there so far; `DataError` for a file that is none of ours."""
        path = folder / NAME
        if not path.exists():
            return cls(path=path)
        try:
            about, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if "experiment" not in about or not all("arm" in line and "seed" in line for line in lines):
                raise ValueError("a line says neither which experiment nor which arm and seed")
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{shown(path)}: expected the results of xception reproduce: {error}") from None
        return cls(path=path, about=about, lines=lines)

    def begin(self, about: Line) -> None:
        """Write, or replace, the first line."""
        self.about = _as_json(about)
        self._write()

    def add(self, line: Line) -> None:
        """Add a line; on the disk when this returns."""
        self.lines.append(_as_json(line))  # as it will be read: tuples are lists
        self._write()

    def find(self, arm: str, seed: int) -> Line | None:
        """The line of that arm and seed, if it is finished."""
        return next((line for line in self.lines if line["arm"] == arm and line["seed"] == seed), None)

    def of(self, arm: str) -> list[Line]:
        """All lines of an arm, by seed."""
        return sorted((line for line in self.lines if line["arm"] == arm), key=lambda line: int(line["seed"]))

    def _write(self) -> None:
        data = "".join(json.dumps(line, allow_nan=False) + "\n" for line in [self.about, *self.lines]).encode("ascii")

        def write(stream: BinaryIO) -> None:
            stream.write(data)

        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, write)


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is different between two descriptions, for one line; empty where nothing is."""
    found = [f"{name} was {was}, is {now_is}" for name, was, now_is in differences(before, _as_json(now))]
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return "; ".join(found[:4]) + more


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain
