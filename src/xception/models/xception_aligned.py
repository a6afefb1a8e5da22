"""Aligned Xception-41, -65 and -71, DeepLabv3+'s encoders (Chen et al., ECCV 2018, arXiv 1802.02611, Fig. 4).

Against the original: every max-pool is a strided separable convolution, modules have three convolutions,
there is batch normalisation between depthwise and pointwise, and all padding is fixed and symmetric. As in
the published weights, ReLU comes before each separable convolution; only the last module has it after both
halves instead.
The "p" variants of timm are pre-activated: normalisation and ReLU come first, and nothing between the halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.models.entry import ModelEntry
from xception.models.fields import MAX_MODULES, check_common, check_fields, check_range, check_widths
from xception.models.fused import convolve
from xception.models.head import HeadConfig
from xception.models.layers import (
    ConvNorm,
    DepthwiseConv2d,
    SeparableConv2d,
    batch_norm,
    check_input,
    initialise,
)
from xception.models.recompute import Flow
from xception.models.resolution import OutputStride, Stage, plan_stages


@dataclass(frozen=True, kw_only=True)
class AlignedConfig(HeadConfig):
    """Xception-41 by default.

    entry_widths, entry_strides: the entry flow's residual modules; the last width is the middle flow's.
    exit_widths: the exit's residual module, then the first two and the last convolution behind it.
    preactivation: normalisation and ReLU before each separable convolution, and none inside it.
    output_stride: None is as built (32); else maps are reduced by no more, and convolutions dilate instead.
    """

    in_channels: int = 3
    input_size: int = 299
    entry_widths: tuple[int, ...] = (128, 256, 728)
    entry_strides: tuple[Literal[1, 2], ...] = (2, 2, 2)
    middle_modules: int = 8
    exit_widths: tuple[int, int, int] = (1024, 1536, 2048)
    preactivation: bool = False
    norm_eps: float = 1e-3
    output_stride: OutputStride | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_head()
        check_common(self.in_channels, self.input_size)
        check_range("input_size", self.input_size, self.minimum_size)
        check_range("the number of entry_widths", len(self.entry_widths), 1, MAX_MODULES)
        check_widths("entry_widths", self.entry_widths)
        check_widths("exit_widths", self.exit_widths)
        check_range("middle_modules", self.middle_modules, 0, MAX_MODULES)
        check_range("norm_eps", self.norm_eps, 1e-12, 1)
        if len(self.entry_strides) != len(self.entry_widths):
            raise ConfigError(
                f"entry_strides must be as many as entry_widths, {len(self.entry_widths)}; "
                f"got {len(self.entry_strides)}"
            )
        self.stages()  # refuses an output stride below the stem's

    @property
    def minimum_size(self) -> int:
        """The smallest side that the network takes, in pixels: one position of its last map."""
        return 32

    def stages(self) -> tuple[tuple[Stage, ...], int]:
        """How the entry's modules and the exit's sample; and the dilation of what comes last."""
        return plan_stages((*self.entry_strides, 2), reduction=2, output_stride=self.output_stride)


@dataclass(frozen=True, kw_only=True)
class AlignedUnitConfig:
    """What the separable convolutions are made of: `activation` before both halves, or after each of them."""

    preactivation: bool
    norm_eps: float
    activation: Literal["before", "inside"] = "before"


class AlignedUnit(nn.Module):
    """Separable convolution with normalisation after both halves: N C H W -> N C' H' W'.

    ReLU, depthwise, BN, pointwise, BN; with activation "inside": depthwise, BN, ReLU, pointwise, BN, ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: AlignedUnitConfig,
        *,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv2d(in_channels, stride=stride, padding=dilation, dilation=dilation)
        self.depthwise_norm = batch_norm(in_channels, eps=config.norm_eps)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = batch_norm(out_channels, eps=config.norm_eps)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "before":
            x = self.depthwise_norm(self.depthwise(torch.relu(x)))
            y: Tensor = self.norm(self.pointwise(x))
            return y
        x = torch.relu(self.depthwise_norm(self.depthwise(x)))
        return torch.relu(self.norm(self.pointwise(x)))


class PreactivatedUnit(nn.Module):
    """[BN, ReLU,] separable convolution: N C H W -> N C' H' W'. A module's first one leaves them to it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: AlignedUnitConfig,
        *,
        stride: int = 1,
        dilation: int = 1,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.norm = batch_norm(in_channels, eps=config.norm_eps) if norm else None
        self.conv = SeparableConv2d(
            in_channels,
            out_channels,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            input_relu=norm,
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x if self.norm is None else self.norm(x))
        return y


class AlignedBlock(nn.Module):
    """Three separable convolutions, the last one strided, plus the shortcut: N C H W -> N C' H' W'.

    The shortcut is the identity, a 1x1 convolution where size or channels change, or left out. Pre-activated,
    it reads the normalised and rectified input, and its convolution has no normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, int, int],
        config: AlignedUnitConfig,
        *,
        stride: int = 1,
        dilation: int = 1,
        project: bool = False,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.norm = batch_norm(in_channels, eps=config.norm_eps) if config.preactivation else None
        self.units = nn.Sequential()
        channels = in_channels
        for i, width in enumerate(widths):
            unit_stride = stride if i == len(widths) - 1 else 1
            if config.preactivation:
                unit: nn.Module = PreactivatedUnit(
                    channels, width, config, stride=unit_stride, dilation=dilation, norm=i > 0
                )
            else:
                unit = AlignedUnit(channels, width, config, stride=unit_stride, dilation=dilation)
            self.units.append(unit)
            channels = width
        self.shortcut: nn.Module | None = nn.Identity() if residual else None
        if residual and (project or channels != in_channels):
            self.shortcut = ConvNorm(
                in_channels,
                channels,
                1,
                stride=stride,
                norm=not config.preactivation,
                norm_eps=config.norm_eps,
                activation_name="none",
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = torch.relu(self.norm(x))
        y: Tensor = self.units(x)
        return y if self.shortcut is None else y + self.shortcut(x)


class Stem(nn.Module):
    """Two regular 3x3 convolutions: N C H W -> N 64 H/2 W/2, rounded up; the second is bare in "p" nets."""

    def __init__(self, in_channels: int, config: AlignedUnitConfig) -> None:
        super().__init__()
        bare = config.preactivation
        self.conv1 = ConvNorm(in_channels, 32, 3, stride=2, padding=1, norm_eps=config.norm_eps)
        self.conv2 = ConvNorm(
            32,
            64,
            3,
            padding=1,
            norm=not bare,
            norm_eps=config.norm_eps,
            activation_name="none" if bare else "relu",
        )

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv2, convolve(self.conv1, x))


