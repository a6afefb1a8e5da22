"""How cost grows: ours and the best peer of each precision, at other batches, sizes and numbers of threads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xception.benchmark.inference import Settings
from xception.benchmark.systems import OURS

BATCHES = (1, 2, 4, 8, 16)
SIZES = (150, 224, 299, 320)
ROUNDS = 3

Chosen = frozenset[tuple[str, str, str]]  # system, variant, precision


def points(settings: Settings, lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any], Chosen]]:
    """For each point: which axis it is on, the settings that it changes, and the variants to measure there.

    `lines` are those of the main measurement, which chooses the peers. The first network alone is measured.
    """
    chosen = best_of([line for line in lines if line["model"] == settings.models[0]])
    systems = tuple(name for name in settings.systems if name in {system for system, _, _ in chosen})
    if not systems:
        return
    common: dict[str, Any] = {
        "models": settings.models[:1], "systems": systems, "rounds": min(ROUNDS, settings.rounds)
    }  # fmt: skip
    batched = settings.known_modes[:1]
    for batch in BATCHES:
        yield "batch", {**common, "batch": batch, "modes": batched}, chosen
    for size in SIZES:
        yield "size", {**common, "size": size, "modes": batched}, chosen
    for threads in threads_up_to(settings.threads):
        yield "threads", {**common, "threads": threads}, chosen


def threads_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({2**k for k in range(most.bit_length()) if 2**k <= most} | {most})


def best_of(lines: Sequence[Mapping[str, Any]]) -> Chosen:
    """Our variants, and the peers that were the best of a comparison."""
    found = set()
    for line in lines:
        if line["system"] != OURS or "error" in line:
            continue
        found.add((OURS, line["variant"], line["precision"]))
        for key in ("best_peer", "best_half_precision_peer"):
            if line.get(key):
                name, _, precision = line[key].rpartition(", ")
                system, _, variant = name.partition(" ")
                found.add((system, variant, precision))
    return frozenset(found)
