"""The pieces that the networks share: convolutions of the spectrum, pooling, normalisation.

Initial weights, of which the paper says nothing, are drawn by `initialise`.
"""

from __future__ import annotations

from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.models.head import Classifier
from xception.ops import reference as ops
from xception.ops.reference import Activation, Order, Padding, PoolSampling

Numerics = Literal["tf", "torch"]

# Batch normalisation's epsilon in the two worlds: Keras and DeepLab, PyTorch ports.
NORM_EPS: dict[Numerics, float] = {"tf": 1e-3, "torch": 1e-5}


def activation(name: Activation) -> nn.Module:
    """`nn.Identity`, `nn.ReLU` or `nn.ELU`, never in place: a shortcut may hold the same tensor."""
    kinds: dict[str, type[nn.Module]] = {"none": nn.Identity, "relu": nn.ReLU, "elu": nn.ELU}
    if name not in kinds:
        raise ConfigError(f"activation must be one of {', '.join(kinds)}; got {name!r}")
    return kinds[name]()


def check_input(x: Tensor, *, in_channels: int, minimum_size: int) -> None:
    """Raise `ConfigError` unless `x` is floating N C H W with `in_channels` channels and sides >= `minimum_size`."""
    if not isinstance(x, Tensor):
        raise ConfigError(f"expected a tensor of N C H W, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ConfigError(f"expected a floating-point tensor (see Preprocess), got {x.dtype}")
    if x.dim() != 4:
        raise ConfigError(f"expected a tensor of N C H W, got {x.dim()} dimensions: {tuple(x.shape)}")
    if x.shape[1] != in_channels:
        raise ConfigError(f"expected {in_channels} input channels, got {x.shape[1]}: {tuple(x.shape)}")
    if min(x.shape[2:]) < minimum_size:
        raise ConfigError(
            f"expected images of at least {minimum_size}x{minimum_size} pixels, got {x.shape[2]}x{x.shape[3]}"
        )


class ConvNorm(nn.Module):
    """Convolution, batch normalisation, activation: N C H W -> N C' H' W'.

    `activation_first` puts the activation before the normalisation (Keras's Inception of 2016);
    `norm_scale=False` fixes gamma at 1 (Keras's `scale=False`); `norm=False` leaves normalisation out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        norm_eps: float = 1e-3,
        norm_scale: bool = True,
        activation_name: Activation = "relu",
        activation_first: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups, bias=bias
        )
        self.norm = batch_norm(out_channels, eps=norm_eps, scale=norm_scale) if norm else nn.Identity()
        self.act = activation(activation_name)
        self.activation_first = activation_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y: Tensor = self.norm(self.act(x)) if self.activation_first else self.act(self.norm(x))
        return y


class BatchNormWithoutScale(nn.BatchNorm2d):
    """Batch normalisation with a trained offset and no scale (gamma is 1, and is no parameter)."""

    def __init__(self, num_features: int, *, eps: float) -> None:
        super().__init__(num_features, eps=eps)
        del self.weight
        self.register_parameter("weight", None)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if getattr(self, "bias", None) is not None:
            nn.init.zeros_(self.bias)
        if getattr(self, "weight", None) is not None:
            nn.init.ones_(self.weight)


def batch_norm(channels: int, *, eps: float, scale: bool = True) -> nn.BatchNorm2d:
    """Batch normalisation over `channels`, with (gamma, beta) or with beta alone."""
    return nn.BatchNorm2d(channels, eps=eps) if scale else BatchNormWithoutScale(channels, eps=eps)


class _Sampling(TypedDict):
    stride: int
    padding: Padding
    dilation: int


class DepthwiseConv2d(nn.Conv2d):
    """One filter a channel, without bias: N C H W -> N C H' W'. `padding` as in `ops.depthwise_conv2d`."""

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: Padding = "same",
        dilation: int = 1,
    ) -> None:
        super().__init__(channels, channels, kernel_size, stride, 0, dilation=dilation, groups=channels, bias=False)
        # What nn.Conv2d keeps as pairs, as the operation takes it.
        self.sampling: _Sampling = {"stride": stride, "padding": padding, "dilation": dilation}

    def forward(self, x: Tensor) -> Tensor:
        return ops.depthwise_conv2d(x, self.weight, **self.sampling)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, kernel_size={self.kernel_size}, " + ", ".join(
            f"{name}={value}" for name, value in self.sampling.items()
        )


class SeparableConv2d(nn.Module):
    """Depthwise separable convolution: N C H W -> N C' H' W', the size kept where stride is 1.

    `order` and `intermediate_activation` as in `ops.separable_conv2d`; `input_relu` puts a ReLU before it, so
    that the pair is one operation. Neither convolution has a bias: batch normalisation follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: Padding = "same",
        dilation: int = 1,
        order: Order = "depthwise_pointwise",
        intermediate_activation: Activation = "none",
        input_relu: bool = False,
    ) -> None:
        super().__init__()
        filtered = in_channels if order == "depthwise_pointwise" else out_channels
        # One operation reads both weights; they are modules for their names, and for who looks for types.
        self.depthwise = DepthwiseConv2d(filtered, kernel_size, stride=stride, padding=padding, dilation=dilation)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.order: Order = order
        self.intermediate_activation: Activation = intermediate_activation
        self.input_relu = input_relu

    def forward(self, x: Tensor) -> Tensor:
        return ops.separable_conv2d(
            x,
            self.depthwise.weight,
            self.pointwise.weight,
            **self.depthwise.sampling,
            order=self.order,
            input_relu=self.input_relu,
            intermediate_activation=self.intermediate_activation,
        )

    def extra_repr(self) -> str:
        return (
            f"order={self.order}, intermediate_activation={self.intermediate_activation}, input_relu={self.input_relu}"
        )


