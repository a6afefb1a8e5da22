"""The public operations: one signature each, the definition in `reference`, the fast path in the compiled kernels.

Which path is taken is decided a call: the kernels where the backend allows them, the tensors are float32 on the CPU, no
gradient is wanted, and the options are ones that they have; plain PyTorch everywhere else. Both are the same operation
to within rounding, and both are operators of PyTorch's (`torch.ops.xception.*`) with fake implementations and
autograd, so that `torch.compile` and `torch.export` see one node.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, library

from xception.errors import ConfigError
from xception.ops import backend, reference
from xception.ops.packed_layers import LAYERS
from xception.ops.reference import Activation, Order, Padding

if TYPE_CHECKING:
    from xception.ops.backend import Network

_SAME = -1  # `padding` of the operators, which take whole numbers only


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = "same",
    dilation: int = 1,
) -> Tensor:
    """As `reference.depthwise_conv2d`: N C H W -> N C*m H' W'."""
    if _wants_gradient(x, weight, bias):
        return reference.depthwise_conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation)
    return torch.ops.xception.depthwise_conv2d(x, weight, bias, stride, _number(padding), dilation)  # type: ignore[no-any-return]


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
    """As `reference.separable_conv2d`: N C H W -> N C' H' W'."""
    if order not in reference.ORDERS:
        raise ConfigError(f"order must be one of {', '.join(reference.ORDERS)}; got {order!r}")
    for name in (intermediate_activation, output_activation):
        if name not in reference.ACTIVATIONS:
            raise ConfigError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}; got {name!r}")
    if _wants_gradient(x, depthwise, pointwise, bias, residual):
        return reference.separable_conv2d(
            x,
            depthwise,
            pointwise,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            order=order,
            input_relu=input_relu,
            intermediate_activation=intermediate_activation,
            residual=residual,
            output_activation=output_activation,
        )
    return torch.ops.xception.separable_conv2d(  # type: ignore[no-any-return]
        x,
        depthwise,
        pointwise,
        bias,
        residual,
        stride,
        _number(padding),
        dilation,
        order,
        input_relu,
        intermediate_activation,
        output_activation,
    )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _number(padding: Padding) -> int:
    if padding == "same":
        return _SAME
    if not isinstance(padding, int) or padding < 0:
        raise ConfigError(f"padding must be 'same' or a whole number of zeros; got {padding!r}")
    return padding


def _word(padding: int) -> Padding:
    return "same" if padding == _SAME else padding


# ---------------------------------------------------------------------------------------------- the operators


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int) -> Tensor:
    one_each = x.dim() == 4 and len(weight) == x.shape[1]
    if one_each and _is_native(x, weight, bias) and _has_kernels(x, weight, stride, padding, dilation):
        key = ("depthwise", stride, padding, dilation)

        def build(network: Network) -> int:
            return _add_depthwise(network, network.load(), weight, bias, stride, padding, dilation)

        return LAYERS.run(x, (weight, bias), key, build)
    y = _depthwise_definition(x, weight, bias, stride, padding, dilation)
    return y.contiguous(memory_format=torch.channels_last)


def _separable(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    order: str,
    input_relu: bool,
    intermediate_activation: str,
    output_activation: str,
) -> Tensor:
    if (
        _is_native(x, depthwise, pointwise, bias, residual)
        and _has_kernels(x, depthwise, stride, padding, dilation)
        and pointwise.shape[1:] == (x.shape[1], 1, 1)
        and len(depthwise) == (x.shape[1] if order == "depthwise_pointwise" else len(pointwise))
        and (bias is None or bias.shape == pointwise.shape[:1])
        and _fits(residual, x, depthwise, pointwise, stride, padding, dilation)
    ):
        options = (stride, padding, dilation, order, input_relu, intermediate_activation, output_activation)
        key = ("separable", *options, residual is not None)

        def build(network: Network) -> int:
            beside = network.load(pointwise.shape[0]) if residual is not None else -1
            if order == "pointwise_depthwise":
                mixed = network.convolution(
                    network.load(),
                    weights=_array(pointwise[:, :, 0, 0]),
                    kernel=1,
                    input_relu=input_relu,
                    activation=intermediate_activation,
                )
                return _add_depthwise(
                    network, mixed, depthwise, bias, stride, padding, dilation, beside, output_activation
                )
            return network.separable(
                network.load(),
                filters=_filters(depthwise),
                middle=intermediate_activation,
                weights=_array(pointwise[:, :, 0, 0]),
                bias=None if bias is None else _array(bias),
                input_relu=input_relu,
                residual=beside,
                activation=output_activation,
                **_sampling(depthwise, stride, padding, dilation),
            )

        return LAYERS.run(x, (depthwise, pointwise, bias), key, build, beside=residual)
    arguments = (x, depthwise, pointwise, bias, residual, stride, padding, dilation)
    y = _separable_definition(*arguments, order, input_relu, intermediate_activation, output_activation)
    return y.contiguous(memory_format=torch.channels_last)


def _depthwise_fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int) -> Tensor:
    return _empty(x, weight.shape[0], weight, stride, padding, dilation)


def _separable_fake(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    *_: Any,
) -> Tensor:
    return _empty(x, pointwise.shape[0], depthwise, stride, padding, dilation)


