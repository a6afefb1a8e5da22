"""``xception convert``: any public checkpoint into our bundle, and out again."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xception.cli.output import json_line, printable
from xception.errors import ConfigError, XceptionError

if TYPE_CHECKING:
    from xception.weights.convert import Conversion

_MAX_NAMES_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Weights of Keras, timm, torchvision, Cadene or FaceForensics in and out; exact, and nothing in a file is run."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A bundle, run folder, .keras, .h5, .weights.h5, .pth, .p or .safetensors (its content decides, not its name), or
    a published name such as xception.keras_in1k or imagenet."""
    target: Annotated[Positional[str], arg(metavar="TARGET")]
    """File to write: .safetensors (our bundle), .keras, .weights.h5, .h5, or .pth (timm's and torchvision's names)."""
    to: str | None = None
    """What to write, where the name does not tell: bundle, keras, keras-weights, keras-h5, timm/legacy_xception, ..."""
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

        class_names = None if self.class_names is None else names_of(self.class_names)
        if self.verify:
            from xception.weights.verify import check_verifiable

            check_verifiable(self.source, self.target)  # before anything is written
        result = convert(self.source, self.target, to=self.to, trunk_only=self.trunk_only, class_names=class_names)
        told = result.to_dict()
        rows = _summary(result)
        passed = True
        if self.verify:
            from xception.weights.verify import is_close, verify

            try:
                verified = verify(self.source, self.target)
            except XceptionError as error:
                raise type(error)(f"{error}; {self.target} was written, and is not verified") from error
            passed = is_close(verified)
            told["verified"] = {**verified, "passed": passed}
            rows.append(_verified(verified, passed))
        if self.json:
            json_line(told)
        else:
            width = max(len(name) for name, _ in rows)
            print("\n".join(f"{name.ljust(width)}  {printable(text)}" for name, text in rows))
        if not passed:
            sys.stderr.write("xception: the target differs from its source by more than it may; it was kept\n")
        return 0 if passed else 1


def names_of(path: str) -> list[str]:
    """The lines of a text file, without empty ones."""
    from xception.weights.files import open_regular

    with open_regular(path) as stream:
        data = stream.read(_MAX_NAMES_BYTES + 1)
    if len(data) > _MAX_NAMES_BYTES:
        raise ConfigError(f"{printable(path)}: larger than a list of class names can be")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{printable(path)}: expected a UTF-8 text file with a class name a line") from None
    return [line.strip() for line in text.split("\n") if line.strip()]


def _summary(result: Conversion) -> list[tuple[str, str]]:
    """What was read and written, and what was checked, for people."""
    ignored = f"; {result.tensors_ignored:,} that take no part in it left out" if result.tensors_ignored else ""
    height, width = result.image_size
    classes = "no classifier" if result.fresh else f"{result.num_classes:,} class{'es' * (result.num_classes != 1)}"
    size = f"{result.parameters:,} parameters, {classes}, images of {height}x{width}"
    rows = [
        ("read", f"{result.source} ({result.format})"),
        ("network", f"{result.model}, {size}"),
        ("tensors", f"{result.tensors_used:,}, every one used once, none unused{ignored}"),
    ]
    if result.wrapper:
        average = ", an average of the weights" if result.average else ""
        rows.append(("found under", f"{result.wrapper}{average}"))
    checksum = "the bundle's own, verified" if result.checksum is None else f"{result.checksum} (SHA-256, as read)"
    rows.append(("checksum", checksum))
    if result.fresh:
        more = f" and {len(result.fresh) - 4} more" if len(result.fresh) > 4 else ""
        rows.append(("random", f"{', '.join(result.fresh[:4])}{more}: to be trained"))
    rows.append(("written", f"{result.target} ({result.to}), read back: equal bit for bit"))
    if result.not_kept:
        rows.append(("not kept", f"{', '.join(result.not_kept)}: a bundle holds them"))
    return rows


def _verified(verified: Mapping[str, Any], passed: bool) -> tuple[str, str]:
    shape = "x".join(map(str, verified["inputs"]))
    difference = f"differ by {verified['max_relative_difference']:.2g} of the largest"
    text = f"{verified['compared']} of {verified['framework']} on {shape} {difference}"
    return "verified" if passed else "NOT EQUAL", text
