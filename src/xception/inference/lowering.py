"""A trained network as layers of the compiled executor: batch normalisation folded away, activations fused.

Each function here reads one kind of module of `models` and adds its layers; what has no counterpart in the executor
raises `Uncovered`, which names it. Submodules are `Any` to the type checker, which knows no names in them. Folding is
done in float64: with ``s = gamma / sqrt(variance + epsilon)`` a normalised convolution is the convolution with weights
``s * w`` and bias ``beta - s * mean``.

What is covered: every option of `XceptionConfig` and `AlignedConfig`. What is not: other families, modules of classes
that are not this package's own (derived, parametrised, replaced), forward hooks, and normalisations without statistics.
A head that the executor lacks an activation for runs in torch, behind pooled features that do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xception.models.head import Classifier
from xception.models.layers import (
    BatchNormWithoutScale,
    ConvNorm,
    DepthwiseConv2d,
    SamePool2d,
    SegmentedConv2d,
    SeparableConv2d,
)
from xception.models.recompute import Flow
from xception.models.xception import SeparableUnit, Stem, Xception, XceptionBlock
from xception.models.xception_aligned import AlignedBlock, AlignedUnit, PreactivatedUnit, XceptionAligned
from xception.models.xception_aligned import Stem as AlignedStem

if TYPE_CHECKING:
    from xception.ops.backend import Network

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Counted:
    """What a product of bytes reads: the size of a step for each channel; -128 to 127 of them, or 0 to 255."""

    steps: Array
    signed: bool


Steps = Mapping[nn.Module, Counted]
IMAGE = 0  # the number of the executor's first value
_ACTIVATIONS = ("none", "relu", "elu")
_MAX_WINDOW = 2000  # numbers that a first convolution may read at once straight from the image

# What the functions here read. A class derived from one of these may compute something else.
_KNOWN: frozenset[type] = frozenset(
    (
        *(Xception, Flow, Stem, XceptionBlock, SeparableUnit),
        *(XceptionAligned, AlignedStem, AlignedBlock, AlignedUnit, PreactivatedUnit),
        *(ConvNorm, SeparableConv2d, DepthwiseConv2d, SegmentedConv2d, SamePool2d, BatchNormWithoutScale, Classifier),
        *(nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Linear, nn.Dropout),
        *(nn.Identity, nn.ReLU, nn.ELU, nn.Sequential, nn.ModuleList),
    )
)


class Uncovered(Exception):
    """The executor has no counterpart for a part of the network, which the message names."""


@dataclass(frozen=True)
class Outputs:
    """The numbers of the values that a caller may ask for; `logits` is None where the head has to run in torch."""

    features: int
    pooled: int
    logits: int | None


def lower(model: nn.Module, network: Network, steps: Steps | None = None) -> Outputs:
    """Add the layers of `model`, in eval mode, to `network`. Raises `Uncovered`.

    `steps`, of convolutions, are those in which bytes count their inputs: see `quantize.steps_of`.
    """
    steps = {} if steps is None else steps
    if type(model) not in (Xception, XceptionAligned):
        raise Uncovered(f"{type(model).__name__} is no Xception")
    head: Any = model.classifier
    in_head = set(head.modules())
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise Uncovered("forward hooks")
        if type(module) not in _KNOWN and (module not in in_head or module is head):
            raise Uncovered(f"a module of class {type(module).__name__}")
    try:
        features = _xception(model, network, steps) if type(model) is Xception else _aligned(model, network, steps)
        return _head(head, network, features)
    except ValueError as error:  # a size that the executor does not take
        raise Uncovered(str(error)) from error


# ------------------------------------------------------------------------------------------------- the networks


def _xception(model: Any, network: Network, steps: Steps) -> int:
    stem = model.entry_flow.stem
    value = _convolution(stem.conv1, network, IMAGE, padding={"padding": "same"} if stem.pad_same else None)
    value = _convolution(stem.conv2, network, value, steps)
    for name, block in model.entry_flow.named_children():
        if name != "stem":
            value = _block(block, network, steps, value)
    for _ in range(model.middle_flow.passes):
        for block in model.middle_flow:
            value = _block(block, network, steps, value)
    *units, last = model.exit_flow.separable
    only_relu = isinstance(last, nn.ReLU)  # of a module that nothing follows
    value = _block(model.exit_flow.block, network, steps, value, relu=only_relu)
    for unit in units if only_relu else (*units, last):
        value = _unit(unit, network, steps, value)
    return value


def _block(block: Any, network: Network, steps: Steps, value: int, relu: bool = False) -> int:
    """A residual module, and a ReLU behind it."""
    residual = _shortcut(block.shortcut, network, steps, value)
    pools = isinstance(block.pool, SamePool2d)
    units = list(block.units)
    for i, unit in enumerate(units):
        last = i == len(units) - 1
        # A 1x1 that comes first reads its input without a copy where the ReLU before it is done already.
        before_next = not last and _pointwise_first(units[i + 1].conv) and units[i + 1].conv.input_relu
        value = _unit(
            unit,
            network,
            steps,
            value,
            residual=residual if last and not pools else -1,
            rectified=i > 0 and _pointwise_first(unit.conv),
            relu=before_next or (last and not pools and relu),
        )
    if pools:
        value = network.pool(value, kernel=3, residual=residual, relu=relu, **_pooling(block.pool))
    return value


def _unit(
    unit: Any,
    network: Network,
    steps: Steps,
    value: int,
    *,
    residual: int = -1,
    rectified: bool = False,
    relu: bool = False,
) -> int:
    """`rectified`: the ReLU before it is done already; `relu`: one is wanted behind it."""
    conv = unit.conv
    last: dict[str, Any] = {"residual": residual, "activation": "relu" if unit.output_relu or relu else "none"}
    if not _pointwise_first(conv):
        weights, bias = _folded(conv.pointwise.weight, unit.norm)
        return network.separable(
            value,
            filters=_filters(conv.depthwise.weight),
            middle=conv.intermediate_activation,
            weights=weights,
            bias=bias,
            input_relu=conv.input_relu,
            steps=_steps(steps, conv.pointwise),
            **_sampling(conv.depthwise),
            **last,
        )
    mixed = network.convolution(
        value,
        weights=_folded(conv.pointwise.weight, nn.Identity())[0],
        kernel=1,
        input_relu=conv.input_relu and not rectified,
        activation=conv.intermediate_activation,
    )
    scale, shift = _affine(unit.norm)
    bias = shift.astype(np.float32)
    if isinstance(conv, SeparableConv2d):
        filters = _filters(conv.depthwise.weight, scale)
        return network.depthwise(mixed, filters=filters, bias=bias, **_sampling(conv.depthwise), **last)
    first: Any = conv.segmented[0]
    sampling: dict[str, Any] = {"kernel": first.kernel_size[0], "dilation": first.dilation[0], **_padding(first)}
    if conv.segments == conv.pointwise.out_channels:
        return network.depthwise(mixed, filters=_filters(first.weight, scale), bias=bias, **sampling, **last)
    weights = _segments(conv, scale)
    return network.grouped(mixed, weights=weights, bias=bias, segments=conv.segments, **sampling, **last)


def _pointwise_first(conv: Any) -> bool:
    return isinstance(conv, SegmentedConv2d) or conv.order == "pointwise_depthwise"


def _shortcut(shortcut: Any, network: Network, steps: Steps, value: int) -> int:
    if isinstance(shortcut, ConvNorm):
        return _convolution(shortcut, network, value, steps)
    return -1 if shortcut is None else value


def _aligned(model: Any, network: Network, steps: Steps) -> int:
    stem = model.entry_flow.stem
    blocks = [block for name, block in model.entry_flow.named_children() if name != "stem"]
    blocks += [*model.middle_flow, model.exit_flow.block, model.exit_flow.separable]
    value = _convolution(stem.conv1, network, IMAGE)
    if not model.config.preactivation:
        value = _convolution(stem.conv2, network, value, steps)
        for block in blocks:
            value = _aligned_block(block, network, steps, value)
        return value
    # Every reader of a module's sum normalises and rectifies it first: both belong to the layer that computes it.
    value = _convolution(stem.conv2, network, value, steps, after=blocks[0].norm, relu=True)
    for block, after in zip(blocks, [*(block.norm for block in blocks[1:]), nn.Identity()], strict=True):
        value = _preactivated_block(block, network, steps, value, after)
    return value


def _aligned_block(block: Any, network: Network, steps: Steps, value: int) -> int:
    residual = _shortcut(block.shortcut, network, steps, value)
    units: list[Any] = list(block.units)
    for i, unit in enumerate(units):
        value = _aligned_unit(unit, network, steps, value, residual=residual if i == len(units) - 1 else -1)
    return value


def _aligned_unit(unit: Any, network: Network, steps: Steps, value: int, residual: int) -> int:
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
        steps=_steps(steps, unit.pointwise),
        **_sampling(unit.depthwise),
    )


def _preactivated_block(block: Any, network: Network, steps: Steps, value: int, after: nn.Module) -> int:
    """A module whose input is normalised and rectified, and so is its sum, by `after` and a ReLU."""
    residual, scale = -1, None if isinstance(after, nn.Identity) else _affine(after)[0]
    if isinstance(block.shortcut, ConvNorm):  # s * (y + x) + t is (s * y + t) + s * x
        residual = _convolution(block.shortcut, network, value, steps, scale=scale)
    elif block.shortcut is not None:
        residual = value
        if scale is not None:
            residual = network.depthwise(value, filters=scale.astype(np.float32)[None], kernel=1)
    units: list[Any] = list(block.units)
    norms = [*(unit.norm for unit in units[1:]), after]
    for i, (unit, norm) in enumerate(zip(units, norms, strict=True)):
        weights, bias = _folded(unit.conv.pointwise.weight, norm)
        value = network.separable(
            value,
            filters=_filters(unit.conv.depthwise.weight),
            middle=unit.conv.intermediate_activation,
            weights=weights,
            bias=bias,
            residual=residual if i == len(units) - 1 else -1,
            activation="relu",
            steps=_steps(steps, unit.conv.pointwise),
            **_sampling(unit.conv.depthwise),
        )
    return value


def _head(head: Any, network: Network, features: int) -> Outputs:
    pooled = network.reduce(features, maximum=head.pooling == "max")
    linear = [*head.fully_connected, head.linear]
    if any(type(layer) is not nn.Linear for layer in linear) or type(head.dropout) is not nn.Dropout:
        return Outputs(features, pooled, None)
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
    if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        raise Uncovered(f"normalisation by {type(norm).__name__}")
    if norm.running_mean is None or norm.running_var is None:
        raise Uncovered("normalisation without statistics")
    scale = 1 / np.sqrt(_numbers(norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale = scale * _numbers(norm.weight)
    shift = -_numbers(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + _numbers(norm.bias)


def _folded(weight: Tensor, *norms: nn.Module, bias: Tensor | None = None) -> tuple[Array, Array]:
    """Weights O I k k with the normalisations behind them, as O x (k * k * I), and the bias."""
    numbers = _numbers(weight).transpose(0, 2, 3, 1)
    offset = np.zeros(len(numbers)) if bias is None else _numbers(bias)
    for norm in norms:
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


def _segments(conv: Any, scale: NDArray[np.float64]) -> Array:
    """The filters of a `SegmentedConv2d` as channels x (k * k * widest), zeros behind a narrower segment's."""
    parts = [_numbers(part.weight).transpose(0, 2, 3, 1) for part in conv.segmented]
    widest = max(part.shape[3] for part in parts)
    numbers = np.concatenate([np.pad(p, ((0, 0), (0, 0), (0, 0), (0, widest - p.shape[3]))) for p in parts])
    return np.ascontiguousarray((numbers * scale[:, None, None, None]).reshape(len(numbers), -1), np.float32)


