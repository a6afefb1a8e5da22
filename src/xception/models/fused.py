"""Modules that the compiled extension trains as one operation, where nothing about them is out of the ordinary.

A module's units are handed to `ops.separable_units` as plain tensors. That is the same computation as calling their
parts one after the other, so it is done only where nobody could tell: no hooks on the parts, no classes derived from
them (as parametrizations make), no option without a counterpart there. The module's own call, its parameters and its
state dict stay what they are.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from xception.models.layers import BatchNormWithoutScale, DepthwiseConv2d, SamePool2d, SeparableConv2d
from xception.ops import units as ops


def train_units(
    units: nn.Sequential | list[Any],
    x: Tensor,
    *,
    unit_type: type[nn.Module],
    pool: nn.Module | None = None,
    shortcut: Tensor | Literal["input"] | None = None,
    output_relu: bool = False,
) -> Tensor | None:
    """What the units, the pool and the shortcut make of `x`; None where they have to be called one by one.

    `unit_type` is the units' class, of which nothing may be derived.
    """
    if not ops.covers(x) or type(units) not in (nn.Sequential, list) or any(map(bool, _HOOKS_OF_ALL_MODULES)):
        return None
    parts: list[Any] = list(units)
    plain = not isinstance(units, nn.Module) or _is_untouched(units)
    if not parts or not plain or not _is_plain_pool(pool) or not all(_is_plain(unit, unit_type) for unit in parts):
        return None
    if not torch.is_grad_enabled() and not any(unit.norm.training for unit in parts):
        return None  # for inference there is `xception.compile`
    dilations = {unit.conv.depthwise.sampling["dilation"] for unit in parts}
    if len(dilations) > 1:
        return None
    sampling = pool.sampling if isinstance(pool, SamePool2d) else None
    tensors = [_unit(unit) for unit in parts]
    return ops.separable_units(
        x, tensors, dilation=dilations.pop(), pool=sampling, shortcut=shortcut, output_relu=output_relu
    )


_HOOKS_OF_ALL_MODULES = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)


def _is_plain_pool(pool: nn.Module | None) -> bool:
    return pool is None or (type(pool) in (SamePool2d, nn.Identity) and _is_untouched(pool))


def _is_plain(unit: Any, unit_type: type[nn.Module]) -> bool:
    if type(unit) is not unit_type:
        return False
    conv, norm = unit.conv, unit.norm
    if type(conv) is not SeparableConv2d or type(norm) not in (nn.BatchNorm2d, BatchNormWithoutScale):
        return False
    if conv.order != "depthwise_pointwise" or conv.intermediate_activation != "none":
        return False
    depthwise, pointwise = conv.depthwise, conv.pointwise
    if type(depthwise) is not DepthwiseConv2d or type(pointwise) is not nn.Conv2d or pointwise.bias is not None:
        return False
    sampling = depthwise.sampling
    if depthwise.kernel_size != (3, 3) or sampling["stride"] != 1 or sampling["padding"] != "same":
        return False
    parts: tuple[Any, ...] = (unit, conv, norm, depthwise, pointwise)
    return all(_is_untouched(part) for part in parts)


def _is_untouched(module: nn.Module) -> bool:
    """Without hooks, and with the `forward` of its class."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    )  # fmt: skip
    return "forward" not in vars(module) and not any(hooks)


def _unit(unit: Any) -> ops.Unit:
    conv, norm = unit.conv, unit.norm
    gathers = norm.training or norm.running_mean is None
    momentum = None
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    return ops.Unit(
        depthwise=conv.depthwise.weight,
        pointwise=conv.pointwise.weight,
        scale=norm.weight,
        offset=norm.bias,
        running_mean=norm.running_mean,
        running_variance=norm.running_var,
        gathers=gathers,
        momentum=momentum,
        epsilon=norm.eps,
        input_relu=conv.input_relu,
    )
