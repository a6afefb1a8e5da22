"""Result files, and the README's tables that are made of them: ``python -m xception.benchmark.results README.md``.

A file in ``benchmarks/results/`` holds JSON lines: the machine first (``"system": "machine"``), then a line a case.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from xception.benchmark.case import PARTS
from xception.errors import ConfigError
from xception.weights.files import atomic_write

FOLDER = Path("benchmarks", "results")
PATTERN = "inference*.jsonl"
BEGIN, END = "<!-- benchmark:inference -->", "<!-- /benchmark:inference -->"
TO_INCEPTION = "ratio_to_inception_v3"

Kind = Literal["inference", "training"]
KINDS: tuple[Kind, ...] = ("inference", "training")
"""Each has files and a table of its own; above are inference's pattern and marks."""

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
    return PATTERN.replace("inference", kind)


def marks(kind: Kind) -> tuple[str, str]:
    """Between which lines of a document the table of this kind stands."""
    return BEGIN.replace("inference", kind), END.replace("inference", kind)


def table(folder: Path, kind: Kind = "inference") -> str:
    """The README's table, Markdown: for each file the machine, then ours and the best peer of each comparison."""
    parts = []
    for path in sorted(folder.glob(pattern(kind))):
        machine, cases = read_lines(path)
        heads = _ROW_HEADS[kind]
        compared = any(line.get(TO_INCEPTION) is not None for line in cases)  # as in the paper's Table 3
        if compared:
            heads = (f"{heads[0]} to Inception V3 |", f"{heads[1]} --- |")
        parts.append("\n".join([*heads, *_rows(cases, kind, compared)]) + f"\n\n{_caption(machine, path)}\n")
    if not parts:
        raise ConfigError(f"{folder}: no {pattern(kind)} to make a table of")
    return "\n".join(parts)


_ROW_HEADS: dict[Kind, tuple[str, str]] = {
    "inference": (
        "| network | precision | mode | `xception` | best peer | ratio | logit error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ),
    "training": (
        "| network | precision | backend | `xception` | best peer | ratio | data, forward, backward, optimiser | MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ),
}


def _rows(cases: Sequence[Line], kind: Kind, compared: bool) -> list[str]:
    rows = []
    for line in cases:
        if line["system"] != "xception" or "error" in line or line.get("scaling"):
            continue
        peers = [peer for peer in cases if _compares(peer, line)]
        ratio = line["ratio_to_best_peer"] or line.get("ratio_to_best_half_precision_peer")
        name = line["best_peer"] or line.get("best_half_precision_peer")
        best = next(
            (peer for peer in peers if f"{peer['system']} {peer['variant']}, {peer['precision']}" == name), None
        )
        peer_text = "none" if best is None else f"{_speed(best)} ({name})"
        network, ratio_text = f"`{line['model']}`, {line['size']} pixels", "" if ratio is None else f"{ratio:.2f}"
        if kind == "training":
            cells = [
                f"{network}, batch {line['batch']}",
                line["precision"],
                line["variant"],
                _speed(line),
                peer_text,
                ratio_text,
                ", ".join(f"{100 * line[f'{part}_share']:.0f} %" for part in PARTS),
                f"{line['peak_memory_mb']:,.0f}",
            ]
        else:
            cells = [
                network,
                line["precision"],
                f"{line['mode']}, batch {line['batch']}",
                _speed(line),
                peer_text,
                ratio_text,
                f"{line['logit_error']:.1e}",
            ]
        if compared:
            found = line.get(TO_INCEPTION)
            cells.append("" if found is None else f"{found:.2f}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _compares(peer: Line, line: Line) -> bool:
    return (
        peer["system"] != "xception"
        and "error" not in peer
        and all(peer.get(key) == line.get(key) for key in ("model", "mode", "batch", "size", "threads", "scaling"))
    )


def _speed(line: Line) -> str:
    if line["mode"] == "latency":
        return f"{line['latency_ms']:.1f} ms"
    return f"{line['images_per_second']:.1f} images/s"


def _caption(machine: Line, path: Path) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items() if found)
    features = ", ".join(machine["features"]) or "no vector instructions"
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    where = f"`{FOLDER.as_posix()}/{path.name}`"
    return f"{machine['cpu']} ({features}), {threads}; {versions}; {machine['date']}, {where}."


def with_table(text: str, made: str, kind: Kind = "inference") -> str:
    """`text` with `made` between the two marks. Raises `ConfigError` where they are missing."""
    first, last = marks(kind)
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ConfigError(f"expected {first} and, after it, {last}")
    return f"{before}{first}\n{made}{last}{after}"


def main(paths: Sequence[str]) -> None:
    """Put the tables of the result files beside each document into it: of each kind that there are files of."""
    for path in map(Path, paths):
        text, folder = path.read_text(encoding="utf-8"), path.parent / FOLDER
        for kind in KINDS:
            if kind == "inference" or any(folder.glob(pattern(kind))):
                text = with_table(text, table(folder, kind), kind)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