class SegmentedConv2d(nn.Module):
    """A point of the spectrum (Fig. 3): one 1x1, then 3x3 over `segments` non-overlapping channel segments.

    N C H W -> N C' H W. With 1 segment the second part is a regular convolution, with C' segments a depthwise
    one. Where `segments` does not divide C', the first C' mod `segments` segments are a channel wider than
    the rest, which takes two grouped convolutions: ``segmented[0]`` has the wide ones.
    Raises `ConfigError` unless 1 <= segments <= C'.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        segments: int,
        dilation: int = 1,
        intermediate_activation: Activation = "none",
        input_relu: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= segments <= out_channels:
            raise ConfigError(f"segments must be from 1 to the {out_channels} channels; got {segments}")
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        narrow, wide_segments = divmod(out_channels, segments)
        parts = ((wide_segments, narrow + 1), (segments - wide_segments, narrow))
        self.segmented = nn.ModuleList(
            nn.Conv2d(
                count * width,
                count * width,
                kernel_size,
                padding=dilation * (kernel_size // 2),
                dilation=dilation,
                groups=count,
                bias=False,
            )
            for count, width in parts
            if count
        )
        self.widths = [count * width for count, width in parts if count]
        self.segments = segments
        self.intermediate_activation: Activation = intermediate_activation
        self.input_relu = input_relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(F.relu(x) if self.input_relu else x)
        x = ops.activate(x, self.intermediate_activation)
        if len(self.segmented) == 1:
            y: Tensor = self.segmented[0](x)
            return y
        parts = zip(self.segmented, torch.split(x, self.widths, dim=1), strict=True)
        return torch.cat([convolution(part) for convolution, part in parts], dim=1)

    def extra_repr(self) -> str:
        return (
            f"segments={self.segments}, intermediate_activation={self.intermediate_activation}, "
            f"input_relu={self.input_relu}"
        )


class SamePool2d(nn.Module):
    """3x3 max-pool with stride 2: N C H W -> N C ceil(H/2) ceil(W/2).

    `numerics` "tf" pads as TensorFlow's SAME does, (0, 1) on even sizes; "torch" pads (1, 1) always.

    With ``dense=True`` it stands where the map keeps its size by dilation: nothing is skipped, its taps are
    `dilation` apart, and of its N C H W output every (2 * dilation)-th row and column is exactly what the
    strided pool gives for every dilation-th row and column of the input, in either numerics.
    """

    def __init__(self, *, numerics: Numerics = "tf", dense: bool = False, dilation: int = 1) -> None:
        super().__init__()
        self.numerics: Numerics = numerics
        self.dense = dense
        self.dilation = dilation

    @property
    def sampling(self) -> PoolSampling:
        """Where its windows lie."""
        return PoolSampling(same=self.numerics == "tf", dense=self.dense, dilation=self.dilation)

    def forward(self, x: Tensor) -> Tensor:
        return ops.max_pool3x3(x, self.sampling)

    def extra_repr(self) -> str:
        return f"numerics={self.numerics}, dense={self.dense}, dilation={self.dilation}"


def initialise(model: nn.Module) -> None:
    """Draw a network's first weights from PyTorch's global generator; the paper does not say how.

    Our choice is He's normal distribution over the fan-in (for a depthwise filter its k * k taps), which keeps the
    signal near variance 1 at any width; Glorot's for the last linear layer, which starts the softmax near uniform.
    Keras's own choice, Glorot's everywhere, makes depthwise filters so small that batch variances fall below
    normalisation's epsilon and running statistics lag behind (docs/log.md). Biases are 0; batch normalisation
    starts at gamma 1 and beta 0, with no special case.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, Classifier):
            nn.init.xavier_uniform_(module.linear.weight)
