"""A network small enough to be built and written hundreds of times."""

from __future__ import annotations

from typing import Any

from torch import nn

from xception.data.preprocess import Preprocess
from xception.models.registry import config_to_dict, create_model, get_config
from xception.weights.bundle import BundleInfo

TINY: dict[str, Any] = {
    "num_classes": 3,
    "input_size": 16,
    "stem": "small",
    "stem_widths": (4, 4),
    "entry_widths": (8,),
    "middle_modules": 1,
    "exit_widths": (8, 8),
}


def tiny_model(**options: Any) -> nn.Module:
    """A small network with random weights and running statistics, in eval mode."""
    model = create_model("xception", **{**TINY, **options})
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_()
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
        else:
            tensor.fill_(7)
    return model.eval()


def tiny_info(**options: Any) -> BundleInfo:
    config = get_config("xception", **{**TINY, **options})
    return BundleInfo(
        model="xception",
        config=config_to_dict(config),
        class_names=tuple(f"class {k}" for k in range(config.num_classes)),
        multi_label=False,
        preprocess=Preprocess(
            size=(16, 16),
            channels=config.in_channels,
            mean=(0.5,) * config.in_channels,
            std=(0.5,) * config.in_channels,
        ),
        provenance={"data": "none", "seed": 7},
    )
