"""What the operations are, in plain PyTorch: the definition, the fallback, the oracle of every faster path.

Tensors are N C H W; sizes, strides and dilations are in pixels and the same in both directions.
Nothing here works in place, so an input may safely be a shortcut's source as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from xception.errors import ConfigError

Activation = Literal["none", "relu", "elu"]
Order = Literal["depthwise_pointwise", "pointwise_depthwise"]
Padding = int | Literal["same"]

ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "elu")
ORDERS: tuple[Order, ...] = ("depthwise_pointwise", "pointwise_depthwise")


def same_padding(size: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> tuple[int, int]:
    """The zeros before and after one axis under TensorFlow's SAME rule.

    The output has ceil(size / stride) positions; what they lack is split, with the odd one at the far end::

        total = max((ceil(size / stride) - 1) * stride + dilation * (kernel_size - 1) + 1 - size, 0)

    With stride 1 and an odd kernel this is symmetric; a 3-wide kernel with stride 2 gets (1, 1) on odd sizes
    and (0, 1) on even ones, where PyTorch's usual padding of 1 would shift every window by a pixel.
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + dilation * (kernel_size - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def pad_same(x: Tensor, kernel_size: int, stride: int = 1, dilation: int = 1, *, value: float = 0.0) -> Tensor:
    """`x` with SAME padding around it, for an operation that pads nothing itself: N C H W -> N C H' W'."""
    top, bottom = same_padding(x.shape[2], kernel_size, stride, dilation)
    left, right = same_padding(x.shape[3], kernel_size, stride, dilation)
    if top == bottom == left == right == 0:
        return x
    return F.pad(x, (left, right, top, bottom), value=value)


def max_pool2d_same(x: Tensor, kernel_size: int = 3, stride: int = 2, dilation: int = 1) -> Tensor:
    """TensorFlow's SAME max-pool: N C H W -> N C ceil(H/stride) ceil(W/stride).

    By definition ``max_pool2d(pad_same(x, ..., value=-inf))``. The padding never wins a maximum, so a window
    that hangs over the far edge (``ceil_mode``) gives the same values without a copy that costs as much as
    the pool itself. Two cases keep to the definition: an even window with stride 1, whose padding has no such
    form, and dilated taps, which can all miss a small map (PyTorch's own padding then writes out of bounds).
    """
    if dilation > 1 or (stride == 1 and kernel_size % 2 == 0):
        padded = pad_same(x, kernel_size, stride, dilation, value=-torch.inf)
        return F.max_pool2d(padded, kernel_size, stride, dilation=dilation)
    before = tuple(same_padding(size, kernel_size, stride)[0] for size in x.shape[2:])
    return F.max_pool2d(x, kernel_size, stride, before, ceil_mode=True)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = "same",
    dilation: int = 1,
) -> Tensor:
    """One k x k filter (or m of them) for each channel, no mixing of channels: N C H W -> N C*m H' W'.

    `weight` is C*m 1 k k, m being the depth multiplier (1 in the paper); output channel c*m + j filters input
    channel c. `padding` is a number of zeros on every side, or "same" for TensorFlow's rule.
    """
    channels = x.shape[1]
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[0] % channels:
        raise ConfigError(
            f"expected depthwise weights of C*m 1 k k for C = {channels} channels, got {tuple(weight.shape)}"
        )
    if padding == "same":
        if stride == 1 and weight.shape[2] == weight.shape[3] and weight.shape[2] % 2:
            padding = dilation * (weight.shape[2] // 2)
        else:
            x, padding = pad_same(x, weight.shape[2], stride, dilation), 0
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups=channels)


def separable_conv2d(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = "same",
    dilation: int = 1,
    order: Order = "depthwise_pointwise",
    input_relu: bool = False,
    intermediate_activation: Activation = "none",
    residual: Tensor | None = None,
    output_activation: Activation = "none",
) -> Tensor:
    """Depthwise separable convolution (section 2): N C H W -> N C' H' W'::

        y = output_activation(second(intermediate_activation(first(relu?(x)))) + bias? + residual?)

    `first` is the depthwise and `second` the pointwise (1x1) convolution; the other way round with
    ``order="pointwise_depthwise"``, the paper's "extreme" Inception module (Fig. 4). `depthwise` is M 1 k k
    over the channels it meets, `pointwise` C' C 1 1. `bias` has an element an output channel, `residual` the
    output's shape. Stride, padding and dilation are the depthwise convolution's.
    """
    if order not in ORDERS:
        raise ConfigError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
    x = F.relu(x) if input_relu else x
    if order == "depthwise_pointwise":
        x = depthwise_conv2d(x, depthwise, stride=stride, padding=padding, dilation=dilation)
        x = F.conv2d(activate(x, intermediate_activation), pointwise, bias)
    else:
        x = activate(F.conv2d(x, pointwise), intermediate_activation)
        x = depthwise_conv2d(x, depthwise, bias, stride=stride, padding=padding, dilation=dilation)
    if residual is not None:
        if residual.shape != x.shape:
            raise ConfigError(f"expected a residual of {tuple(x.shape)}, got {tuple(residual.shape)}")
        x = x + residual
    return activate(x, output_activation)


