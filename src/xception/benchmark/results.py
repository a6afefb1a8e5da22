"""The documents' tables that are made of result files: ``python -m xception.benchmark.results README.md``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from xception.benchmark.result_files import FOLDER, KINDS, Kind
from xception.benchmark.tables import table
from xception.errors import ConfigError


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
    try:
        main(sys.argv[1:])
    except (ConfigError, OSError) as error:
        sys.exit(f"xception: error: {error}")
