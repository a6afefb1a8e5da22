"""Xception (F. Chollet, CVPR 2017, arXiv 1610.02357v3), Fig. 5: 36 convolutional layers in 14 modules.

Entry flow (the stem and one residual module a width), middle flow (identity residual modules), exit flow (a
residual module, then separable convolutions), classifier. The paper is silent on batch normalisation's
settings, on padding and on initial weights: `numerics` names the two ways in use of the first two, and
`layers.initialise` states ours of the third.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from xception.errors import ConfigError
from xception.models.entry import ModelEntry
from xception.models.fields import (
    MAX_MODULES,
    check_common,
    check_fields,
    check_range,
    check_widths,
)
from xception.models.fused import convolve, train_units
from xception.models.head import HeadConfig
from xception.models.layers import (
    NORM_EPS,
    ConvNorm,
    Numerics,
    SamePool2d,
    SegmentedConv2d,
    SeparableConv2d,
    batch_norm,
    check_input,
    initialise,
)
from xception.models.recompute import Flow
from xception.models.resolution import OutputStride, Stage, plan_stages
from xception.ops import reference as ops
from xception.ops.reference import Activation, Order


@dataclass(frozen=True, kw_only=True)
class UnitConfig:
    """What the separable convolutions are made of; the paper's are the defaults.

    intermediate_activation: between depthwise and pointwise (Fig. 10: none is best).
    order: None is depthwise first, or 1x1 first where `segments` is set; "pointwise_depthwise" is the
        "extreme" Inception module (Fig. 4).
    segments: None is one a channel; k is a 1x1, then 3x3 over k channel segments, as equal as can be
        (Fig. 3); 1 is a 1x1, then a regular convolution.
    numerics: "tf" pads as TensorFlow's SAME does and has epsilon 1e-3; "torch" pads evenly and has 1e-5.
    """

    intermediate_activation: Activation = "none"
    order: Order | None = None
    segments: int | None = None
    numerics: Numerics = "tf"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.segments is not None:
            check_range("segments", self.segments, 1)
            if self.order == "depthwise_pointwise":
                raise ConfigError("segments come after the 1x1: order must be 'pointwise_depthwise' or None")


@dataclass(frozen=True, kw_only=True)
class XceptionConfig(UnitConfig, HeadConfig):
    """The paper's network by default; every option is off.

    stem: "valid" is the paper's, unpadded with stride 2; "small" is padded with stride 1, for small images.
    stem_stride: None is the stem's own stride (2 for "valid", 1 for "small").
    stem_widths, entry_widths: channels of the two first convolutions, and of the residual modules that
        follow, as many as there are widths, each halving the map. The last width is the middle flow's.
    middle_modules, middle_units: modules of the middle flow, and separable convolutions in each.
    tied_middle: one module, weights and batch statistics shared, applied `middle_modules` times.
    exit_widths: output of the exit's residual module, then of the separable convolutions behind it.
    residual: whether modules have their shortcuts (Fig. 9).
    output_stride: None is as built; else maps are reduced by no more, and convolutions dilate instead.
    gradient_checkpointing: compute activations twice instead of keeping them for the backward pass.
    """

    in_channels: int = 3
    input_size: int = 299
    stem: Literal["valid", "small"] = "valid"
    stem_stride: Literal[1, 2] | None = None
    stem_widths: tuple[int, int] = (32, 64)
    entry_widths: tuple[int, ...] = (128, 256, 728)
    middle_modules: int = 8
    middle_units: int = 3
    tied_middle: bool = False
    exit_widths: tuple[int, ...] = (1024, 1536, 2048)
    residual: bool = True
    output_stride: OutputStride | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_head()
        check_common(self.in_channels, self.input_size)
        check_range("input_size", self.input_size, self.minimum_size)
        check_range("middle_modules", self.middle_modules, 0, MAX_MODULES)
        check_range("middle_units", self.middle_units, 1, MAX_MODULES)
        for name in ("stem_widths", "entry_widths", "exit_widths"):
            check_widths(name, getattr(self, name))
        for name in ("entry_widths", "exit_widths"):
            check_range(f"the number of {name}", len(getattr(self, name)), 1, MAX_MODULES)
        if self.segments is not None:
            check_range("segments", self.segments, 1, min(*self.entry_widths, *self.exit_widths))
        self.stages()  # refuses an output stride below the stem's

    @property
    def minimum_size(self) -> int:
        """The smallest side that the network takes, in pixels; the unpadded stem needs more."""
        return 32 if self.stem == "valid" else 8

    @property
    def reduction(self) -> int:
        """The stem's own stride."""
        return self.stem_stride or (2 if self.stem == "valid" else 1)

    def stages(self) -> tuple[tuple[Stage, ...], int]:
        """How the entry's modules and the exit's sample; and the dilation of what comes last."""
        strides = [2] * (len(self.entry_widths) + 1)
        return plan_stages(strides, reduction=self.reduction, output_stride=self.output_stride)


