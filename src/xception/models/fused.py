"""Modules that the compiled extension trains as one operation, where nothing about them is out of the ordinary.

A module's units are handed to `ops.separable_units` as plain tensors, a convolution to `ops.normalised_conv2d`. That is
the same computation as calling their parts one after the other, so it is done only where nobody could tell: no hooks on
the parts, no classes derived from them (as parametrizations make), no option without a counterpart there. The module's
own call, its parameters and its state dict stay what they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xception.models.layers import BatchNormWithoutScale, ConvNorm, DepthwiseConv2d, SamePool2d, SeparableConv2d
from xception.ops import convolutions
from xception.ops import units as ops


def train_units(
    units: nn.Sequential | list[Any],
    x: Tensor,
    *,
    unit_type: type[nn.Module],
    pool: nn.Module | None = None,
    shortcut: nn.Module | None = None,
    output_relu: bool = False,
) -> Tensor | None:
    """What the units, the pool and the shortcut make of `x`; None where they have to be called one by one.

    `unit_type` is the units' class, of which nothing may be derived. `shortcut` is called with `x` where it is more
    than the identity or a plain convolution.
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
        x, tensors, dilation=dilations.pop(), pool=sampling, shortcut=_shortcut(shortcut, x), output_relu=output_relu
    )


def convolve(module: ConvNorm, x: Tensor) -> Tensor:
    """What the module makes of `x`: as one operation where it trains and is plain, else by calling it."""
    plain = ops.covers(x) and not any(map(bool, _HOOKS_OF_ALL_MODULES)) and _is_plain_convolution(module)
    if plain and (torch.is_grad_enabled() or module.norm.training):
        relu = type(module.act) is nn.ReLU
        return convolutions.normalised_conv2d(x, _convolution(module), output_relu=relu)
    y: Tensor = module(x)
    return y


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


def _is_plain_convolution(module: nn.Module) -> bool:
    if type(module) is not ConvNorm or type(module.conv) is not nn.Conv2d or type(module.act) not in _ACTIVATIONS:
        return False
    conv, norm = module.conv, module.norm
    if type(norm) not in (nn.BatchNorm2d, BatchNormWithoutScale) or module.activation_first or conv.bias is not None:
        return False
    regular = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    even = (
        len({conv.stride[0], conv.stride[1]}) == 1 and isinstance(conv.padding, tuple) and len(set(conv.padding)) == 1
    )
    return regular and even and all(_is_untouched(part) for part in (module, conv, norm, module.act))


_ACTIVATIONS = (nn.Identity, nn.ReLU)


def _shortcut(module: nn.Module | None, x: Tensor) -> ops.Shortcut:
    if module is None:
        return None
    if type(module) is nn.Identity and _is_untouched(module):
        return "input"
    if isinstance(module, ConvNorm) and _is_plain_convolution(module) and type(module.act) is nn.Identity:
        return _convolution(module)
    result: Tensor = module(x)
    return result


def _unit(unit: Any) -> ops.Unit:
    conv = unit.conv
    return ops.Unit(
        depthwise=conv.depthwise.weight, pointwise=conv.pointwise.weight, input_relu=conv.input_relu, **_norm(unit.norm)
    )


def _convolution(module: ConvNorm) -> ops.Convolution:
    conv: Any = module.conv
    return ops.Convolution(weight=conv.weight, stride=conv.stride[0], padding=conv.padding[0], **_norm(module.norm))


def _norm(norm: Any) -> dict[str, Any]:
    """A normalisation's fields, and one more batch counted."""
    momentum = None
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    return {
        "scale": norm.weight,
        "offset": norm.bias,
        "running_mean": norm.running_mean,
        "running_variance": norm.running_var,
        "gathers": norm.training or norm.running_mean is None,
        "momentum": momentum,
        "epsilon": norm.eps,
    }