class XceptionAligned(nn.Module):
    """Images N C H W, sides of at least 32, to logits N `num_classes`; features are reduced by 32 or less.

    `feature_info` lists the outputs that a decoder may use, one a reduction of the undilated network.
    Wrong input raises `ConfigError`.
    """

    def __init__(self, config: AlignedConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or AlignedConfig()
        self.num_features = config.exit_widths[-1]
        unit = AlignedUnitConfig(preactivation=config.preactivation, norm_eps=config.norm_eps)
        stages, last_dilation = config.stages()
        checkpointing = config.gradient_checkpointing

        entry: dict[str, nn.Module] = {"stem": Stem(config.in_channels, unit)}
        channels = 64
        taps = [("entry_flow.stem", channels, 2)]
        for i, (width, stage) in enumerate(zip(config.entry_widths, stages[:-1], strict=True)):
            entry[f"block{i + 1}"] = residual_block(channels, (width,) * 3, unit, stage)
            channels = width
            if config.entry_strides[i] == 1:
                taps.pop()
            taps.append((f"entry_flow.block{i + 1}", channels, stage.reduction))
        self.entry_flow = Flow(entry, checkpointing=checkpointing)

        middle: dict[str, nn.Module] = {}
        for i in range(config.middle_modules):
            middle[str(i)] = AlignedBlock(channels, (channels,) * 3, unit, dilation=stages[-1].dilation)
        self.middle_flow = Flow(middle, checkpointing=checkpointing)
        if config.middle_modules:
            taps[-1] = ("middle_flow", channels, taps[-1][2])

        first, second, third = config.exit_widths
        last_unit = AlignedUnitConfig(preactivation=config.preactivation, norm_eps=config.norm_eps, activation="inside")
        self.exit_flow = Flow(
            {
                "block": residual_block(channels, (channels, first, first), unit, stages[-1]),
                "separable": AlignedBlock(
                    first, (second, second, third), last_unit, dilation=last_dilation, residual=False
                ),
                "act": nn.ReLU() if config.preactivation else nn.Identity(),
            },
            checkpointing=checkpointing,
        )
        taps.append(("exit_flow", third, stages[-1].reduction))
        self.classifier = config.classifier(third)
        self.feature_info: list[dict[str, Any]] = [
            {"module": module, "channels": width, "reduction": reduction} for module, width, reduction in taps
        ]
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """N C H W -> N 2048 H' W', after the last ReLU."""
        config = self.config
        check_input(x, in_channels=config.in_channels, minimum_size=config.minimum_size)
        features: Tensor = self.exit_flow(self.middle_flow(self.entry_flow(x)))
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits N `num_classes`, or to their averages N 2048."""
        logits: Tensor = self.classifier(features, pre_logits=pre_logits)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def residual_block(
    in_channels: int, widths: tuple[int, int, int], config: AlignedUnitConfig, stage: Stage
) -> AlignedBlock:
    """A module of the entry or exit flow; it projects also where dilation replaced a stride."""
    return AlignedBlock(
        in_channels,
        widths,
        config,
        stride=stage.stride,
        dilation=stage.dilation,
        project=stage.stride > 1 or stage.dense,
    )


PAPER = "L.-C. Chen et al., Encoder-Decoder with Atrous Separable Convolution, ECCV 2018, arXiv 1802.02611"
ENTRY_71: dict[str, Any] = {
    "entry_widths": (128, 256, 256, 728, 728),
    "entry_strides": (2, 1, 2, 1, 2),
}


def _entry(name: str, config: AlignedConfig, description: str, top1: float | None) -> ModelEntry:
    return ModelEntry(
        name=name,
        config=config,
        build=XceptionAligned,
        description=description,
        source=f"{PAPER}; Fig. 4" + ("; pre-activation after timm" if config.preactivation else ""),
        published={} if top1 is None else {"top1": top1},
    )


ENTRIES: tuple[ModelEntry, ...] = (
    _entry("xception41", AlignedConfig(), "aligned Xception, 8 middle modules", 0.7855),
    _entry("xception65", AlignedConfig(middle_modules=16), "aligned Xception, 16 middle modules", 0.7956),
    _entry(
        "xception71",
        AlignedConfig(middle_modules=16, **ENTRY_71),
        "aligned Xception, 16 middle modules, two more in the entry",
        0.7992,
    ),
    _entry(
        "xception41p",
        AlignedConfig(preactivation=True, norm_eps=1e-5),
        "Xception-41, pre-activated",
        None,
    ),
    _entry(
        "xception65p",
        AlignedConfig(preactivation=True, middle_modules=16),
        "Xception-65, pre-activated",
        None,
    ),
)
