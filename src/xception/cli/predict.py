"""``xception predict``: labels and scores for images, one line each."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xception.cli.output import human_seconds, json_line, percent, printable
from xception.errors import ConfigError

if TYPE_CHECKING:
    from xception.inference.timings import Timings


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Labels and scores for images, one line each; a bad image is a line with its error, and exit status 1."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A bundle (.safetensors), a run folder, any public checkpoint (.keras, .h5, .pth, ...), or imagenet."""
    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE|FOLDER|GLOB")]
    """Files, folders (searched through), 'globs', or - for paths on standard input, one a line."""
    top: int = 5
    """Labels an image."""
    json: FlagCreatePairsOff[bool] = False
    """Print a JSON line an image: {"path","predictions":[{"label","score"}...]} or {"path","error"}."""
    csv: FlagCreatePairsOff[bool] = False
    """Print CSV: path,rank,label,score,error."""
    logits: FlagCreatePairsOff[bool] = False
    """With --json: also "logits", the network's raw output, one a class."""
    batch_size: int = 32
    """Images that go through the network at once."""
    device: str | None = None
    """cpu, cuda, ...; by default cuda where there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the activations between the layers; sums are float32 always."""
    threads: int | None = None
    """Threads of the network; by default one a core."""
    backend: Literal["auto", "native", "openvino", "torch"] = "auto"
    """What runs the network: native is the compiled executor for CPUs; auto takes it where it covers the network, else
    OpenVINO where it is installed, else PyTorch."""
    fast_decode: FlagCreatePairsOff[bool] = False
    """Decode JPEGs much larger than the network's input at a half, a quarter or an eighth: scores change a little."""

    def run(self) -> int:
        if not self.images:
            raise ConfigError("expected at least one IMAGE, FOLDER or GLOB (or - for paths on standard input)")
        if self.json and self.csv:
            raise ConfigError("give --json or --csv, not both")
        if self.logits and not self.json:
            raise ConfigError("--logits adds to what --json prints: give both")
        for name, value in (("--top", self.top), ("--batch-size", self.batch_size)):
            if value < 1:
                raise ConfigError(f"{name} must be 1 or more; got {value}")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ConfigError(f"--threads must be from 1 to 1024; got {self.threads}")
        import torch

        from xception.inference.predictor import FailedImage, Predictor, Timings, expand_inputs

        if self.threads is not None:
            torch.set_num_threads(self.threads)  # for networks that run in PyTorch; the process is ours
        predictor = Predictor.load(
            self.model,
            device=self.device,
            precision=self.precision,
            num_threads=self.threads,
            backend=self.backend,
            fast_decode=self.fast_decode,
        )
        timings = Timings()
        failed = seen = 0
        table = csv.writer(sys.stdout, lineterminator="\n") if self.csv else None
        if table:
            table.writerow(["path", "rank", "label", "score", "error"])
        paths = expand_inputs(self.images, sys.stdin.buffer)
        for result in predictor.predict_paths(
            paths, top=self.top, batch_size=self.batch_size, logits=self.logits, timings=timings
        ):
            if seen == 0:
                sys.stderr.write(f"xception: the network runs on {printable(predictor.engine)}\n")
            seen += 1
            path = str(result.path)
            if isinstance(result, FailedImage):
                failed += 1
                if self.json:
                    json_line({"path": path, "error": result.error})
                elif table:
                    table.writerow([printable(path), "", "", "", result.error])
                else:
                    print(f"{printable(path)}: error: {printable(result.error)}")
            elif self.json:
                json_line(result.to_dict())
            elif table:
                for rank, p in enumerate(result.predictions, start=1):
                    table.writerow([printable(path), rank, printable(p.label), f"{p.score:.6g}", ""])
            else:
                scores_text = ", ".join(f"{printable(p.label)} {percent(p.score)}" for p in result.predictions)
                print(f"{printable(path)}: {scores_text}")
        if seen == 0:
            raise ConfigError("no image was named on standard input")
        if seen > 1:
            sys.stderr.write(f"xception: {_speeds(timings)}\n")
        if failed:
            sys.stderr.write(f"xception: {failed} of {seen} images failed\n")
        return 1 if failed else 0


def _speeds(timings: Timings) -> str:
    """Such as "1,234 images in 61 s: decoding 45.1 images/s a thread (2 threads), network 20.3 images/s; ..."."""
    rates = []
    if timings.decoding_rate is not None:
        threads = f"{timings.workers} thread{'' if timings.workers == 1 else 's'}"
        rates.append(f"decoding {timings.decoding_rate:,.1f} images/s a thread ({threads})")
    if timings.network_rate is not None:
        rates.append(f"network {timings.network_rate:,.1f} images/s")
    text = f"{timings.images:,} images in {_seconds(timings.seconds)}"
    text += f": {', '.join(rates)}" if rates else ""
    slower = {"decoding": "; decoding is the slower", "network": "; the network is the slower", None: ""}
    return text + slower[timings.slower]


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 10 else human_seconds(value)
