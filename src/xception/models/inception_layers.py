"""What the Inception networks share: a network is a table of layers, and this file builds the table.

A model file names its stages and writes down, as data, what stands in each: a convolution, a pool, or
branches side by side whose outputs are concatenated. `InceptionNetwork` turns the table into modules, hangs
the auxiliary classifiers on the stages they read, and adds the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xception.models.fields import check_common, check_fields, check_range
from xception.models.head import HeadConfig
from xception.models.layers import ConvNorm, SamePool2d, check_input, initialise


@dataclass(frozen=True)
class Conv:
    """`width` filters of `kernel` pixels, with the normalisation and the activation of the network's `Style`.

    'same' pads with kernel // 2 zeros on every side, 'valid' does not pad.
    """

    width: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    padding: Literal["same", "valid"] = "same"


@dataclass(frozen=True)
class Separable:
    """`multiplier` filters of `kernel` pixels for each channel, then `width` filters of 1x1."""

    width: int
    kernel: int
    stride: int = 1
    multiplier: int = 1


@dataclass(frozen=True)
class Pool:
    """A max or average pool. Its output has a side of, for an input of n pixels and a stride s:

    'same' ceil(n / s), 'valid' floor((n - kernel) / s) + 1, 'ceil' ceil((n - kernel) / s) + 1.
    """

    kind: Literal["max", "average"]
    kernel: int = 3
    stride: int = 1
    padding: Literal["same", "valid", "ceil"] = "same"


@dataclass(frozen=True)
class LocalResponse:
    """Local response normalisation across `size` channels; the constants are those of Caffe's GoogLeNet."""

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0


Branches: TypeAlias = "Mapping[str, Sequence[Layer]]"
Layer: TypeAlias = "Conv | Separable | Pool | LocalResponse | Branches"


