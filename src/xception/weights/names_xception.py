"""What Cadene's port of Xception calls its modules; timm's `legacy_xception` and FaceForensics took them over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def xception_names(config: Any) -> dict[str, str]:
    """Our module -> theirs, for every module with weights but the classifier."""
    names = {
        "entry_flow.stem.conv1.conv": "conv1",
        "entry_flow.stem.conv1.norm": "bn1",
        "entry_flow.stem.conv2.conv": "conv2",
        "entry_flow.stem.conv2.norm": "bn2",
    }
    entry = [f"entry_flow.block{i + 1}" for i in range(len(config.entry_widths))]
    middle = [f"middle_flow.{i}" for i in range(config.middle_modules)]
    for number, block in enumerate([*entry, *middle, "exit_flow.block"], 1):
        is_middle = block in middle
        for unit in range(config.middle_units if is_middle else 2):
            # Their list is ReLU, convolution, normalisation, ...; the first block has no first ReLU.
            position = 3 * unit + (0 if number == 1 else 1)
            ours, theirs = f"{block}.units.{unit}", f"block{number}.rep"
            names |= _separable(f"{ours}.conv", f"{theirs}.{position}") | {f"{ours}.norm": f"{theirs}.{position + 1}"}
        if not is_middle:
            names[f"{block}.shortcut.conv"] = f"block{number}.skip"
            names[f"{block}.shortcut.norm"] = f"block{number}.skipbn"
    for i in range(len(config.exit_widths) - 1):
        ours = f"exit_flow.separable.{i}"
        names |= _separable(f"{ours}.conv", f"conv{i + 3}") | {f"{ours}.norm": f"bn{i + 3}"}
    return names


def _separable(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.depthwise": f"{theirs}.conv1", f"{ours}.pointwise": f"{theirs}.pointwise"}


def padded_stem(names: Sequence[str], prefix: str) -> bool:
    """Whether these are tensors of segmentation_models_pytorch, which pads the stem of the same network by 1."""
    return prefix.endswith("encoder.") and any(
        name.startswith(prefix.removesuffix("encoder.") + "decoder.") for name in names
    )
