"""What timm calls the modules of its aligned Xceptions, 41 / 65 / 71 and the pre-activated 41p / 65p."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from xception.errors import WeightsError

# By the number of blocks, and whether they are pre-activated. Each has the entry's, the middle's, and two of the exit.
ALIGNED = {
    (13, False): "xception41",
    (21, False): "xception65",
    (23, False): "xception71",
    (13, True): "xception41p",
    (21, True): "xception65p",
}


def aligned_names(config: Any) -> dict[str, str]:
    """Our module -> theirs, for every module with weights but the classifier; some of ours exist in one kind only."""
    before = config.preactivation
    names = {"entry_flow.stem.conv1.conv": "stem.0.conv", "entry_flow.stem.conv1.norm": "stem.0.bn"}
    if before:
        names["entry_flow.stem.conv2.conv"] = "stem.1"
    else:
        names |= {"entry_flow.stem.conv2.conv": "stem.1.conv", "entry_flow.stem.conv2.norm": "stem.1.bn"}
    entry = [f"entry_flow.block{i + 1}" for i in range(len(config.entry_widths))]
    middle = [f"middle_flow.{i}" for i in range(config.middle_modules)]
    for number, block in enumerate([*entry, *middle, "exit_flow.block", "exit_flow.separable"]):
        theirs = f"blocks.{number}"
        names[f"{block}.norm"] = f"{theirs}.norm"
        names[f"{block}.shortcut.conv"] = f"{theirs}.shortcut" if before else f"{theirs}.shortcut.conv"
        names[f"{block}.shortcut.norm"] = f"{theirs}.shortcut.bn"
        for unit in range(3):
            names |= _unit(f"{block}.units.{unit}", f"{theirs}.stack.conv{unit + 1}", before)
    return names


def _unit(ours: str, theirs: str, before: bool) -> dict[str, str]:
    if before:
        return {
            f"{ours}.norm": f"{theirs}.norm",
            f"{ours}.conv.depthwise": f"{theirs}.conv_dw",
            f"{ours}.conv.pointwise": f"{theirs}.conv_pw",
        }
    return {
        f"{ours}.depthwise": f"{theirs}.conv_dw",
        f"{ours}.depthwise_norm": f"{theirs}.bn_dw",
        f"{ours}.pointwise": f"{theirs}.conv_pw",
        f"{ours}.norm": f"{theirs}.bn_pw",
    }


def which_aligned(names: Iterable[str], prefix: str) -> str:
    """The registry's name of the network that has these tensors; `WeightsError` where it is none of the five."""
    pattern = re.compile(re.escape(prefix) + r"blocks\.([0-9]{1,3})\.")
    numbers = {int(match[1]) for match in map(pattern.match, names) if match}
    preactivated = f"{prefix}blocks.0.norm.weight" in names
    model = ALIGNED.get((max(numbers) + 1, preactivated))
    if model is None:
        raise WeightsError(f"an aligned Xception of {max(numbers) + 1} blocks; known are 13, 21 and 23")
    return model