@dataclass(frozen=True, kw_only=True)
class PoolSampling:
    """Where the windows of a 3x3 max-pool lie that halves the map, or, `dense`, one that keeps its size by dilation.

    `same` pads as TensorFlow's SAME does, (0, 1) on even sizes; else (1, 1) always. Of a dense pool's output every
    (2 * dilation)-th row and column is what the strided pool gives for every dilation-th of the input.
    """

    same: bool = True
    dense: bool = False
    dilation: int = 1

    @property
    def stride(self) -> int:
        """From window to window, in pixels."""
        return 1 if self.dense else 2

    @property
    def tap_dilation(self) -> int:
        """From tap to tap, in pixels."""
        return self.dilation if self.dense else 1

    def along(self, size: int) -> tuple[int, int]:
        """The windows on an axis of `size` pixels, and how far before the first pixel the first one begins."""
        if self.dense:
            return size, self.dilation * self._offset(-(-size // self.dilation))
        return (-(-size // 2) if self.same else (size - 1) // 2 + 1), self._offset(size)

    def _offset(self, size: int) -> int:
        return same_padding(size, 3, 2)[0] if self.same else 1


def max_pool3x3(x: Tensor, sampling: PoolSampling) -> Tensor:
    """N C H W -> N C H' W', by `sampling`; padding never wins."""
    if not sampling.dense:
        return max_pool2d_same(x, 3, 2) if sampling.same else F.max_pool2d(x, 3, 2, padding=1)
    d = sampling.dilation
    (_, top), (_, left) = (sampling.along(size) for size in x.shape[2:])
    if top == left == d == 1:  # PyTorch's own padding goes no further than half a kernel
        return F.max_pool2d(x, 3, 1, padding=1)
    x = F.pad(x, (left, 2 * d - left, top, 2 * d - top), value=-torch.inf)
    return F.max_pool2d(x, 3, 1, dilation=d)


@dataclass(frozen=True, kw_only=True)
class Normalised(ABC):
    """Batch normalisation of C' channels.

    `scale` and `offset` are its gamma and beta, or None for 1 and 0. Where it `gathers`, it normalises by the batch's
    statistics, and moves the running ones towards them by `momentum` (None: they stay); else by the running ones.
    """

    scale: Tensor | None = None
    offset: Tensor | None = None
    running_mean: Tensor | None = None
    running_variance: Tensor | None = None
    gathers: bool = True
    momentum: float | None = None
    epsilon: float = 1e-3

    @property
    @abstractmethod
    def channels(self) -> int:
        """C'."""

    def parameters(self) -> Iterator[Tensor]:
        """What may be trained."""
        yield from (t for t in (self.scale, self.offset) if t is not None)

    def tensors(self) -> Iterator[Tensor]:
        """The parameters, and the running statistics if there are any."""
        yield from self.parameters()
        yield from (t for t in (self.running_mean, self.running_variance) if t is not None)

    def normalise(self, z: Tensor) -> Tensor:
        """N C' H W -> N C' H W."""
        running = (self.running_mean, self.running_variance)
        if self.gathers and self.momentum is None:
            running = (None, None)
        return F.batch_norm(z, *running, self.scale, self.offset, self.gathers, self.momentum or 0.0, self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Unit(Normalised):
    """[ReLU,] 3x3 depthwise (C 1 3 3), pointwise (C' C 1 1), batch normalisation over C' channels."""

    depthwise: Tensor
    pointwise: Tensor
    input_relu: bool = True

    @property
    def channels(self) -> int:
        """C'."""
        return self.pointwise.shape[0]

    def parameters(self) -> Iterator[Tensor]:
        """What may be trained."""
        yield from (self.depthwise, self.pointwise)
        yield from super().parameters()


@dataclass(frozen=True, kw_only=True)
class Convolution(Normalised):
    """A regular convolution (C' C k k), with zeros of `padding` pixels around, and batch normalisation."""

    weight: Tensor
    stride: int = 1
    padding: int = 0

    @property
    def channels(self) -> int:
        """C'."""
        return self.weight.shape[0]

    def parameters(self) -> Iterator[Tensor]:
        """What may be trained."""
        yield self.weight
        yield from super().parameters()

    def along(self, size: int) -> int:
        """The windows on an axis of `size` pixels."""
        return (size + 2 * self.padding - self.weight.shape[-1]) // self.stride + 1


Shortcut = Convolution | Tensor | Literal["input"] | None


def normalised_conv2d(x: Tensor, convolution: Convolution, *, output_relu: bool = False) -> Tensor:
    """Convolution, batch normalisation[, ReLU]: N C H W -> N C' H' W'."""
    z = F.conv2d(x, convolution.weight, stride=convolution.stride, padding=convolution.padding)
    return activate(convolution.normalise(z), "relu" if output_relu else "none")


def separable_units(
    x: Tensor,
    units: Sequence[Unit],
    *,
    dilation: int = 1,
    pool: PoolSampling | None = None,
    shortcut: Shortcut = None,
    output_relu: bool = False,
) -> Tensor:
    """Units one after the other, a pool if there is one, plus a shortcut: N C H W -> N C' H' W'.

    `shortcut` is a convolution of the input to the output's shape, "input" for the identity, or a tensor; the module's
    output is linear unless `output_relu`.
    """
    y = x
    for unit in units:
        z = separable_conv2d(y, unit.depthwise, unit.pointwise, dilation=dilation, input_relu=unit.input_relu)
        y = unit.normalise(z)
    if pool is not None:
        y = max_pool3x3(y, pool)
    if isinstance(shortcut, Convolution):
        y = y + normalised_conv2d(x, shortcut)
    elif shortcut is not None:
        y = y + (x if isinstance(shortcut, str) else shortcut)
    return activate(y, "relu" if output_relu else "none")


def activate(x: Tensor, name: Activation) -> Tensor:
    """`x` itself, its ReLU or its ELU, never in place."""
    if name == "none":
        return x
    if name == "relu":
        return F.relu(x)
    if name == "elu":
        return F.elu(x)
    raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")
