"""The networks that can be measured, by name; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A network of the registry with `options`, and the timm network (`weights.torch_write`) that equals it.

    `keras`: whether it is measured for Keras's sake, which has no other padding; else for that of all others.
    """

    registry: str
    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    keras: bool = False


CATALOG: dict[str, Measured] = {
    "xception": Measured(registry="xception", family="timm/legacy_xception", options={"numerics": "torch"}),
    "xception_tf": Measured(registry="xception", family="", options={"numerics": "tf"}, keras=True),
    "xception41": Measured(registry="xception41", family="timm/xception41"),
    "xception65": Measured(registry="xception65", family="timm/xception65"),
    "xception71": Measured(registry="xception71", family="timm/xception71"),
    "inception_v3": Measured(
        registry="inception_v3_torchvision", family="timm/inception_v3", options={"auxiliary": False}
    ),
}
"""`xception_tf` is measured with `xception` where Keras is; `inception_v3` is the one of the paper's Table 3."""
