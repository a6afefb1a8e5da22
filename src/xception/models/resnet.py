"""ResNet (He et al., "Deep residual learning for image recognition", arXiv 1512.03385) with bottlenecks, at any width.

The published ResNet-152 is `resnet152`, torchvision's; this file has the same design with a width that is chosen and,
for small images, a stem that keeps more of the map. The stride is in the 3x3, as torchvision has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.models.entry import ModelEntry
from xception.models.fields import MAX_MODULES, MAX_WIDTH, check_common, check_fields, check_range, check_widths
from xception.models.head import HeadConfig
from xception.models.layers import ConvNorm, check_input, initialise

EXPANSION = 4
EPS = 1e-5  # of batch normalisation, as torchvision has it


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(HeadConfig):
    """ResNet-152 by default.

    stem_width: channels of the stem.
    widths: channels of each stage's 3x3 convolutions; its output has four times as many.
    blocks: bottlenecks in each stage.
    stem: "published" is a 7x7 with stride 2 and a max-pool; "small" a 3x3 with stride 2, for small images.
    """

    in_channels: int = 3
    input_size: int = 224
    stem_width: int = 64
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (3, 8, 36, 3)
    stem: Literal["published", "small"] = "published"

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_head()
        check_range("stem_width", self.stem_width, 1, MAX_WIDTH)
        check_widths("widths", self.widths)
        check_range("the number of widths", len(self.widths), 1, 8)
        if len(self.blocks) != len(self.widths):
            raise ConfigError(
                f"blocks must be one number for each of {len(self.widths)} widths; got {len(self.blocks)}"
            )
        for count in self.blocks:
            check_range("each of blocks", count, 1, MAX_MODULES)
        check_common(self.in_channels, self.input_size)
        check_range("input_size", self.input_size, self.minimum_size)

    @property
    def minimum_size(self) -> int:
        """A side, in pixels, below which the last stages see nothing but their padding."""
        return 8


class Bottleneck(nn.Module):
    """1x1 to `width`, 3x3, 1x1 to four times `width`, plus the shortcut, then ReLU: N C H W -> N C' H' W'."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * width
        self.reduce = ConvNorm(in_channels, width, 1, norm_eps=EPS)
        self.conv = ConvNorm(width, width, 3, stride=stride, padding=1, norm_eps=EPS)
        self.expand = ConvNorm(width, out_channels, 1, norm_eps=EPS, activation_name="none")
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = ConvNorm(in_channels, out_channels, 1, stride=stride, norm_eps=EPS, activation_name="none")

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.expand(self.conv(self.reduce(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """N C H W -> N `num_classes`: a stem, stages of bottlenecks, the average over the map, logistic regression."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        small = config.stem == "small"
        stem = nn.Sequential(
            ConvNorm(
                config.in_channels,
                config.stem_width,
                3 if small else 7,
                stride=2,
                padding=1 if small else 3,
                norm_eps=EPS,
            )
        )
        if not small:
            stem.append(nn.MaxPool2d(3, 2, padding=1))
        self.features = nn.Sequential()
        self.features.add_module("stem", stem)
        reduction, channels = (2 if small else 4), config.stem_width
        self.feature_info: list[dict[str, Any]] = []
        for number, (width, count) in enumerate(zip(config.widths, config.blocks, strict=True), start=1):
            stage = nn.Sequential()
            for block in range(count):
                stage.append(Bottleneck(channels, width, 2 if block == 0 and number > 1 else 1))
                channels = EXPANSION * width
            self.features.add_module(f"stage{number}", stage)
            info = {"module": f"features.stage{number}", "channels": channels, "reduction": reduction}
            self.feature_info.append(info)
            reduction *= 2
        self.num_features = channels
        self.classifier = config.classifier(channels)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """N C H W -> N `num_features` H' W', after the last ReLU."""
        check_input(x, in_channels=self.config.in_channels, minimum_size=self.config.minimum_size)
        features: Tensor = self.features(x)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits N `num_classes`, or to what the logistic regression reads: N C'."""
        logits: Tensor = self.classifier(features, pre_logits=pre_logits)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


ENTRIES: tuple[ModelEntry, ...] = (
    ModelEntry(
        name="resnet152_small",
        config=ResNetConfig(num_classes=10, input_size=32, stem_width=16, widths=(8, 16, 32, 64), stem="small"),
        build=ResNet,
        description="ResNet-152's design, narrow and with a small stem, for images of 32 pixels",
        source="after arXiv 1512.03385, Table 1; widths and stem are our own",
    ),
)