@dataclass(frozen=True, kw_only=True)
class Style:
    """How every convolution and every average pool of a network is made."""

    norm: bool = True
    norm_eps: float = 1e-3
    norm_scale: bool = True
    bias: bool = False
    activation_first: bool = False
    count_padding: bool = False  # whether a padded average pool divides by the padding too

    def conv(self, in_channels: int, layer: Conv) -> ConvNorm:
        """The convolution that `layer` describes: N C H W -> N `layer.width` H' W'."""
        kernel = (layer.kernel, layer.kernel) if isinstance(layer.kernel, int) else layer.kernel
        return ConvNorm(
            in_channels,
            layer.width,
            kernel,
            stride=layer.stride,
            padding=(kernel[0] // 2, kernel[1] // 2) if layer.padding == "same" else 0,
            bias=self.bias,
            norm=self.norm,
            norm_eps=self.norm_eps,
            norm_scale=self.norm_scale,
            activation_first=self.activation_first,
        )


class Mixed(nn.ModuleDict):
    """Branches side by side over one input, concatenated in order: N C H W -> N (sum of C') H' W'."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.values()], dim=1)


def build(layer: Layer, in_channels: int, style: Style) -> tuple[nn.Module, int]:
    """The module that `layer` describes, and the number of channels it gives."""
    if isinstance(layer, Conv):
        return style.conv(in_channels, layer), layer.width
    if isinstance(layer, Separable):
        depthwise = nn.Conv2d(
            in_channels,
            in_channels * layer.multiplier,
            layer.kernel,
            stride=layer.stride,
            padding=layer.kernel // 2,
            groups=in_channels,
            bias=False,
        )
        pointwise = style.conv(in_channels * layer.multiplier, Conv(layer.width))
        return nn.Sequential(depthwise, pointwise), layer.width
    if isinstance(layer, Pool):
        return _pool(layer, style), in_channels
    if isinstance(layer, LocalResponse):
        return nn.LocalResponseNorm(layer.size, layer.alpha, layer.beta, layer.k), in_channels
    branches = {name: _chain(layers, in_channels, style) for name, layers in layer.items()}
    return Mixed({name: module for name, (module, _) in branches.items()}), sum(c for _, c in branches.values())


def _chain(layers: Sequence[Layer], in_channels: int, style: Style) -> tuple[nn.Sequential, int]:
    modules: list[nn.Module] = []
    for layer in layers:
        module, in_channels = build(layer, in_channels, style)
        modules.append(module)
    return nn.Sequential(*modules), in_channels


def _pool(layer: Pool, style: Style) -> nn.Module:
    ceil = layer.padding == "ceil"
    if layer.padding == "same" and layer.stride != 1:
        assert (layer.kind, layer.kernel, layer.stride) == ("max", 3, 2), layer
        return SamePool2d()
    padding = layer.kernel // 2 if layer.padding == "same" else 0
    if layer.kind == "max":
        return nn.MaxPool2d(layer.kernel, layer.stride, padding, ceil_mode=ceil)
    return nn.AvgPool2d(layer.kernel, layer.stride, padding, ceil_mode=ceil, count_include_pad=style.count_padding)


def scaled(layer: Layer, factor: float) -> Layer:
    """`layer` with every convolution's filters multiplied by `factor`, rounded, at least one."""
    if factor == 1 or isinstance(layer, (Pool, LocalResponse)):
        return layer
    if isinstance(layer, (Conv, Separable)):
        return replace(layer, width=max(1, round(factor * layer.width)))
    return {name: [scaled(inner, factor) for inner in layers] for name, layers in layer.items()}


def stride_of(layer: Layer) -> int:
    """By how much `layer` shrinks its input, which is the same in each of its branches."""
    if isinstance(layer, LocalResponse):
        return 1
    if isinstance(layer, (Conv, Separable, Pool)):
        return layer.stride
    strides = set()
    for layers in layer.values():
        stride = 1
        for inner in layers:
            stride *= stride_of(inner)
        strides.add(stride)
    assert len(strides) == 1, layer
    return strides.pop()


@dataclass(frozen=True, kw_only=True)
class InceptionConfig(HeadConfig):
    """The settings that every Inception network has.

    input_size: the side, in pixels, of the images that the network is meant for; it runs at any other.
    """

    in_channels: int = 3
    input_size: int = 299

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_head()
        check_common(self.in_channels, self.input_size)
        check_range("input_size", self.input_size, self.minimum_size)

    @property
    def minimum_size(self) -> int:
        """The smallest side, in pixels, that leaves a pixel at every stage."""
        raise NotImplementedError


class InceptionNetwork(nn.Module):
    """Stages one after the other, auxiliary classifiers beside them, and a classifier.

    `stages` is the table of the network. `auxiliary` names the stages that carry an auxiliary classifier and
    says how to build it for their number of channels; each maps N C H W features to N `num_classes` logits.
    `features` holds the stages under their names, `feature_info` names the last stage at each reduction.
    """

    def __init__(
        self,
        config: InceptionConfig,
        stages: Mapping[str, Layer],
        *,
        style: Style,
        auxiliary: Mapping[str, Callable[[int], nn.Module]],
    ) -> None:
        super().__init__()
        self.config = config
        self.features = nn.Sequential()
        self.auxiliary = nn.ModuleDict()
        last_at: dict[int, dict[str, Any]] = {}
        channels, reduction = config.in_channels, 1
        for name, layer in stages.items():
            module, channels = build(layer, channels, style)
            reduction *= stride_of(layer)
            self.features.add_module(name, module)
            last_at[reduction] = {"module": f"features.{name}", "channels": channels, "reduction": reduction}
            if name in auxiliary:
                self.auxiliary[name] = auxiliary[name](channels)
        self.feature_info = list(last_at.values())
        self.num_features = channels
        self.classifier = config.classifier(channels)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """N C H W images -> N `num_features` H' W' features; `ConfigError` for a shape that does not fit."""
        self._check(x)
        features: Tensor = self.features(x)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """N `num_features` H' W' features -> N `num_classes` logits, or pooled features with `pre_logits`."""
        output: Tensor = self.classifier(features, pre_logits=pre_logits)
        return output

    def forward(self, x: Tensor) -> Tensor:
        """N C H W images -> N `num_classes` logits; the auxiliary classifiers are not run."""
        return self.forward_head(self.forward_features(x))

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`forward`'s logits, and those of each auxiliary classifier in the order of their stages."""
        self._check(x)
        auxiliary = []
        for name, stage in self.features.named_children():
            x = stage(x)
            if name in self.auxiliary:
                auxiliary.append(self.auxiliary[name](x))
        return self.forward_head(x), auxiliary

    def _check(self, x: Tensor) -> None:
        check_input(x, in_channels=self.config.in_channels, minimum_size=self.config.minimum_size)


def pool_to_grid(x: Tensor, side: int) -> Tensor:
    """Average over `side` x `side` windows of one size at even distances: N C H W -> N C `side` `side`.

    The stride is n // side and the windows take the rest: 14 pixels give four windows of 5 at stride 3, which
    is GoogLeNet's auxiliary pool, and 17 give five of 5 at stride 3, which is Inception v3's. Fewer pixels
    than `side` are spread out, so that the auxiliary classifiers run at every size the network does.
    """
    height, width = x.shape[2:]
    if min(height, width) < side:
        return F.adaptive_avg_pool2d(x, side)
    stride = (height // side, width // side)
    kernel = (height - (side - 1) * stride[0], width - (side - 1) * stride[1])
    return F.avg_pool2d(x, kernel, stride)