def _linear(layer: nn.Linear) -> dict[str, Any]:
    bias = None if layer.bias is None else _numbers(layer.bias).astype(np.float32)
    return {"weights": np.ascontiguousarray(_numbers(layer.weight), np.float32), "bias": bias}


def _steps(steps: Steps, pointwise: nn.Module) -> Array | None:
    counted = steps.get(pointwise)
    return None if counted is None else counted.steps


# ----------------------------------------------------------------------------------------------------- sampling


def _convolution(
    unit: Any,
    network: Network,
    value: int,
    steps: Steps | None = None,
    *,
    padding: dict[str, Any] | None = None,
    after: nn.Module | None = None,
    scale: NDArray[np.float64] | None = None,
    relu: bool = False,
) -> int:
    """A `ConvNorm`, and behind it, if wanted: another normalisation, factors one a channel, a ReLU."""
    conv = unit.conv
    act = {nn.Identity: "none", nn.ReLU: "relu", nn.ELU: "elu"}.get(type(unit.act))
    if act is None or (unit.activation_first and act != "none" and not isinstance(unit.norm, nn.Identity)):
        raise Uncovered("an activation before its normalisation")
    if conv.groups != 1 or conv.kernel_size[0] != conv.kernel_size[1]:
        raise Uncovered("grouped or oblong convolutions")
    weights, bias = _folded(conv.weight, unit.norm, after or nn.Identity(), bias=conv.bias)
    if scale is not None:
        weights, bias = (weights * scale[:, None]).astype(np.float32), (bias * scale).astype(np.float32)
    counted = None if steps is None else steps.get(conv)
    if value == IMAGE and weights.shape[1] > _MAX_WINDOW:
        value = network.load()
    return network.convolution(
        value,
        weights=weights,
        bias=bias,
        kernel=conv.kernel_size[0],
        stride=conv.stride[0],
        dilation=conv.dilation[0],
        input_relu=counted is not None and not counted.signed,  # what is cut off below zero
        activation="relu" if relu else act,
        steps=None if counted is None else counted.steps,
        **(_padding(conv) if padding is None else padding),
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
