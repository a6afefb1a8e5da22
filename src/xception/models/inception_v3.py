"""Inception v3 (Szegedy et al., "Rethinking the Inception Architecture", arXiv 1512.00567).

The paper's v3 is its v2 with additions to the training. The network that carries the name is the authors'
later publication in TensorFlow, which departs from the paper's Table 1 in the last layers of the stem, in a
5x5 that is left whole at 35x35, and in four 17x17 modules for five. Every library follows it; so does this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from xception.errors import ConfigError
from xception.models.entry import ModelEntry
from xception.models.fields import MAX_WIDTH, check_range, check_widths
from xception.models.inception_layers import (
    Branches,
    Conv,
    InceptionConfig,
    InceptionNetwork,
    Layer,
    Pool,
    Style,
    scaled,
)
from xception.models.inception_v2 import AuxiliaryTower, figure_7, reduction_to_8, reduction_to_17
from xception.models.layers import Numerics


@dataclass(frozen=True, kw_only=True)
class InceptionV3Config(InceptionConfig):
    """Inception v3 as in Keras today; the options lead to the other published networks.

    auxiliary: the tower on the last 17x17 grid, batch-normalised, which `forward_with_auxiliary` runs.
    numerics: "tf" is average pools that do not count the padding, "torch" (torchvision) that do.
    norm_scale: batch normalisation with a trained scale (gamma), as in torchvision; Keras has none.
    conv_bias, activation_first: biases in the convolutions, ReLU before batch normalisation (Keras in 2016).
    pool_projections: filters after the pools of the three 35x35 modules.
    last_7x7_reduce: filters of the first convolution of the double-7x7 branch of the last 17x17 module.
    width: every layer's filters as a share of the published, rounded, at least one.
    stem: "valid" is the published; "small" is padded and halves the map once, for small images.
    """

    auxiliary: bool = False
    numerics: Numerics = "tf"
    norm_scale: bool = False
    conv_bias: bool = False
    activation_first: bool = False
    pool_projections: tuple[int, int, int] = (32, 64, 64)
    last_7x7_reduce: int = 192
    width: float = 1.0
    stem: Literal["valid", "small"] = "valid"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_widths("pool_projections", self.pool_projections)
        check_range("last_7x7_reduce", self.last_7x7_reduce, 1, MAX_WIDTH)
        if not 0 < self.width <= 8:
            raise ConfigError(f"width must be above 0, at most 8; got {self.width}")

    @property
    def minimum_size(self) -> int:
        return 75 if self.stem == "valid" else 13


def stages(config: InceptionV3Config) -> dict[str, Layer]:
    """From the image to the features; the sizes are those of the output at 299x299."""
    first, second, third = config.pool_projections
    table: dict[str, Layer] = {
        "conv_1a": Conv(32, 3, stride=2, padding="valid"),  # 149x149x32
        "conv_2a": Conv(32, 3, padding="valid"),  # 147x147x32
        "conv_2b": Conv(64, 3),  # 147x147x64
        "pool_3a": Pool("max", stride=2, padding="valid"),  # 73x73x64
        "conv_3b": Conv(80),  # 73x73x80
        "conv_4a": Conv(192, 3, padding="valid"),  # 71x71x192
        "pool_5a": Pool("max", stride=2, padding="valid"),  # 35x35x192
        "mixed_5b": module_35(first),  # 35x35x256
        "mixed_5c": module_35(second),  # 35x35x288
        "mixed_5d": module_35(third),  # 35x35x288
        "mixed_6a": reduction_to_17(),  # 17x17x768
        "mixed_6b": module_17(128),
        "mixed_6c": module_17(160),
        "mixed_6d": module_17(160),
        "mixed_6e": module_17(192, double_reduce=config.last_7x7_reduce),
        "mixed_7a": reduction_to_8(),  # 8x8x1280
        "mixed_7b": figure_7(),  # 8x8x2048
        "mixed_7c": figure_7(),  # 8x8x2048
    }
    if config.stem == "small":
        padded: dict[str, Layer] = {
            "conv_1a": Conv(32, 3, stride=2),  # 16x16 of 32x32, and so on until 6a, which leaves 7x7
            "conv_2a": Conv(32, 3),
            "conv_4a": Conv(192, 3),
        }
        table = {**{name: layer for name, layer in table.items() if not name.startswith("pool_")}, **padded}
    return {name: scaled(layer, config.width) for name, layer in table.items()}


def module_35(projection: int) -> Branches:
    """Figure 5 with the 5x5 of one branch left whole, for the 35x35 grid: 224 + `projection` channels."""
    return {
        "branch_1x1": (Conv(64),),
        "branch_5x5": (Conv(48), Conv(64, 5)),
        "branch_3x3_double": (Conv(64), Conv(96, 3), Conv(96, 3)),
        "branch_pool": (Pool("average"), Conv(projection)),
    }


def module_17(width: int, *, double_reduce: int | None = None) -> Branches:
    """Figure 6 with n = 7, for the 17x17 grid: 768 channels, `width` inside the branches.

    The double branch begins with 7x1 where the figure has 1x7; `double_reduce` is the width of its 1x1.
    """
    return {
        "branch_1x1": (Conv(192),),
        "branch_7x7": (Conv(width), Conv(width, (1, 7)), Conv(192, (7, 1))),
        "branch_7x7_double": (
            Conv(double_reduce or width),
            Conv(width, (7, 1)),
            Conv(width, (1, 7)),
            Conv(width, (7, 1)),
            Conv(192, (1, 7)),
        ),
        "branch_pool": (Pool("average"), Conv(192)),
    }


class InceptionV3(InceptionNetwork):
    """Inception v3: N C H W -> N `num_classes`; `forward_with_auxiliary` adds the tower's logits."""

    config: InceptionV3Config

    def __init__(self, config: InceptionV3Config) -> None:
        style = Style(
            norm_scale=config.norm_scale,
            bias=config.conv_bias,
            activation_first=config.activation_first,
            count_padding=config.numerics == "torch",
        )

        def tower(channels: int) -> nn.Module:
            return AuxiliaryTower(channels, config.num_classes, conv=style, fully_connected=style)

        towers = {"mixed_6e": tower} if config.auxiliary else {}
        super().__init__(config, stages(config), style=style, auxiliary=towers)


