"""Inception v2, of which there are two, and BN-Inception, which some libraries call by the same name.

`inception_v2` is the network of "Rethinking the Inception Architecture for Computer Vision" (Szegedy et al.,
arXiv 1512.00567), section 6 and Table 1, before the additions that make it v3: label smoothing, RMSprop, batch
normalisation in the auxiliary tower. `bn_inception` is its forerunner (Ioffe and Szegedy, arXiv 1502.03167).

Where the paper leaves v2 open:
- Stem. Table 1 prints three 3x3 convolutions and section 6 says the same, while Table 3 has "Factorized 7x7"
  among the later changes: its first "Inception-v2" had a 7x7. The default is the network that Table 1 prints;
  ``stem="7x7"`` is where Table 3 starts, and gives the same 147x147x64.
- Padding. Table 1 marks one convolution as padded, but 35x35x192 to 35x35x288 takes a second: we pad it.
- Widths. They were in a file that was not printed. Our choice is v3's, wherever v3 has a module of the shape;
  the fifth 17x17 module repeats the width of the two before it.
- Reductions. The paper has "variations" of figure 10 that it does not draw: our choice is v3's.
- Figures. Section 6 says figures 5 and 6 where Table 1 says 6 and 7: we follow Table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from xception.models.entry import ModelEntry
from xception.models.fields import MAX_WIDTH, check_range
from xception.models.head import Classifier
from xception.models.inception_layers import (
    Branches,
    Conv,
    InceptionConfig,
    InceptionNetwork,
    Layer,
    Pool,
    Separable,
    Style,
    pool_to_grid,
)


@dataclass(frozen=True, kw_only=True)
class InceptionV2Config(InceptionConfig):
    """Inception v2 as in Table 1.

    stem: "3x3x3" as in Table 1, or "7x7" as in the first line of Table 3.
    auxiliary: the tower of figure 8 on the last 17x17 grid, which `forward_with_auxiliary` runs.
    auxiliary_norm: "none", or "convolution" for batch normalisation of the tower's convolution and not of its
        fully connected layer, which is how section 10 tells the tower of v2 from that of v3.
    """

    stem: Literal["3x3x3", "7x7"] = "3x3x3"
    auxiliary: bool = False
    auxiliary_norm: Literal["none", "convolution"] = "none"

    @property
    def minimum_size(self) -> int:
        return 75


def stages(config: InceptionV2Config) -> dict[str, Layer]:
    """Table 1, from the image to the features; the sizes are those of the output at 299x299."""
    factorised: dict[str, Layer] = {
        "conv_1a": Conv(32, 3, stride=2, padding="valid"),  # 149x149x32
        "conv_2a": Conv(32, 3, padding="valid"),  # 147x147x32
        "conv_2b": Conv(64, 3),  # 147x147x64
    }
    traditional: dict[str, Layer] = {"conv_1a": Conv(64, 7, stride=2, padding="valid")}  # 147x147x64
    return {
        **(factorised if config.stem == "3x3x3" else traditional),
        "pool_3a": Pool("max", stride=2, padding="valid"),  # 73x73x64
        "conv_3b": Conv(80, 3, padding="valid"),  # 71x71x80
        "conv_4a": Conv(192, 3, stride=2, padding="valid"),  # 35x35x192
        "conv_5a": Conv(288, 3),  # 35x35x288
        "mixed_5b": figure_5(),
        "mixed_5c": figure_5(),
        "mixed_5d": figure_5(),
        "mixed_6a": reduction_to_17(),  # 17x17x768
        "mixed_6b": figure_6(128),
        "mixed_6c": figure_6(160),
        "mixed_6d": figure_6(160),
        "mixed_6e": figure_6(160),
        "mixed_6f": figure_6(192),
        "mixed_7a": reduction_to_8(),  # 8x8x1280
        "mixed_7b": figure_7(),
        "mixed_7c": figure_7(),  # 8x8x2048
    }


def figure_5() -> Branches:
    """Each 5x5 as two 3x3 (figure 5), for the 35x35 grid: 288 channels."""
    return {
        "branch_1x1": (Conv(64),),
        "branch_3x3": (Conv(48), Conv(64, 3)),
        "branch_3x3_double": (Conv(64), Conv(96, 3), Conv(96, 3)),
        "branch_pool": (Pool("average"), Conv(64)),
    }


def figure_6(width: int) -> Branches:
    """Each 7x7 as 1x7 and 7x1 (figure 6), for the 17x17 grid: 768 channels, `width` inside the branches."""
    return {
        "branch_1x1": (Conv(192),),
        "branch_7x7": (Conv(width), Conv(width, (1, 7)), Conv(192, (7, 1))),
        "branch_7x7_double": (
            Conv(width),
            Conv(width, (1, 7)),
            Conv(width, (7, 1)),
            Conv(width, (1, 7)),
            Conv(192, (7, 1)),
        ),
        "branch_pool": (Pool("average"), Conv(192)),
    }


def figure_7() -> Branches:
    """Expanded outputs (figure 7), for the 8x8 grid: 2048 channels."""
    fork: Branches = {"branch_1x3": (Conv(384, (1, 3)),), "branch_3x1": (Conv(384, (3, 1)),)}
    return {
        "branch_1x1": (Conv(320),),
        "branch_3x3": (Conv(384), fork),
        "branch_3x3_double": (Conv(448), Conv(384, 3), fork),
        "branch_pool": (Pool("average"), Conv(192)),
    }


def reduction_to_17() -> Branches:
    """Convolutions and a pool at stride 2 in parallel (after figure 10): 480 channels and the pooled ones."""
    return {
        "branch_3x3": (Conv(384, 3, stride=2, padding="valid"),),
        "branch_3x3_double": (Conv(64), Conv(96, 3), Conv(96, 3, stride=2, padding="valid")),
        "branch_pool": (Pool("max", stride=2, padding="valid"),),
    }


def reduction_to_8() -> Branches:
    """The second reduction, with a factorised 7x7 in one branch: 512 channels and the pooled ones."""
    return {
        "branch_3x3": (Conv(192), Conv(320, 3, stride=2, padding="valid")),
        "branch_7x7": (
            Conv(192),
            Conv(192, (1, 7)),
            Conv(192, (7, 1)),
            Conv(192, 3, stride=2, padding="valid"),
        ),
        "branch_pool": (Pool("max", stride=2, padding="valid"),),
    }


class AuxiliaryTower(nn.Module):
    """The auxiliary classifier on the last 17x17 grid (figure 8): N C H W -> N `num_classes`.

    Average pool 5x5 at stride 3, 1x1 convolution of 128, fully connected layer of 768, linear; the widths are
    v3's. The fully connected layer is a 5x5 convolution: larger grids give several of it, which are averaged,
    and on smaller ones the pool's windows shrink until 5x5 are left.
    """

    def __init__(self, in_channels: int, num_classes: int, *, conv: Style, fully_connected: Style) -> None:
        super().__init__()
        self.conv = conv.conv(in_channels, Conv(128))
        self.fully_connected = fully_connected.conv(128, Conv(768, 5, padding="valid"))
        self.classifier = Classifier(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 5, stride=3) if min(x.shape[2:]) >= 17 else pool_to_grid(x, 5)
        logits: Tensor = self.classifier(self.fully_connected(self.conv(x)))
        return logits


class InceptionV2(InceptionNetwork):
    """Inception v2: N C H W -> N `num_classes`; `forward_with_auxiliary` adds the tower's logits."""

    config: InceptionV2Config

    def __init__(self, config: InceptionV2Config) -> None:
        style = Style()
        plain = Style(norm=False, bias=True)
        conv = style if config.auxiliary_norm == "convolution" else plain

        def tower(channels: int) -> nn.Module:
            return AuxiliaryTower(channels, config.num_classes, conv=conv, fully_connected=plain)

        towers = {"mixed_6f": tower} if config.auxiliary else {}
        super().__init__(config, stages(config), style=style, auxiliary=towers)