def _empty(x: Tensor, channels: int, weight: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    height, width = (_output_size(size, weight.shape[2], stride, padding, dilation) for size in x.shape[2:])
    return x.new_empty((x.shape[0], height, width, channels)).permute(0, 3, 1, 2)


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    if padding == _SAME:
        return -(-size // stride)
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


# The gradient is that of the definition, which is computed once more: whoever trains calls the definition itself, by
# the functions above. This serves graphs that were captured with the operators in them.


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.inputs = tuple(None if isinstance(value, Tensor) else value for value in inputs)
    ctx.is_tensor = tuple(isinstance(value, Tensor) for value in inputs)


def _backward(function: Any) -> Any:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [
            next(saved).detach().requires_grad_(needed) if is_tensor else value
            for is_tensor, value, needed in zip(ctx.is_tensor, ctx.inputs, ctx.needs_input_grad, strict=True)
        ]
        wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(function(*inputs), wanted, gradient))
        return tuple(next(found) if isinstance(v, Tensor) and v.requires_grad else None for v in inputs)

    return backward


def _depthwise_definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int
) -> Tensor:
    return reference.depthwise_conv2d(x, weight, bias, stride=stride, padding=_word(padding), dilation=dilation)


def _separable_definition(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    order: str,
    input_relu: bool,
    intermediate_activation: str,
    output_activation: str,
) -> Tensor:
    return reference.separable_conv2d(
        x,
        depthwise,
        pointwise,
        bias,
        stride=stride,
        padding=_word(padding),
        dilation=dilation,
        order=order,  # type: ignore[arg-type]
        input_relu=input_relu,
        intermediate_activation=intermediate_activation,  # type: ignore[arg-type]
        residual=residual,
        output_activation=output_activation,  # type: ignore[arg-type]
    )


# What `library.custom_op` does, but that it loads all of torch.compile at the first call of an operator: more than a
# second, and 150 MB.
_LIBRARY = library.Library("xception", "FRAGMENT")  # type: ignore[no-untyped-call]
# Who takes this module out of sys.modules and imports it again, as some reloaders do, gets the new one's operators.
if (_former := vars(torch.ops.xception).get("library")) is not None:
    _former._destroy()
vars(torch.ops.xception)["library"] = _LIBRARY


def _register(name: str, function: Any, fake: Any, definition: Any) -> None:
    _LIBRARY.define(name + library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, _untraced(function), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    library.register_fake(f"xception::{name}", fake, lib=_LIBRARY)
    library.register_autograd(f"xception::{name}", _backward(definition), setup_context=_remember, lib=_LIBRARY)


def _untraced(function: Any) -> Any:
    """`function`, into which torch.compile, where it is loaded, does not look."""

    @functools.cache
    def opaque() -> Any:
        return torch.compiler.disable(function)  # type: ignore[no-untyped-call]

    @functools.wraps(function)
    def run(*arguments: Any) -> Tensor:
        result: Tensor = (opaque() if "torch._dynamo" in sys.modules else function)(*arguments)
        return result

    return run


_register("depthwise_conv2d", _depthwise, _depthwise_fake, _depthwise_definition)
_register("separable_conv2d", _separable, _separable_fake, _separable_definition)


# ------------------------------------------------------------------------------------------------- the kernels


def _is_native(*tensors: Tensor | None) -> bool:
    given = [t for t in tensors if t is not None]
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given) and (
        backend.active_backend() == "native"
    )


def _has_kernels(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> bool:
    """Whether these filters are of a size that the kernels take, over a map that they fit."""
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != 1:
        return False
    kernel = weight.shape[2]
    if kernel != weight.shape[3] or kernel > 15 or stride > 64 or dilation > 4096:
        return False
    return all(_output_size(size, kernel, stride, padding, dilation) > 0 for size in x.shape[2:])


def _fits(
    residual: Tensor | None, x: Tensor, depthwise: Tensor, pointwise: Tensor, stride: int, padding: int, dilation: int
) -> bool:
    if residual is None:
        return True
    sizes = (_output_size(size, depthwise.shape[2], stride, padding, dilation) for size in x.shape[2:])
    return tuple(residual.shape) == (x.shape[0], pointwise.shape[0], *sizes)


def _array(tensor: Tensor) -> Any:
    return np.ascontiguousarray(tensor.detach().numpy())


def _filters(weight: Tensor) -> Any:
    return np.ascontiguousarray(weight.detach()[:, 0].flatten(1).numpy().T)


def _sampling(weight: Tensor, stride: int, padding: int, dilation: int) -> dict[str, Any]:
    pad: dict[str, Any] = {"padding": "same"} if padding == _SAME else {"padding": "fixed", "amount": padding}
    return {"kernel": weight.shape[2], "stride": stride, "dilation": dilation, **pad}


def _add_depthwise(
    network: Network,
    value: int,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    residual: int = -1,
    activation: str = "none",
) -> int:
    return network.depthwise(
        value,
        filters=_filters(weight),
        bias=None if bias is None else _array(bias),
        residual=residual,
        activation=activation,
        **_sampling(weight, stride, padding, dilation),
    )
