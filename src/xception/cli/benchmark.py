"""``xception benchmark``: ours and each installed engine on the same work, side by side in one run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xception.cli.output import json_line, printable, table

if TYPE_CHECKING:
    from xception.benchmark.inference import Settings

_COLUMNS = (
    "system", "network", "threads", "precision", "mode", "images/s", "ms", "ratio", "error", "MB", "of peak",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measure inference: ours and each installed engine, interleaved in one run; outputs must agree before timing."""

    what: Annotated[Positional[Literal["inference"]], arg(metavar="inference")]
    """What to measure."""
    model: tuple[str, ...] = ("xception",)
    """Networks: xception, xception_tf (TensorFlow's padding, as Keras has), xception41, xception65, xception71,
    inception_v3 (in the other engines: the comparison of the paper's Table 3)."""
    size: int = 299
    """Height and width of the images in pixels."""
    batch: int = 8
    """Images a call in throughput mode; latency is of one image."""
    rounds: int = 7
    """Times that every system is measured, in turns; results are medians over rounds."""
    threads: int | None = None
    """Threads of every system; by default as many as there are processors."""
    precision: tuple[Literal["fp32", "bf16", "fp16", "int8"], ...] = ("fp32", "bf16", "fp16", "int8")
    """Precisions to measure."""
    mode: Literal["throughput", "latency", "both"] = "both"
    """Many images a second, or one image soon."""
    systems: tuple[Literal["xception", "timm", "keras", "onnxruntime", "openvino", "torchao"], ...] = (
        "xception", "timm", "keras", "onnxruntime", "openvino", "torchao",
    )  # fmt: skip
    """Systems to measure; one that is not installed is named and left out."""
    scaling: FlagCreatePairsOff[bool] = False
    """Also measure how cost grows with the batch, the size and the threads: ours and the best peer of each kind."""
    json: FlagCreatePairsOff[bool] = False
    """Print a JSON line a system, precision and mode, or {..., "error"} for one that does not run or agree."""
    out: str | None = None
    """Write all lines to this file, the machine first, such as benchmarks/results/inference.jsonl."""

    def run(self) -> int:
        from xception.benchmark.inference import Run, Settings
        from xception.benchmark.machine import describe, usable_cores

        settings = Settings(
            models=self.model,
            size=self.size,
            batch=self.batch,
            rounds=self.rounds,
            threads=usable_cores() if self.threads is None else self.threads,
            precisions=self.precision,
            modes=("throughput", "latency") if self.mode == "both" else (self.mode,),
            systems=self.systems,
        )
        if self.out is not None:
            from xception.weights.files import check_writable

            check_writable(self.out)
        machine = {"system": "machine", **describe(settings.threads)}
        run = Run(settings=settings, tell=self._tell, say=_say)
        lines = run()
        if self.scaling:
            lines += self._grow(run, settings, lines)
        if self.out is not None:
            from xception.benchmark.results import write_lines

            write_lines(self.out, [machine, *lines])
        if not self.json:
            rows = [_row(line) for line in lines if "error" not in line]
            print(table(_COLUMNS, rows) if rows else "nothing was measured")
            print(f"\n{printable(machine['cpu'])}, {settings.threads} threads; commit {machine['commit']}")
        if run.failed:
            sys.stderr.write(f"xception: {run.failed} measurements failed\n")
        return 1 if run.failed or not lines else 0

    def _grow(self, run: Any, settings: Settings, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        from xception.benchmark.scaling import points

        found = []
        for axis, changed, chosen in points(settings, lines):
            _say(f"scaling: {axis} {changed[axis]}")
            run.settings, run.only, run.scaling = replace(settings, **changed), chosen, axis
            found += run()
        return found

    def _tell(self, line: dict[str, Any]) -> None:
        if self.json:
            json_line(line)


def _say(message: str) -> None:
    sys.stderr.write(f"xception: {printable(message)}\n")
    sys.stderr.flush()


def _row(line: dict[str, Any]) -> list[str]:
    def number(key: str, form: str) -> str:
        return "" if line[key] is None else format(line[key], form)

    fraction = line["fraction_of_peak"]
    return [
        f"{line['system']} {line['variant']}",
        f"{line['model']} {line['batch']}x{line['size']}",
        str(line["threads"]),
        line["precision"],
        line["mode"],
        number("images_per_second", ".1f"),
        number("latency_ms", ".1f"),
        number("ratio_to_best_peer", ".2f"),
        number("logit_error", ".1e"),
        number("peak_memory_mb", ".0f"),
        "" if fraction is None else f"{100 * fraction:.0f} %",
    ]