ENTRIES = (
    ModelEntry(
        name="inception_v3",
        config=InceptionV3Config(),
        build=InceptionV3,
        description="Inception v3 as in Keras today: batch normalisation without scale, no auxiliary tower",
        source="Szegedy et al. 2015, arXiv 1512.00567, in the form of keras.applications.InceptionV3",
        published={"parameters": 23_817_352, "top1": 0.779, "top5": 0.937},
    ),
    ModelEntry(
        name="inception_v3_2016",
        config=InceptionV3Config(
            norm_scale=True,
            conv_bias=True,
            activation_first=True,
            pool_projections=(32, 32, 32),
            last_7x7_reduce=160,
        ),
        build=InceptionV3,
        description="Inception v3 as the Xception paper counts it: Keras's of 2016",
        source="Chollet 2017, arXiv 1610.02357, Tables 1 and 3",
        published={"parameters": 23_626_728, "top1": 0.782, "top5": 0.941},
    ),
    ModelEntry(
        name="inception_v3_torchvision",
        config=InceptionV3Config(numerics="torch", norm_scale=True, auxiliary=True),
        build=InceptionV3,
        description="Inception v3 as in torchvision: batch normalisation with scale, auxiliary tower",
        source="torchvision.models.inception_v3, after arXiv 1512.00567",
        published={
            "parameters": 27_161_264,
            "parameters_without_auxiliary": 23_834_568,
            "top1": 0.77294,
            "top5": 0.93450,
        },
    ),
    ModelEntry(
        name="inception_v3_small",
        config=InceptionV3Config(num_classes=10, input_size=32, width=0.125, stem="small"),
        build=InceptionV3,
        description="Inception v3's design, narrow and with a small stem, for images of 28 to 64 pixels",
        source="after arXiv 1512.00567; the width and the stem are our own",
    ),
)
