"""What torchvision and timm call the modules of Inception v3, and torchvision those of GoogLeNet."""

from __future__ import annotations

from typing import Any

_STEM = {
    "conv_1a": "Conv2d_1a_3x3",
    "conv_2a": "Conv2d_2a_3x3",
    "conv_2b": "Conv2d_2b_3x3",
    "conv_3b": "Conv2d_3b_1x1",
    "conv_4a": "Conv2d_4a_3x3",
}
_GRID_35 = {
    "branch_1x1.0": "branch1x1",
    "branch_5x5.0": "branch5x5_1",
    "branch_5x5.1": "branch5x5_2",
    "branch_3x3_double.0": "branch3x3dbl_1",
    "branch_3x3_double.1": "branch3x3dbl_2",
    "branch_3x3_double.2": "branch3x3dbl_3",
    "branch_pool.1": "branch_pool",
}
_TO_17 = {
    "branch_3x3.0": "branch3x3",
    "branch_3x3_double.0": "branch3x3dbl_1",
    "branch_3x3_double.1": "branch3x3dbl_2",
    "branch_3x3_double.2": "branch3x3dbl_3",
}
_GRID_17 = {
    "branch_1x1.0": "branch1x1",
    "branch_7x7.0": "branch7x7_1",
    "branch_7x7.1": "branch7x7_2",
    "branch_7x7.2": "branch7x7_3",
    "branch_7x7_double.0": "branch7x7dbl_1",
    "branch_7x7_double.1": "branch7x7dbl_2",
    "branch_7x7_double.2": "branch7x7dbl_3",
    "branch_7x7_double.3": "branch7x7dbl_4",
    "branch_7x7_double.4": "branch7x7dbl_5",
    "branch_pool.1": "branch_pool",
}
_TO_8 = {
    "branch_3x3.0": "branch3x3_1",
    "branch_3x3.1": "branch3x3_2",
    "branch_7x7.0": "branch7x7x3_1",
    "branch_7x7.1": "branch7x7x3_2",
    "branch_7x7.2": "branch7x7x3_3",
    "branch_7x7.3": "branch7x7x3_4",
}
_GRID_8 = {
    "branch_1x1.0": "branch1x1",
    "branch_3x3.0": "branch3x3_1",
    "branch_3x3.1.branch_1x3.0": "branch3x3_2a",
    "branch_3x3.1.branch_3x1.0": "branch3x3_2b",
    "branch_3x3_double.0": "branch3x3dbl_1",
    "branch_3x3_double.1": "branch3x3dbl_2",
    "branch_3x3_double.2.branch_1x3.0": "branch3x3dbl_3a",
    "branch_3x3_double.2.branch_3x1.0": "branch3x3dbl_3b",
    "branch_pool.1": "branch_pool",
}
_STAGES = {
    **dict.fromkeys(("5b", "5c", "5d"), _GRID_35),
    "6a": _TO_17,
    **dict.fromkeys(("6b", "6c", "6d", "6e"), _GRID_17),
    "7a": _TO_8,
    **dict.fromkeys(("7b", "7c"), _GRID_8),
}
_GOOGLENET_BRANCHES = {
    "branch_1x1.0": "branch1",
    "branch_3x3.0": "branch2.0",
    "branch_3x3.1": "branch2.1",
    "branch_5x5.0": "branch3.0",
    "branch_5x5.1": "branch3.1",
    "branch_pool.1": "branch4.1",
}
_GOOGLENET_MODULES = ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
_GOOGLENET_AUXILIARY = {"inception_4a": "aux1", "inception_4d": "aux2"}


def inception_v3_names(config: Any) -> dict[str, str]:
    """Our module -> theirs, for every module with weights but the classifier."""
    names = _normalised({f"features.{ours}": theirs for ours, theirs in _STEM.items()})
    for stage, branches in _STAGES.items():
        names |= _normalised(
            {f"features.mixed_{stage}.{ours}": f"Mixed_{stage}.{theirs}" for ours, theirs in branches.items()}
        )
    if config.auxiliary:
        tower = "auxiliary.mixed_6e"
        names |= _normalised({f"{tower}.conv": "AuxLogits.conv0", f"{tower}.fully_connected": "AuxLogits.conv1"})
        names[f"{tower}.classifier.linear"] = "AuxLogits.fc"
    return names


def googlenet_names(config: Any) -> dict[str, str]:
    """Our module -> theirs, for every module with weights but the classifier."""
    names = _normalised({"features.conv_1": "conv1", "features.conv_2_reduce": "conv2", "features.conv_2": "conv3"})
    for module in _GOOGLENET_MODULES:
        names |= _normalised(
            {
                f"features.inception_{module}.{ours}": f"inception{module}.{theirs}"
                for ours, theirs in _GOOGLENET_BRANCHES.items()
            }
        )
    if config.auxiliary:
        for ours, theirs in _GOOGLENET_AUXILIARY.items():
            names |= _normalised({f"auxiliary.{ours}.conv": f"{theirs}.conv"})
            names |= {f"auxiliary.{ours}.hidden": f"{theirs}.fc1", f"auxiliary.{ours}.linear": f"{theirs}.fc2"}
    return names


def _normalised(names: dict[str, str]) -> dict[str, str]:
    """A convolution and its batch normalisation, for each pair of modules that hold the two."""
    return {
        f"{ours}.{part}": f"{theirs}.{their_part}"
        for ours, theirs in names.items()
        for part, their_part in (("conv", "conv"), ("norm", "bn"))
    }
