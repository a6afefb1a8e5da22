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
    """Measure speed: ours and each installed engine, interleaved in one run; outputs must agree before timing."""

    what: Annotated[Positional[Literal["inference", "training"]], arg(metavar="inference|training")]
    """Inference, or training: steps of SGD with momentum, from bytes to changed weights."""
    model: tuple[str, ...] = ("xception",)
    """Networks: xception, xception_tf (TensorFlow's padding, as Keras has), xception41, xception65, xception71,
    inception_v3 (in the other engines: the comparison of the paper's Table 3)."""
    size: int = 299
    """Height and width of the images in pixels."""
    batch: int | None = None
    """Images a call in throughput mode (by default 8; latency is of one image) or a step of training (16)."""
    rounds: int = 7
    """Times that every system is measured, in turns; results are medians over rounds."""
    threads: int | None = None
    """Threads of every system; by default as many as there are processors."""
    precision: tuple[Literal["fp32", "bf16", "fp16", "int8"], ...] | None = None
    """Precisions to measure, by default all: in training fp32 and bf16."""
    mode: Literal["throughput", "latency", "both"] = "both"
    """Inference: many images a second, or one image soon."""
    systems: (
        tuple[Literal["xception", "timm", "torchvision", "keras", "onnxruntime", "openvino", "torchao"], ...] | None
    ) = None
    """Systems to measure, by default all that are measured: in training xception, timm, torchvision and keras. One
    that is not installed is named and left out."""
    scaling: FlagCreatePairsOff[bool] = False
    """Also measure how cost grows with the batch, the size and the threads: ours and the best peer of each kind."""
    json: FlagCreatePairsOff[bool] = False
    """Print a JSON line a system, precision and mode, or {..., "error"} for one that does not run or agree."""
    out: str | None = None
    """Write all lines to this file, the machine first, such as benchmarks/results/inference.jsonl."""

    def run(self) -> int:
        from xception.benchmark import inference, training
        from xception.benchmark.machine import describe

        kind = inference if self.what == "inference" else training
        settings = self._settings(kind.Settings)
        if self.out is not None:
            from xception.weights.files import check_writable

            check_writable(self.out)
        machine = {"system": "machine", **describe(settings.threads)}
        run = kind.Run(settings=settings, tell=self._tell, say=_say)
        lines = run()
        if self.scaling:
            lines += self._grow(run, settings, lines)
        if self.out is not None:
            from xception.benchmark.result_files import write_lines

            write_lines(self.out, [machine, *lines])
        if not self.json:
            rows = [_row(line) for line in lines if "error" not in line]
            print(table(_COLUMNS, rows) if rows else "nothing was measured")
            print(f"\n{printable(machine['cpu'])}, {settings.threads} threads; commit {machine['commit']}")
        if run.failed:
            sys.stderr.write(f"xception: {run.failed} measurements failed\n")
        return 1 if run.failed or not lines else 0

    def _settings(self, kind: type[Settings]) -> Settings:
        """What was asked for; where nothing was, the defaults of this kind."""
        from xception.benchmark.machine import usable_cores
        from xception.errors import ConfigError

        if self.what == "training" and self.mode != "both":
            raise ConfigError(f"--mode is one of inference; got {self.mode} for training")
        asked: dict[str, Any] = {"batch": self.batch, "precisions": self.precision, "systems": self.systems}
        if self.mode != "both":
            asked["modes"] = (self.mode,)
        return kind(
            models=self.model,
            size=self.size,
            rounds=self.rounds,
            threads=usable_cores() if self.threads is None else self.threads,
            **{name: value for name, value in asked.items() if value is not None},
        )

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