# BN-Inception's figure 5, filters of: 1x1, reduction before the 3x3, 3x3, reduction before the double 3x3,
# each of the double 3x3; then the pool and its projection. (3c) and (4e) have stride 2 and neither first nor last.
BN_WIDTHS: dict[str, tuple[int, int, int, int, int, Literal["max", "average"], int]] = {
    "inception_3a": (64, 64, 64, 64, 96, "average", 32),
    "inception_3b": (64, 64, 96, 64, 96, "average", 64),
    "inception_3c": (0, 128, 160, 64, 96, "max", 0),
    "inception_4a": (224, 64, 96, 96, 128, "average", 128),
    "inception_4b": (192, 96, 128, 96, 128, "average", 128),
    "inception_4c": (160, 128, 160, 128, 160, "average", 128),
    "inception_4d": (96, 128, 192, 160, 192, "average", 128),
    "inception_4e": (0, 128, 192, 192, 256, "max", 0),
    "inception_5a": (352, 192, 320, 160, 224, "average", 128),
    "inception_5b": (352, 192, 320, 192, 224, "max", 128),
}


@dataclass(frozen=True, kw_only=True)
class BNInceptionConfig(InceptionConfig):
    """BN-Inception as in figure 5 of arXiv 1502.03167; it has no auxiliary classifiers.

    stem: "separable" is a depthwise 7x7 of multiplier 8 and a 1x1, as the paper's text says and the asterisk
        in its table marks; "regular" is one 7x7 convolution, as in Caffe's port.
    projection_4cd: filters after the pools of (4c) and (4d). Figure 5 prints 128, with output sizes that ask
        for 96: Caffe's port has 128, TensorFlow's 96.
    count_padding: whether average pools count the zeros beyond the edge, as Caffe's port does.
    conv_bias: biases in the convolutions, as in Caffe's port; batch normalisation makes them redundant.
    norm_eps: epsilon of batch normalisation, 1e-3 in TensorFlow and 1e-5 in Caffe's port.
    """

    input_size: int = 224
    stem: Literal["separable", "regular"] = "separable"
    projection_4cd: int = 128
    count_padding: bool = False
    conv_bias: bool = False
    norm_eps: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("projection_4cd", self.projection_4cd, 1, MAX_WIDTH)
        check_range("norm_eps", self.norm_eps, 1e-12, 1.0)

    @property
    def minimum_size(self) -> int:
        return 7


