"""Lines for machines on standard output, words for people on standard error (without --json: on standard output)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from xception.data.labels import printable as printable

WRONG_USE = 2


def complain(message: str) -> int:
    """One line on standard error, whatever the message holds; returns the exit status of wrong use."""
    line = " ".join(message.split())
    sys.stderr.write(f"xception: error: {printable(line)}\n")
    return WRONG_USE


def json_line(value: Mapping[str, Any]) -> None:
    """One JSON object as one line of ASCII, at once."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; those of numbers to the right."""
    cells = [[printable(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(row[i].lstrip("-")[:1].isdigit() or not row[i] for row in cells[1:]) for i in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """A share as people read it; nothing where there is none."""
    return "" if value is None else f"{100 * value:.2f} %"


def human_bytes(value: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def human_seconds(value: float) -> str:
    """A time span in the units that fit."""
    if value < 120:
        return f"{value:.0f} s"
    if value < 7200:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h" if value < 172_800 else f"{value / 86_400:.1f} days"
