"""``xception predict``: labels and scores for images, one line each."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xception.cli.output import json_line, percent, printable
from xception.errors import ConfigError


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
        from xception.inference.predictor import FailedImage, Predictor, expand_inputs

        predictor = Predictor.load(self.model, device=self.device)
        failed = seen = 0
        table = csv.writer(sys.stdout, lineterminator="\n") if self.csv else None
        if table:
            table.writerow(["path", "rank", "label", "score", "error"])
        paths = expand_inputs(self.images, sys.stdin.buffer)
        for result in predictor.predict_paths(paths, top=self.top, batch_size=self.batch_size, logits=self.logits):
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
        if failed:
            sys.stderr.write(f"xception: {failed} of {seen} images failed\n")
        return 1 if failed else 0
