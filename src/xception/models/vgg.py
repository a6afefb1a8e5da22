"""VGG (Simonyan and Zisserman, "Very deep convolutional networks", arXiv 1409.1556) at any width.

The published VGG-16 is `vgg16`, torchvision's; this file has its design for small images: five stages of 3x3
convolutions with a max-pool behind each, then two hidden layers. At 32 pixels nothing but one position is left after
the last pool, so that flattening the map, as published, and averaging it are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from xception.errors import ConfigError
from xception.models.entry import ModelEntry
from xception.models.fields import MAX_MODULES, check_common, check_fields, check_range, check_widths
from xception.models.head import HeadConfig
from xception.models.layers import ConvNorm, check_input, initialise


@dataclass(frozen=True, kw_only=True)
class VGGConfig(HeadConfig):
    """VGG-16's convolutions by default (configuration D in Table 1 of arXiv 1409.1556).

    widths, convolutions: channels of each stage's 3x3 convolutions, and how many there are.
    norm: batch normalisation after each; as published there is none, and biases instead.
    """

    in_channels: int = 3
    input_size: int = 224
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    convolutions: tuple[int, ...] = (2, 2, 3, 3, 3)
    norm: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_head()
        check_widths("widths", self.widths)
        check_range("the number of widths", len(self.widths), 1, 10)
        if len(self.convolutions) != len(self.widths):
            raise ConfigError(
                f"convolutions must be one number for each of {len(self.widths)} widths; got {len(self.convolutions)}"
            )
        for count in self.convolutions:
            check_range("each of convolutions", count, 1, MAX_MODULES)
        check_common(self.in_channels, self.input_size)
        check_range("input_size", self.input_size, self.minimum_size)

    @property
    def minimum_size(self) -> int:
        """The smallest side, in pixels, that leaves a pixel after the last pool."""
        return int(2 ** len(self.widths))


class VGG(nn.Module):
    """N C H W -> N `num_classes`: stages of 3x3 convolutions, each with ReLU, halved by a 2x2 max-pool."""

    def __init__(self, config: VGGConfig) -> None:
        super().__init__()
        self.config = config
        self.features = nn.Sequential()
        self.feature_info: list[dict[str, Any]] = []
        channels = config.in_channels
        for number, (width, count) in enumerate(zip(config.widths, config.convolutions, strict=True), start=1):
            stage = nn.Sequential()
            for _ in range(count):
                stage.append(ConvNorm(channels, width, 3, padding=1, bias=not config.norm, norm=config.norm))
                channels = width
            stage.append(nn.MaxPool2d(2))
            self.features.add_module(f"stage{number}", stage)
            info = {"module": f"features.stage{number}", "channels": width, "reduction": 2**number}
            self.feature_info.append(info)
        self.num_features = channels
        self.classifier = config.classifier(channels)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """N C H W -> N `num_features` H' W', after the last pool."""
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
        name="vgg16_small",
        config=VGGConfig(
            num_classes=10,
            input_size=32,
            widths=(16, 32, 64, 128, 128),
            norm=True,
            fully_connected=(256, 256),
        ),
        build=VGG,
        description="VGG-16's design, narrow and with batch normalisation, for images of 32 pixels",
        source="after arXiv 1409.1556, configuration D; widths are our own",
    ),
)
