"""A trained network as layers of the compiled executor: batch normalisation folded away, activations fused.

Each function here reads one kind of module of `models` and adds its layers; what has no counterpart in the executor
raises `Uncovered`, which names it. Submodules are `Any` to the type checker, which knows no names in them. Folding is
done in float64: with ``s = gamma / sqrt(variance + epsilon)`` a normalised convolution is the convolution with weights
``s * w`` and bias ``beta - s * mean``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xception.models.layers import ConvNorm, SamePool2d, SeparableConv2d
from xception.models.xception import SeparableUnit, Xception
from xception.models.xception_aligned import XceptionAligned

if TYPE_CHECKING:
    from xception.ops.backend import Network

Array = NDArray[np.float32]
IMAGE = 0  # the number of the executor's first value
_ACTIVATIONS = ("none", "relu", "elu")


class Uncovered(Exception):
    """The executor has no counterpart for a part of the network, which the message names."""


@dataclass(frozen=True)
class Outputs:
    """The numbers of the values that a caller may ask for; `logits` is None where the head has to run in torch."""

    features: int
    pooled: int
    logits: int | None


def lower(model: nn.Module, network: Network) -> Outputs:
    """Add the layers of `model`, in eval mode, to `network`. Raises `Uncovered`."""
    # A class derived from these, or a hook, may compute something else: neither is passed over.
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        raise Uncovered("forward hooks")
    if type(model) is Xception:
        features = _xception(model, network)
    elif type(model) is XceptionAligned:
        features = _aligned(model, network)
    else:
        raise Uncovered(f"{type(model).__name__} is no Xception")
    return _head(model.classifier, network, features)


# ------------------------------------------------------------------------------------------------- the networks


def _xception(model: Any, network: Network) -> int:
    if model.middle_flow.passes != 1 and len(model.middle_flow) == 0:
        raise Uncovered("a tied middle flow without modules")
    stem = model.entry_flow.stem
    padding = {"padding": "same"} if stem.pad_same else _padding(stem.conv1.conv)
    value = _convolution(stem.conv1, network, IMAGE, padding)
    value = _convolution(stem.conv2, network, value, _padding(stem.conv2.conv))
    for name, block in model.entry_flow.named_children():
        if name != "stem":
            value = _block(block, network, value)
    for _ in range(model.middle_flow.passes):
        for block in model.middle_flow:
            value = _block(block, network, value)
    value = _block(model.exit_flow.block, network, value)
    for unit in model.exit_flow.separable:
        if not isinstance(unit, SeparableUnit):
            raise Uncovered("an exit flow without separable convolutions")
        value = _unit(unit, network, value)
    return value


def _block(block: Any, network: Network, value: int) -> int:
    shortcut, residual = block.shortcut, -1
    pools = isinstance(block.pool, SamePool2d)
    if isinstance(shortcut, ConvNorm):
        residual = _convolution(shortcut, network, value, _padding(shortcut.conv))
    elif shortcut is not None:
        residual = value
    units = list(block.units)
    for i, unit in enumerate(units):
        last = i == len(units) - 1
        value = _unit(unit, network, value, residual=residual if last and not pools else -1)
    if isinstance(block.pool, SamePool2d):
        value = network.pool(value, kernel=3, residual=residual, **_pooling(block.pool))
    return value


def _unit(unit: Any, network: Network, value: int, residual: int = -1) -> int:
    conv = unit.conv
    if not isinstance(conv, SeparableConv2d):
        raise Uncovered("convolutions over several channels a segment")
    if conv.order != "depthwise_pointwise":
        raise Uncovered("pointwise convolutions before depthwise ones")
    weights, bias = _folded(conv.pointwise.weight, unit.norm)
    return network.separable(
        value,
        filters=_filters(conv.depthwise.weight),
        middle=conv.intermediate_activation,
        weights=weights,
        bias=bias,
        input_relu=conv.input_relu,
        residual=residual,
        activation="relu" if unit.output_relu else "none",
        **_sampling(conv.depthwise),
    )


def _aligned(model: Any, network: Network) -> int:
    if model.config.preactivation:
        raise Uncovered("pre-activated modules")
    stem = model.entry_flow.stem
    value = _convolution(stem.conv1, network, IMAGE, _padding(stem.conv1.conv))
    value = _convolution(stem.conv2, network, value, _padding(stem.conv2.conv))
    for name, block in model.entry_flow.named_children():
        if name != "stem":
            value = _aligned_block(block, network, value)
    for block in model.middle_flow:
        value = _aligned_block(block, network, value)
    value = _aligned_block(model.exit_flow.block, network, value)
    return _aligned_block(model.exit_flow.separable, network, value)


def _aligned_block(block: Any, network: Network, value: int) -> int:
    shortcut, residual = block.shortcut, -1
    if isinstance(shortcut, ConvNorm):
        residual = _convolution(shortcut, network, value, _padding(shortcut.conv))
    elif shortcut is not None:
        residual = value
    units: list[Any] = list(block.units)
    for i, unit in enumerate(units):
        value = _aligned_unit(unit, network, value, residual=residual if i == len(units) - 1 else -1)
    return value


def _aligned_unit(unit: Any, network: Network, value: int, residual: int) -> int:
    scale, shift = _affine(unit.depthwise_norm)
    filters = _filters(unit.depthwise.weight, scale)
    weights, bias = _folded(unit.pointwise.weight, unit.norm)
    inside = "relu" if unit.activation == "inside" else "none"
    if inside == "relu" and residual >= 0:
        raise Uncovered("a shortcut around activations")
    return network.separable(
        value,
        filters=filters,
        filter_bias=shift.astype(np.float32),
        middle=inside,
        weights=weights,
        bias=bias,
        input_relu=inside == "none",
        residual=residual,
        activation=inside,
        **_sampling(unit.depthwise),
    )


def _head(head: Any, network: Network, features: int) -> Outputs:
    pooled = network.reduce(features, maximum=head.pooling == "max")
    if any(name not in _ACTIVATIONS for name in head.hidden_activations):
        return Outputs(features, pooled, None)
    value = pooled
    for layer, name in zip(head.fully_connected, head.hidden_activations, strict=True):
        value = network.linear(value, activation=name, **_linear(layer))
    return Outputs(features, pooled, network.linear(value, **_linear(head.linear)))


# ------------------------------------------------------------------------------------------------------ weights


def _numbers(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().to("cpu", torch.float64).numpy()


def _affine(norm: nn.Module) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale and shift of a batch normalisation in eval mode, or of none."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        raise Uncovered(f"normalisation by {type(norm).__name__}")
    scale = 1 / np.sqrt(_numbers(norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale = scale * _numbers(norm.weight)
    shift = -_numbers(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + _numbers(norm.bias)


def _folded(weight: Tensor, norm: nn.Module, bias: Tensor | None = None) -> tuple[Array, Array]:
    """Weights O I k k with the normalisation behind them, as O x (k * k * I), and the bias."""
    numbers = _numbers(weight).transpose(0, 2, 3, 1)
    offset = np.zeros(len(numbers)) if bias is None else _numbers(bias)
    if not isinstance(norm, nn.Identity):
        scale, shift = _affine(norm)
        numbers, offset = numbers * scale[:, None, None, None], offset * scale + shift
    return np.ascontiguousarray(numbers.reshape(len(numbers), -1), np.float32), offset.astype(np.float32)


def _filters(weight: Tensor, scale: NDArray[np.float64] | None = None) -> Array:
    """Depthwise weights C 1 k k as (k * k) x C."""
    numbers = _numbers(weight)[:, 0]
    if scale is not None:
        numbers = numbers * scale[:, None, None]
    return np.ascontiguousarray(numbers.reshape(len(numbers), -1).T, np.float32)


def _linear(layer: nn.Linear) -> dict[str, Any]:
    bias = None if layer.bias is None else _numbers(layer.bias).astype(np.float32)
    return {"weights": np.ascontiguousarray(_numbers(layer.weight), np.float32), "bias": bias}


# ----------------------------------------------------------------------------------------------------- sampling


def _convolution(unit: Any, network: Network, value: int, padding: dict[str, Any]) -> int:
    conv = unit.conv
    act = {nn.Identity: "none", nn.ReLU: "relu", nn.ELU: "elu"}.get(type(unit.act))
    if act is None or (unit.activation_first and act != "none" and not isinstance(unit.norm, nn.Identity)):
        raise Uncovered("an activation before its normalisation")
    if conv.groups != 1 or conv.kernel_size[0] != conv.kernel_size[1]:
        raise Uncovered("grouped or oblong convolutions")
    weights, bias = _folded(conv.weight, unit.norm, conv.bias)
    return network.convolution(
        value,
        weights=weights,
        bias=bias,
        kernel=conv.kernel_size[0],
        stride=conv.stride[0],
        dilation=conv.dilation[0],
        activation=act,
        **padding,
    )


def _padding(conv: Any) -> dict[str, Any]:
    if isinstance(conv.padding, str) or conv.padding[0] != conv.padding[1] or conv.padding_mode != "zeros":
        raise Uncovered(f"padding {conv.padding!r}")
    return {"padding": "fixed", "amount": conv.padding[0]}


def _sampling(conv: Any) -> dict[str, Any]:
    stride, padding, dilation = (conv.sampling[name] for name in ("stride", "padding", "dilation"))
    pad = {"padding": "same"} if padding == "same" else {"padding": "fixed", "amount": padding}
    return {"kernel": conv.kernel_size[0], "stride": stride, "dilation": dilation, **pad}


def _pooling(pool: SamePool2d) -> dict[str, Any]:
    tf = pool.numerics == "tf"
    if not pool.dense:
        return {"stride": 2, **({"padding": "same"} if tf else {"padding": "fixed", "amount": 1})}
    pad = {"padding": "dense_same"} if tf else {"padding": "fixed", "amount": pool.dilation}
    return {"stride": 1, "dilation": pool.dilation, **pad}