def bn_stages(config: BNInceptionConfig) -> dict[str, Layer]:
    """Figure 5, from the image to the features."""
    stem = Separable(64, 7, stride=2, multiplier=8) if config.stem == "separable" else Conv(64, 7, stride=2)
    return {
        "conv_1": stem,
        "pool_1": Pool("max", stride=2, padding="ceil"),
        "conv_2_reduce": Conv(64),
        "conv_2": Conv(192, 3),
        "pool_2": Pool("max", stride=2, padding="ceil"),
        **{name: bn_module(name, config) for name in BN_WIDTHS},
    }


def bn_module(name: str, config: BNInceptionConfig) -> Branches:
    """GoogLeNet's module with its 5x5 as two 3x3, or the reduction that passes its pool through."""
    one, three_reduce, three, double_reduce, double, pool, projection = BN_WIDTHS[name]
    if name in ("inception_4c", "inception_4d"):
        projection = config.projection_4cd
    if not one:
        return {
            "branch_3x3": (Conv(three_reduce), Conv(three, 3, stride=2)),
            "branch_3x3_double": (Conv(double_reduce), Conv(double, 3), Conv(double, 3, stride=2)),
            "branch_pool": (Pool(pool, stride=2),),
        }
    return {
        "branch_1x1": (Conv(one),),
        "branch_3x3": (Conv(three_reduce), Conv(three, 3)),
        "branch_3x3_double": (Conv(double_reduce), Conv(double, 3), Conv(double, 3)),
        "branch_pool": (Pool(pool), Conv(projection)),
    }


class BNInception(InceptionNetwork):
    """BN-Inception: N C H W -> N `num_classes`."""

    config: BNInceptionConfig

    def __init__(self, config: BNInceptionConfig) -> None:
        style = Style(norm_eps=config.norm_eps, bias=config.conv_bias, count_padding=config.count_padding)
        super().__init__(config, bn_stages(config), style=style, auxiliary={})


ENTRIES = (
    ModelEntry(
        name="inception_v2",
        config=InceptionV2Config(),
        build=InceptionV2,
        description="The first network of 'Rethinking the Inception Architecture', before v3's additions",
        source="Szegedy et al. 2015, arXiv 1512.00567, Table 1",
        # The line "Factorized 7x7" of Table 3, trained with label smoothing and RMSprop.
        published={"top1": 0.784, "top5": 0.942},
    ),
    ModelEntry(
        name="bn_inception",
        config=BNInceptionConfig(),
        build=BNInception,
        description="GoogLeNet with batch normalisation and each 5x5 as two 3x3; also known as Inception v2",
        source="Ioffe and Szegedy 2015, arXiv 1502.03167, figure 5",
        published={"top1": 0.748, "top5": 0.9218},
    ),
    ModelEntry(
        name="bn_inception_caffe",
        config=BNInceptionConfig(stem="regular", count_padding=True, conv_bias=True, norm_eps=1e-5),
        build=BNInception,
        description="BN-Inception as in Caffe and its PyTorch ports: 7x7 stem, convolution biases",
        source="Caffe's BN-Inception and its port to PyTorch by R. Cadene, after arXiv 1502.03167",
        published={"parameters": 11_295_240},
    ),
)
