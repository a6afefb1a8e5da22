"""What every model file hands to the registry: a name, a frozen config, and how to build it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One named network.

    `config` is a frozen dataclass with at least `num_classes`, `in_channels`, `dropout`, `input_size` and
    `minimum_size` (the last two in pixels, a side). `build(config)` gives the network with random weights.
    `published` holds figures from the literature, e.g. ``{"parameters": 22_855_952, "top1": 0.790}``.
    """

    name: str
    config: Any
    build: Callable[[Any], nn.Module]
    description: str
    source: str
    published: Mapping[str, float] = field(default_factory=dict)