class SeparableUnit(nn.Module):
    """[ReLU,] separable convolution, batch normalisation[, ReLU]: N C H W -> N C' H W."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: UnitConfig,
        *,
        dilation: int = 1,
        input_relu: bool = False,
        output_relu: bool = False,
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = {
            "dilation": dilation,
            "intermediate_activation": config.intermediate_activation,
            "input_relu": input_relu,
        }
        self.conv: SeparableConv2d | SegmentedConv2d
        if config.segments is None:
            order = config.order or "depthwise_pointwise"
            self.conv = SeparableConv2d(in_channels, out_channels, order=order, **shared)
        else:
            self.conv = SegmentedConv2d(in_channels, out_channels, segments=config.segments, **shared)
        self.norm = batch_norm(out_channels, eps=NORM_EPS[config.numerics])
        self.output_relu = output_relu

    def forward(self, x: Tensor) -> Tensor:
        y = train_units([self], x, unit_type=SeparableUnit, output_relu=self.output_relu)
        if y is not None:
            return y
        return ops.activate(self.norm(self.conv(x)), "relu" if self.output_relu else "none")


class XceptionBlock(nn.Module):
    """One residual module: [ReLU,] separable, ReLU, separable, ...[, max-pool], plus the shortcut.

    N C H W -> N C' H' W', the map halved where `stage` is given and not dense. The shortcut reads the input
    before the leading ReLU: the identity, or a 1x1 convolution where the module pools. The output is linear.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...],
        config: UnitConfig,
        *,
        stage: Stage | None = None,
        dilation: int = 1,
        leading_relu: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        if stage is not None:
            dilation = stage.dilation
        self.units = nn.Sequential()
        channels = in_channels
        for i, width in enumerate(widths):
            relu = leading_relu or i > 0
            self.units.append(SeparableUnit(channels, width, config, dilation=dilation, input_relu=relu))
            channels = width
        self.pool: nn.Module = nn.Identity()
        self.shortcut: nn.Module | None = nn.Identity() if residual else None
        if stage is not None:
            self.pool = SamePool2d(numerics=config.numerics, dense=stage.dense, dilation=dilation)
            if residual:
                self.shortcut = ConvNorm(
                    in_channels,
                    channels,
                    1,
                    stride=stage.stride,
                    norm_eps=NORM_EPS[config.numerics],
                    activation_name="none",
                )

    def forward(self, x: Tensor) -> Tensor:
        y = train_units(self.units, x, unit_type=SeparableUnit, pool=self.pool, shortcut=self.shortcut)
        if y is not None:
            return y
        one_by_one: Tensor = self.pool(self.units(x))
        return one_by_one if self.shortcut is None else one_by_one + self.shortcut(x)


