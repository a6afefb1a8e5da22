"""GoogLeNet, the first Inception network (Szegedy et al., "Going deeper with convolutions", arXiv 1409.4842).

Two networks go by the name. `inception_v1` is the published one: 5x5 convolutions in the third branch, local
response normalisation in the stem, biases, no batch normalisation. `googlenet` is the one known from
torchvision: batch normalisation after every convolution, and a 3x3 where the paper has the 5x5.

Initial weights: `layers.initialise`, but normal with deviation 0.01 in the layers that give logits. The features
of the published network are not normalised, and on wider weights its training diverges at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.models.entry import ModelEntry
from xception.models.head import Classifier
from xception.models.inception_layers import (
    Conv,
    InceptionConfig,
    InceptionNetwork,
    Layer,
    LocalResponse,
    Pool,
    Style,
    pool_to_grid,
)

# Table 1, filters of: 1x1, reduction before the 3x3, 3x3, reduction before the 5x5, 5x5, pool's projection.
WIDTHS = {
    "inception_3a": (64, 96, 128, 16, 32, 32),
    "inception_3b": (128, 128, 192, 32, 96, 64),
    "inception_4a": (192, 96, 208, 16, 48, 64),
    "inception_4b": (160, 112, 224, 24, 64, 64),
    "inception_4c": (128, 128, 256, 24, 64, 64),
    "inception_4d": (112, 144, 288, 32, 64, 64),
    "inception_4e": (256, 160, 320, 32, 128, 128),
    "inception_5a": (256, 160, 320, 32, 128, 128),
    "inception_5b": (384, 192, 384, 48, 128, 128),
}
AUXILIARY_STAGES = ("inception_4a", "inception_4d")  # section 5


@dataclass(frozen=True, kw_only=True)
class InceptionV1Config(InceptionConfig):
    """GoogLeNet as published; each option in turn leads to torchvision's.

    auxiliary: the two auxiliary classifiers, after (4a) and (4d), which `forward_with_auxiliary` runs.
    auxiliary_dropout: rate after their 1024 hidden units, while training.
    auxiliary_pool: "strided" is the paper's 5x5 at stride 3, which makes 4x4 of the 14x14 grid; "adaptive" is
        torchvision's, whose windows lie elsewhere. Either gives 4x4 at any image size.
    norm: "local_response" is the paper's, after the first pool and before the second, with biases in every
        convolution; "batch" stands after every convolution, without biases; "none" has the biases alone.
    large_kernel: the kernel of the third branch, 5 in the paper and 3 in torchvision.
    last_pool: the kernel of the pool before (5a), 3 in the paper and 2 in torchvision.
    """

    input_size: int = 224
    auxiliary: bool = True
    auxiliary_dropout: float = 0.7
    auxiliary_pool: Literal["strided", "adaptive"] = "strided"
    norm: Literal["local_response", "batch", "none"] = "local_response"
    large_kernel: Literal[5, 3] = 5
    last_pool: Literal[3, 2] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.auxiliary_dropout < 1:
            raise ConfigError(f"auxiliary_dropout must be at least 0 and less than 1; got {self.auxiliary_dropout}")

    @property
    def minimum_size(self) -> int:
        return 31 if self.last_pool == 3 else 15


def stages(config: InceptionV1Config) -> dict[str, Layer]:
    """Table 1, from the image to the features. Pools round up: 112, 56, 28, 14, 7 pixels for 224."""
    table: dict[str, Layer] = {
        "conv_1": Conv(64, 7, stride=2),
        "pool_1": Pool("max", stride=2, padding="ceil"),
        "norm_1": LocalResponse(),
        "conv_2_reduce": Conv(64),
        "conv_2": Conv(192, 3),
        "norm_2": LocalResponse(),
        "pool_2": Pool("max", stride=2, padding="ceil"),
        "inception_3a": module("inception_3a", config),
        "inception_3b": module("inception_3b", config),
        "pool_3": Pool("max", stride=2, padding="ceil"),
        "inception_4a": module("inception_4a", config),
        "inception_4b": module("inception_4b", config),
        "inception_4c": module("inception_4c", config),
        "inception_4d": module("inception_4d", config),
        "inception_4e": module("inception_4e", config),
        "pool_4": Pool("max", kernel=config.last_pool, stride=2, padding="ceil"),
        "inception_5a": module("inception_5a", config),
        "inception_5b": module("inception_5b", config),
    }
    if config.norm != "local_response":
        del table["norm_1"], table["norm_2"]
    return table


def module(name: str, config: InceptionV1Config) -> Layer:
    """The Inception module with dimension reductions (figure 2b), with the widths of `name`."""
    one, three_reduce, three, five_reduce, five, projection = WIDTHS[name]
    return {
        "branch_1x1": (Conv(one),),
        "branch_3x3": (Conv(three_reduce), Conv(three, 3)),
        "branch_5x5": (Conv(five_reduce), Conv(five, config.large_kernel)),
        "branch_pool": (Pool("max"), Conv(projection)),
    }


class AuxiliaryClassifier(nn.Module):
    """Average pool to 4x4, 1x1 convolution, two linear layers (section 5): N C H W -> N `num_classes`."""

    def __init__(self, in_channels: int, config: InceptionV1Config, style: Style) -> None:
        super().__init__()
        self.adaptive_pool = config.auxiliary_pool == "adaptive"
        self.conv = style.conv(in_channels, Conv(128))
        self.hidden = nn.Linear(128 * 4 * 4, 1024)
        self.dropout = nn.Dropout(config.auxiliary_dropout)
        self.linear = nn.Linear(1024, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 4) if self.adaptive_pool else pool_to_grid(x, 4)
        x = torch.relu(self.hidden(self.conv(x).flatten(1)))
        logits: Tensor = self.linear(self.dropout(x))
        return logits


class InceptionV1(InceptionNetwork):
    """GoogLeNet: N C H W -> N `num_classes`; `forward_with_auxiliary` adds the logits after (4a) and (4d)."""

    config: InceptionV1Config

    def __init__(self, config: InceptionV1Config) -> None:
        batch = config.norm == "batch"
        style = Style(norm=batch, bias=not batch)

        def side_head(channels: int) -> nn.Module:
            return AuxiliaryClassifier(channels, config, style)

        heads = dict.fromkeys(AUXILIARY_STAGES, side_head) if config.auxiliary else {}
        super().__init__(config, stages(config), style=style, auxiliary=heads)
        for part in self.modules():
            if isinstance(part, Classifier | AuxiliaryClassifier):
                nn.init.normal_(part.linear.weight, std=0.01)


ENTRIES = (
    ModelEntry(
        name="inception_v1",
        config=InceptionV1Config(),
        build=InceptionV1,
        description="GoogLeNet as published: local response normalisation, two auxiliary classifiers",
        source="Szegedy et al. 2014, arXiv 1409.4842, Table 1 and section 5",
        # The literature counts it without auxiliary classifiers. Top-5: one model, one crop (Table 3).
        published={"parameters_without_auxiliary": 6_998_552, "top5": 0.8993},
    ),
    ModelEntry(
        name="googlenet",
        config=InceptionV1Config(norm="batch", large_kernel=3, last_pool=2, auxiliary_pool="adaptive"),
        build=InceptionV1,
        description="GoogLeNet as in torchvision: batch normalisation, 3x3 in place of 5x5",
        source="torchvision.models.googlenet, after arXiv 1409.4842",
        published={
            "parameters": 13_004_888,
            "parameters_without_auxiliary": 6_624_904,
            "top1": 0.69778,
            "top5": 0.89530,
        },
    ),
)
