"""The networks that the compiled executor covers, one a line; of random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import xception

NARROW: dict[str, Any] = {
    "entry_widths": (24, 40, 56), "middle_modules": 2, "exit_widths": (70, 80, 90), "num_classes": 7,
}  # fmt: skip
COVERED: dict[str, tuple[str, dict[str, Any], int]] = {
    "the paper's, narrow": ("xception", NARROW, 75),
    "torch numerics": ("xception", {**NARROW, "numerics": "torch"}, 64),
    "ELU between": ("xception", {**NARROW, "intermediate_activation": "elu"}, 65),
    "ReLU between": ("xception", {**NARROW, "intermediate_activation": "relu"}, 65),
    "no residual": ("xception", {**NARROW, "residual": False}, 64),
    "output stride 8": ("xception", {**NARROW, "output_stride": 8}, 65),
    "output stride 16, torch": ("xception", {**NARROW, "output_stride": 16, "numerics": "torch"}, 70),
    "tied": ("xception", {**NARROW, "tied_middle": True, "middle_modules": 3}, 64),
    "hidden layers": ("xception", {**NARROW, "fully_connected": (50, 30), "pooling": "max"}, 64),
    "hidden layers of another kind": (
        "xception",
        {**NARROW, "fully_connected": (50,), "hidden_activations": ("gelu",)},
        64,
    ),
    "small": ("xception_small", {}, 28),
    "small, padded evenly": ("xception_small", {"numerics": "torch", "stem_stride": 1}, 20),
    "one channel": ("xception", {**NARROW, "in_channels": 1}, 64),
    "aligned": ("xception41", {"middle_modules": 1, "num_classes": 5}, 65),
    "aligned, output stride 8": ("xception71", {"middle_modules": 1, "num_classes": 5, "output_stride": 8}, 65),
    "pre-activated": ("xception41p", {**NARROW, "middle_modules": 2}, 65),
    "pre-activated, output stride 16": (
        "xception65p",
        {"middle_modules": 2, "num_classes": 5, "output_stride": 16},
        65,
    ),
    "pointwise first": ("xception", {**NARROW, "order": "pointwise_depthwise", "intermediate_activation": "elu"}, 65),
    "segments": ("xception", {**NARROW, "segments": 7, "intermediate_activation": "relu"}, 65),
    "segments, output stride 8": ("xception", {**NARROW, "segments": 3, "output_stride": 8}, 65),
    "a channel a segment": (
        "xception",
        {**NARROW, "entry_widths": (24,) * 2, "exit_widths": (24,) * 2, "segments": 24},
        65,
    ),
    "an exit of one module": ("xception", {**NARROW, "exit_widths": (33,)}, 65),
    "many channels": ("xception", {**NARROW, "in_channels": 250}, 64),
    "tied, and none": ("xception", {**NARROW, "tied_middle": True, "middle_modules": 0}, 64),
}


def model_of(name: str, options: dict[str, Any], seed: int = 0) -> nn.Module:
    """Random weights, and statistics that are not those of the start."""
    torch.manual_seed(seed)
    model = xception.create_model(name, **options).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "norm.bias")):
            tensor.normal_(0, 0.1)
        elif key.endswith("norm.weight"):
            tensor.uniform_(0.7, 1.3)
    return model


def images(model: nn.Module, count: int, height: int, width: int) -> Tensor:
    return torch.randn(count, model.config.in_channels, height, width)  # type: ignore[union-attr, arg-type]
