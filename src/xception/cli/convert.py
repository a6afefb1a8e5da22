"""``xception convert``: any public checkpoint into our bundle, and out again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xception.cli.output import json_line, printable, table
from xception.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Weights of Keras, timm, torchvision, Cadene or FaceForensics in and out; exact, and nothing in a file is run."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A bundle, run folder, .keras, .h5, .weights.h5, .pth, .p or .safetensors; its content decides, not its name."""
    target: Annotated[Positional[str], arg(metavar="TARGET")]
    """File to write: .safetensors (our bundle), .keras, .weights.h5, .h5, or .pth (timm's and torchvision's names)."""
    to: str | None = None
    """What to write, where the name does not say it: bundle, keras, keras-weights, keras-h5, timm/legacy_xception, ..."""
    trunk_only: FlagCreatePairsOff[bool] = False
    """Take the trunk of a network whose head cannot be represented; the head stays random, to be trained."""
    class_names: str | None = None
    """A text file with a class name a line, in the order of the logits."""
    verify: FlagCreatePairsOff[bool] = False
    """Run the source framework on the file (it must be installed, and you must trust the file) and compare logits."""
    json: FlagCreatePairsOff[bool] = False
    """Print a JSON line with format, model, tensors_used, tensors_unused, num_classes, input_size and more."""

    def run(self) -> int:
        from xception.weights.convert import convert

        result = convert(
            self.source,
            self.target,
            to=self.to,
            trunk_only=self.trunk_only,
            class_names=None if self.class_names is None else names_of(self.class_names),
        )
        told = result.to_dict()
        if self.verify:
            from xception.weights.verify import verify

            told["verified"] = verify(self.source, self.target)
        if self.json:
            json_line(told)
            return 0
        rows = [[name, _plain(value)] for name, value in told.items() if value not in (None, [], {})]
        print(table(["", ""], rows))
        return 0


def names_of(path: str) -> list[str]:
    """The lines of a text file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{printable(path)}: expected a UTF-8 text file with a class name a line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _plain(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return f"{len(value)}: {', '.join(map(str, value[:4]))}"
    return str(value)
