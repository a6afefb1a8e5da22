"""The networks that laptop and smoke scales train: the paper's designs, narrow, for images of 28 to 32 pixels.

The deep one keeps what Fig. 5 has in number: 14 modules, eight of them in the middle flow with three separable
convolutions each; only the stem's second halving is left out, since there is little to halve. Widths are our own.
"""

from __future__ import annotations

from typing import Any

from xception.experiments.experiment import ScaleName, Task

_SMALL: dict[str, Any] = {"stem": "small", "stem_stride": 2}
DEEP: dict[str, Any] = {
    **_SMALL,
    "stem_widths": (16, 32),
    "entry_widths": (48, 96),
    "middle_modules": 8,
    "exit_widths": (128, 192, 256),
}
SHALLOW: dict[str, Any] = {**DEEP, "middle_modules": 4}
TINY: dict[str, Any] = {
    **_SMALL,
    "stem_widths": (8, 16),
    "entry_widths": (16, 24),
    "middle_modules": 2,
    "middle_units": 2,
    "exit_widths": (32, 48),
}


def xception_options(scale: ScaleName, task: Task, *, deep: bool = True) -> dict[str, Any]:
    """The config's fields of the Xception of that scale; at paper scale it is the published one."""
    common = {"num_classes": task.num_classes, "in_channels": task.channels}
    if scale == "paper":
        return common
    network = TINY if scale == "smoke" else DEEP if deep else SHALLOW
    return {**common, **network, "input_size": 16 if scale == "smoke" else 28}
