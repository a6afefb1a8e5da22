"""``xception models``: what there is, what it costs, and what this machine can do."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xception import __version__
from xception.cli.output import json_line, table
from xception.errors import ConfigError, MissingPackageError


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the networks with parameters, multiply-adds and published figures; with NAME, one stage by stage."""

    name: Annotated[Positional[str | None], arg(metavar="NAME")] = None
    """One network (or a pattern such as 'inception*'); by default all of them."""
    json: FlagCreatePairsOff[bool] = False
    """Print a JSON line for each network."""

    def run(self) -> int:
        from xception.models import registry

        if self.name is not None and not set(self.name) & set("*?["):
            return self._one(self.name)
        names = registry.list_models(self.name or "*")
        if not names:
            raise ConfigError(f"no model matches {self.name!r}: choose from {', '.join(registry.list_models())}")
        descriptions, left_out = [], []
        for name in names:
            try:
                descriptions.append(registry.describe(name))
            except MissingPackageError as error:  # noqa: PERF203 - of each network for itself
                left_out.append(f"{name} ({error})")
        if left_out:  # a network to compare with, whose library is an extra: the others are listed all the same
            sys.stderr.write(f"xception: left out: {', '.join(left_out)}\n")
        if self.json:
            for description in descriptions:
                json_line({k: v for k, v in description.to_dict().items() if k != "stages"})
            return 0
        rows = [
            [
                d.name,
                f"{d.parameters:,}",
                f"{d.multiply_adds / 1e9:.2f} G",
                str(d.input_size),
                str(d.minimum_size),
                f"{100 * d.published['top1']:.1f} %" if "top1" in d.published else "",
                d.description,
            ]
            for d in descriptions
        ]
        print(
            table(
                ["model", "parameters", "mult-adds", "pixels", "at least", "ImageNet top-1", "what it is"],
                rows,
            )
        )
        print(f"\n{machine_line()}")
        return 0

    def _one(self, name: str) -> int:
        from xception.models import registry

        description = registry.describe(name)
        if self.json:
            json_line(description.to_dict())
            return 0
        d = description
        print(f"{d.name}: {d.description} ({d.source})")
        print(
            f"{d.parameters:,} parameters, {d.multiply_adds / 1e9:.3f} G multiply-adds "
            f"at {d.input_size}x{d.input_size} pixels"
        )
        if d.published:
            print("published: " + ", ".join(f"{k} {v:,}" for k, v in d.published.items()))
        rows = [
            [
                s.name,
                "x".join(map(str, (s.output_shape or ())[1:])) or "-",
                f"{s.parameters:,}",
                f"{s.multiply_adds / 1e6:,.1f} M",
            ]
            for s in d.stages
        ]
        print(table(["stage", "output C x H x W", "parameters", "mult-adds"], rows))
        print(f"\n{machine_line()}")
        return 0


def machine_line() -> str:
    """What the processor and the compiled extension can do."""
    from xception.ops.backend import describe

    return describe()


def version_line() -> str:
    """``xception 0.1.0, torch 2.14.1, Python 3.11, native: ...``, without importing torch."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"xception {__version__}, torch {installed('torch')}, Python {python}; {machine_line()}"
