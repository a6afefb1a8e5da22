"""Tables of result files, in Markdown: ours beside the best peer, and how cost grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xception.benchmark.case import PARTS
from xception.benchmark.result_files import FOLDER, Kind, Line, pattern, read_lines
from xception.errors import ConfigError

TO_INCEPTION = "ratio_to_inception_v3"


def table(folder: Path, kind: Kind) -> str:
    """The document's table, Markdown: for each file ours and the best peer of each comparison, then the machine."""
    parts = []
    for path in sorted(folder.glob(pattern(kind))):
        machine, cases = read_lines(path)
        made = _growth(cases) if kind == "scaling" else _comparison(cases, kind)
        parts.append("\n".join(made) + f"\n\n{_caption(machine, path)}\n")
    if not parts:
        raise ConfigError(f"{folder}: no {pattern(kind)} to make a table of")
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------- ours and the best peer

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


def _comparison(cases: Sequence[Line], kind: Kind) -> list[str]:
    heads = _ROW_HEADS[kind]
    compared = any(line.get(TO_INCEPTION) is not None for line in cases)  # as in the paper's Table 3
    if compared:
        heads = (f"{heads[0]} to Inception V3 |", f"{heads[1]} --- |")
    return [*heads, *_rows(cases, kind, compared)]


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


# ------------------------------------------------------------------------------------------------- how cost grows

_AXES = {"batch": "images a call", "size": "pixels", "threads": "threads"}


def _growth(cases: Sequence[Line]) -> list[str]:
    """For each axis and mode a table: ours at each point, a column a variant, with the ratio to the best peer there."""
    ours = [line for line in cases if line["system"] == "xception" and "error" not in line and line.get("scaling")]
    parts: list[str] = []
    for axis, name in _AXES.items():
        for mode in dict.fromkeys(line["mode"] for line in ours if line["scaling"] == axis):
            lines = [line for line in ours if (line["scaling"], line["mode"]) == (axis, mode)]
            columns = list(dict.fromkeys(map(_variant, lines)))
            what = {"latency": "one image, ms", "training": "training, images/s"}.get(mode, "images/s")
            parts += ["", f"| {name} | " + " | ".join(f"{column}: {what}" for column in columns) + " |"]
            parts.append("| --- |" + " --- |" * len(columns))
            for point in dict.fromkeys(line[axis] for line in lines):
                found = {_variant(line): line for line in lines if line[axis] == point}
                cells = [_at_point(found[column]) if column in found else "" for column in columns]
                parts.append(f"| {point} | {' | '.join(cells)} |")
    return parts[1:]


def _variant(line: Line) -> str:
    return f"{line['precision']} {line['variant']}"


def _at_point(line: Line) -> str:
    speed = line["latency_ms"] if line["mode"] == "latency" else line["images_per_second"]
    ratio = line["ratio_to_best_peer"]
    return f"{speed:.1f}" + ("" if ratio is None else f" ({ratio:.2f})")


# ------------------------------------------------------------------------------------------------------------- both


def _caption(machine: Line, path: Path) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items() if found)
    features = ", ".join(machine["features"]) or "no vector instructions"
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    where = f"`{FOLDER.as_posix()}/{path.name}`"
    return f"{machine['cpu']} ({features}), {threads}; {versions}; {machine['date']}, {where}."
