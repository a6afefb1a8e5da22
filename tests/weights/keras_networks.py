"""Networks of ours for tests with Keras's files; nothing here needs Keras."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xception.data.preprocess import Preprocess
from xception.models import registry
from xception.weights.bundle import BundleInfo

NARROW: dict[str, Any] = {
    "num_classes": 5,
    "stem_widths": (4, 6),
    "entry_widths": (8, 10, 12),
    "middle_modules": 2,
    "exit_widths": (14, 16, 18),
    "input_size": 64,
}


def our_network(name: str = "xception", **options: Any) -> nn.Module:
    """A network of ours, random throughout, in eval mode."""
    torch.manual_seed(0)
    model = registry.create_model(name, **options)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var") or ("norm.weight" in key and tensor.dim() == 1):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.2)
    return model.eval()


def info_of(model: Any, name: str = "xception", **fields: Any) -> BundleInfo:
    config = model.config
    channels = config.in_channels
    defaults: dict[str, Any] = {
        "class_names": tuple(f"class {k}" for k in range(config.num_classes)),
        "multi_label": False,
        "preprocess": Preprocess(
            size=(config.input_size,) * 2,
            resize="squash",
            channels=channels,
            mean=(0.5,) * channels,
            std=(0.5,) * channels,
        ),
    }
    return BundleInfo(model=name, config=registry.config_to_dict(config), **{**defaults, **fields})