class Stem(nn.Module):
    """Two regular 3x3 convolutions, each with batch normalisation and ReLU: N C H W -> N C' H' W'."""

    def __init__(self, config: XceptionConfig) -> None:
        super().__init__()
        first, second = config.stem_widths
        eps, padding = NORM_EPS[config.numerics], 0 if config.stem == "valid" else 1
        # TensorFlow's SAME is lopsided where the stride is 2: then the padding is not the convolution's.
        self.pad_same = config.stem == "small" and config.numerics == "tf" and config.reduction == 2
        self.conv1 = ConvNorm(
            config.in_channels,
            first,
            3,
            stride=config.reduction,
            padding=0 if self.pad_same else padding,
            norm_eps=eps,
        )
        self.conv2 = ConvNorm(first, second, 3, padding=padding, norm_eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.pad_same:
            x = ops.pad_same(x, 3, 2)
        return convolve(self.conv2, convolve(self.conv1, x))


def entry_flow(config: XceptionConfig) -> Flow:
    """The stem, then a residual module for each width, halving the map; the first has no leading ReLU."""
    modules: dict[str, nn.Module] = {"stem": Stem(config)}
    channels = config.stem_widths[-1]
    stages, _ = config.stages()
    for i, (width, stage) in enumerate(zip(config.entry_widths, stages[:-1], strict=True)):
        modules[f"block{i + 1}"] = XceptionBlock(
            channels, (width, width), config, stage=stage, leading_relu=i > 0, residual=config.residual
        )
        channels = width
    return Flow(modules, checkpointing=config.gradient_checkpointing)


def middle_flow(config: XceptionConfig) -> Flow:
    """`middle_modules` residual modules of one width and size; or one of them, applied as many times."""
    width = config.entry_widths[-1]
    stages, _ = config.stages()
    count = min(config.middle_modules, 1) if config.tied_middle else config.middle_modules
    modules: dict[str, nn.Module] = {}
    for i in range(count):
        modules[str(i)] = XceptionBlock(
            width,
            (width,) * config.middle_units,
            config,
            dilation=stages[-1].dilation,
            residual=config.residual,
        )
    passes = config.middle_modules if config.tied_middle else 1
    return Flow(modules, checkpointing=config.gradient_checkpointing, passes=passes)


def exit_flow(config: XceptionConfig) -> Flow:
    """A residual module, which widens in its second convolution; then separable convolutions with ReLU."""
    width = config.entry_widths[-1]
    channels, *widths = config.exit_widths
    stages, dilation = config.stages()
    block = XceptionBlock(width, (width, channels), config, stage=stages[-1], residual=config.residual)
    separable = nn.Sequential()
    for width in widths:
        separable.append(SeparableUnit(channels, width, config, dilation=dilation, output_relu=True))
        channels = width
    if not widths:
        separable.append(nn.ReLU())
    modules: dict[str, nn.Module] = {"block": block, "separable": separable}
    return Flow(modules, checkpointing=config.gradient_checkpointing)


class Xception(nn.Module):
    """Images N C H W, sides of at least `config.minimum_size`, to logits N `num_classes`.

    `feature_info` lists the stages whose outputs a decoder may use: module name, channels, reduction.
    Wrong input raises `ConfigError`.
    """

    def __init__(self, config: XceptionConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or XceptionConfig()
        self.num_features = config.exit_widths[-1]
        self.entry_flow = entry_flow(config)
        self.middle_flow = middle_flow(config)
        self.exit_flow = exit_flow(config)
        self.classifier = config.classifier(self.num_features)
        self.feature_info = feature_info(config)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """N C H W -> N `num_features` H' W', after the last ReLU."""
        config = self.config
        check_input(x, in_channels=config.in_channels, minimum_size=config.minimum_size)
        features: Tensor = self.exit_flow(self.middle_flow(self.entry_flow(x)))
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits N `num_classes`, or to what the logistic regression reads: N C'."""
        logits: Tensor = self.classifier(features, pre_logits=pre_logits)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def feature_info(config: XceptionConfig) -> list[dict[str, Any]]:
    """Module, channels and reduction of the stem, each entry module but the last, and the two later flows."""
    stages, _ = config.stages()
    blocks = [f"block{i + 1}" for i in range(len(config.entry_widths))]
    modules = ["entry_flow.stem", *(f"entry_flow.{block}" for block in blocks), "exit_flow"]
    if config.middle_modules:
        modules[-2] = "middle_flow"
    channels = [config.stem_widths[-1], *config.entry_widths, config.exit_widths[-1]]
    reductions = [config.reduction, *(stage.reduction for stage in stages)]
    return [
        {"module": module, "channels": width, "reduction": reduction}
        for module, width, reduction in zip(modules, channels, reductions, strict=True)
    ]


PAPER = "F. Chollet, Xception: Deep Learning with Depthwise Separable Convolutions, CVPR 2017, arXiv 1610.02357v3"

SMALL = XceptionConfig(
    num_classes=10,
    input_size=28,
    stem="small",
    stem_widths=(16, 32),
    entry_widths=(48, 192),
    middle_modules=2,
    exit_widths=(384, 512),
)

ENTRIES: tuple[ModelEntry, ...] = (
    ModelEntry(
        name="xception",
        config=XceptionConfig(),
        build=Xception,
        description="Xception as published",
        source=f"{PAPER}; Fig. 5, Tables 1 and 3",
        published={"parameters": 22_855_952, "top1": 0.790, "top5": 0.945},
    ),
    ModelEntry(
        name="xception_fc",
        config=XceptionConfig(fully_connected=(4096, 4096)),
        build=Xception,
        description="Xception with two fully connected layers of 4096, as in the JFT rows",
        source=f"{PAPER}; Table 2",
    ),
    ModelEntry(
        name="xception_small",
        config=SMALL,
        build=Xception,
        description="a small Xception for images of 28 to 64 pixels",
        source="our own",
    ),
)
