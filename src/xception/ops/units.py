"""Separable units with batch normalisation, for training: one after the other, then a pool or not, then a shortcut.

A unit is [ReLU ->] depthwise 3x3 -> pointwise -> batch normalisation (section 2 and Fig. 5). `separable_units` runs a
whole module's units at once. Its definition is `reference.separable_units`; on a CPU, with the compiled extension, the
same is computed forward and backward by native/src/train.cpp, which fuses each unit's normalisation and ReLU into the
next unit's load and computes in the backward pass again what PyTorch would store.

Maps are float32, or bfloat16 under autocast; weights, sums and statistics are float32 always. Results repeat bit for
bit for one number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from xception.ops import backend, reference
from xception.ops.openmp import torch_openmp
from xception.ops.reference import PoolSampling as PoolSampling
from xception.ops.reference import Unit as Unit

if TYPE_CHECKING:
    from xception.ops.backend import UnitTrainer

_MOST_DILATION = 64  # padding is really there, around each map
_TYPES: dict[torch.dtype, backend.Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def separable_units(
    x: Tensor,
    units: Sequence[Unit],
    *,
    dilation: int = 1,
    pool: PoolSampling | None = None,
    shortcut: Tensor | Literal["input"] | None = None,
    output_relu: bool = False,
) -> Tensor:
    """N C H W -> N C' H' W'; see `reference.separable_units`, whose signature this is.

    The compiled path is taken where gradients are wanted or statistics are gathered, for float32 weights on the CPU;
    elsewhere, and while torch.compile traces, it is the definition.
    """
    if not _is_native(x, units, shortcut, output_relu, pool) or dilation > _MOST_DILATION:
        return reference.separable_units(
            x, units, dilation=dilation, pool=pool, shortcut=shortcut, output_relu=output_relu
        )
    if torch.is_autocast_enabled("cpu") and x.dtype == torch.float32:
        x = x.to(torch.bfloat16)
    other = shortcut.to(x.dtype) if isinstance(shortcut, Tensor) else None
    plan = _Plan(
        tuple(unit.input_relu for unit in units),
        tuple(unit.gathers for unit in units),
        tuple(unit.epsilon for unit in units),
        dilation,
        pool,
        isinstance(shortcut, str),
        output_relu,
    )
    tensors: list[Tensor | None] = []
    for unit in units:
        tensors += [unit.depthwise, unit.pointwise, unit.scale, unit.offset, unit.running_mean, unit.running_variance]
    out, *statistics = _SeparableUnits.apply(plan, x, other, *tensors)
    for i, unit in enumerate(units):
        if unit.gathers and unit.momentum is not None:
            _update(unit, unit.momentum, statistics[2 * i], statistics[2 * i + 1], x.numel() // x.shape[1])
    result: Tensor = out
    return result


def covers(x: Tensor) -> bool:
    """Whether the compiled path may be taken for this input now, whatever the units are."""
    return (
        type(x) in (Tensor, nn.Parameter)  # fake tensors say that they are on the CPU, too
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None  # grad, vmap and the like
        and _map_type(x) is not None
        and backend.active_backend() == "native"
    )


def _is_native(
    x: Tensor, units: Sequence[Unit], shortcut: Tensor | str | None, output_relu: bool, pool: PoolSampling | None
) -> bool:
    if not covers(x) or (output_relu and (pool is not None or shortcut is not None)):
        return False
    gathers = any(unit.gathers for unit in units)
    given = [x, *(t for unit in units for t in unit.parameters())]
    if not gathers and not (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return False
    channels = x.shape[1]
    for unit in units:
        if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in unit.tensors()):
            return False
        out = unit.pointwise.shape[0]
        if unit.depthwise.shape != (channels, 1, 3, 3) or unit.pointwise.shape != (out, channels, 1, 1):
            return False
        channels = out
    if shortcut is not None:
        other = x if isinstance(shortcut, str) else shortcut
        sizes = x.shape[2:] if pool is None else [pool.along(size)[0] for size in x.shape[2:]]
        if other.device.type != "cpu" or other.shape != (x.shape[0], channels, *sizes):
            return False
    # One pixel has no variance: PyTorch refuses it, and so does the definition.
    return not (gathers and x.numel() // x.shape[1] == 1)


def _map_type(x: Tensor) -> torch.dtype | None:
    """Of the maps between units: autocast's, or the input's."""
    if torch.is_autocast_enabled("cpu"):
        wanted = torch.get_autocast_dtype("cpu")
        return wanted if wanted == torch.bfloat16 and x.dtype in _TYPES else None
    return x.dtype if x.dtype == torch.float32 else None


def _update(unit: Unit, momentum: float, mean: Tensor, variance: Tensor, count: int) -> None:
    """Running statistics as PyTorch has them: the variance's is of the sample, divided by count - 1."""
    with torch.no_grad():
        if unit.running_mean is not None:
            unit.running_mean.lerp_(mean, momentum)
        if unit.running_variance is not None:
            unit.running_variance.lerp_(variance * (count / (count - 1)), momentum)


@dataclass(frozen=True)
class _Plan:
    """What of a call is no tensor."""

    input_relu: tuple[bool, ...]
    gathers: tuple[bool, ...]
    epsilon: tuple[float, ...]
    dilation: int
    pool: PoolSampling | None
    identity: bool
    output_relu: bool


@lru_cache(maxsize=16)
def _trainer(level: str, kind: backend.Precision, threads: int) -> UnitTrainer:
    return backend.new_unit_trainer(level, kind, threads, torch_openmp())


class _SeparableUnits(torch.autograd.Function):
    """Saved for backward: the input, each unit's z (before its normalisation) in channel blocks, and small vectors."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, shortcut: Tensor | None, *tensors: Tensor | None) -> Any:
        trainer = _trainer(backend.kernel_level(_TYPES[x.dtype]), _TYPES[x.dtype], torch.get_num_threads())
        rows = _channels_last(x)
        sizes = (rows.shape[0], rows.shape[1], rows.shape[2])
        value: Any = _array(rows)
        load: tuple[Any, Any] = (None, None)
        kept: list[Tensor] = []
        statistics: list[Tensor] = []
        for i, relu in enumerate(plan.input_relu):
            depthwise, pointwise, gamma, beta, running_mean, running_variance = tensors[6 * i : 6 * i + 6]
            assert depthwise is not None
            assert pointwise is not None
            out = pointwise.shape[0]
            z = torch.empty(trainer.blocked_bytes(out, sizes), dtype=torch.uint8)
            mean, variance = torch.empty(out), torch.empty(out)
            trainer.forward(
                sizes, value, scale=load[0], shift=load[1], relu=relu, dilation=plan.dilation,
                filters=_flat(depthwise), weights=_weights(pointwise), z=z.numpy(), mean=mean.numpy(),
                variance=variance.numpy(),
            )  # fmt: skip
            statistics += [mean, variance]
            if not plan.gathers[i]:
                assert running_mean is not None
                assert running_variance is not None
                mean, variance = running_mean.detach().clone(), running_variance.detach()
            # y = z * scale + shift, with scale = gamma / sqrt(variance + epsilon)
            inverse = (variance.double() + plan.epsilon[i]).rsqrt()
            scale = inverse if gamma is None else inverse * gamma.detach().double()
            shift = -mean.double() * scale
            if beta is not None:
                shift = shift + beta.detach().double()
            scale, shift = scale.float(), shift.float()
            kept += [z, mean, inverse, scale, shift]
            value, load = z.numpy(), (scale.numpy(), shift.numpy())
        channels = kept[-1].shape[0]
        other = rows if plan.identity else None if shortcut is None else _channels_last(shortcut)
        added = None if other is None else _array(other)
        if plan.pool is None:
            result = rows.new_empty(*sizes, channels)
            trainer.finish(
                sizes, channels, z=value, scale=load[0], shift=load[1], relu=plan.output_relu, residual=added,
                output=_array(result),
            )  # fmt: skip
        else:
            window, pooled = _window(plan.pool, sizes)
            result = rows.new_empty(*pooled, channels)
            winners = torch.empty(-(-channels // 32) * 32 * pooled[0] * pooled[1] * pooled[2], dtype=torch.uint8)
            trainer.pool(
                sizes, channels, pooled=pooled, **window, z=value, scale=load[0], shift=load[1], residual=added,
                output=_array(result), winners=winners.numpy(),
            )  # fmt: skip
            kept.append(winners)
        ctx.plan, ctx.sizes = plan, sizes
        ctx.save_for_backward(rows, *kept, *(t for i, t in enumerate(tensors) if i % 6 < 2))
        ctx.kept = len(kept)
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return result.permute(0, 3, 1, 2), *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, *_: Tensor | None) -> Any:
        plan: _Plan = ctx.plan
        if gradient is None:
            return (None,) * len(ctx.needs_input_grad)
        rows, *saved = ctx.saved_tensors
        kept, weights = saved[: ctx.kept], saved[ctx.kept :]
        sizes = ctx.sizes
        trainer = _trainer(backend.kernel_level(_TYPES[rows.dtype]), _TYPES[rows.dtype], torch.get_num_threads())
        gradient = gradient.to(rows.dtype)
        arrived = _channels_last(gradient)
        results: list[Tensor | None] = [None] * (6 * len(plan.gathers))
        count = sizes[0] * sizes[1] * sizes[2]

        z, mean, _, scale, shift = kept[5 * len(plan.gathers) - 5 : 5 * len(plan.gathers)]
        channels = mean.shape[0]
        value: Any = _array(arrived)
        if plan.pool is not None:
            window, pooled = _window(plan.pool, sizes)
            taken_back = torch.empty(trainer.blocked_bytes(channels, sizes), dtype=torch.uint8)
            trainer.pool_backward(
                sizes, channels, pooled=pooled, **window, gradient=value, winners=kept[-1].numpy(),
                input_gradient=taken_back.numpy(),
            )  # fmt: skip
            value = taken_back.numpy()
        sums = torch.empty(2, channels)
        trainer.gradient_sums(
            sizes, channels, z=z.numpy(), scale=scale.numpy(), shift=shift.numpy(), relu=plan.output_relu,
            mean=mean.numpy(), gradient=value, sums=sums.numpy(),
        )  # fmt: skip
        wanted = ctx.needs_input_grad[3:]
        first = _first_wanted(ctx.needs_input_grad[1], wanted)
        x_gradient: Tensor | None = None
        for i in reversed(range(len(plan.gathers))):
            depthwise, pointwise = weights[2 * i : 2 * i + 2]
            z, mean, inverse, scale, shift = kept[5 * i : 5 * i + 5]
            of_offset, of_scale = sums[0].double(), sums[1].double() * inverse
            if wanted[6 * i + 2]:
                results[6 * i + 2] = of_scale.float()
            if wanted[6 * i + 3]:
                results[6 * i + 3] = of_offset.float()
            if i < first:
                break
            # gradient of z = scale * (g - mean of g - (z - mean) * inverse * mean of (g * (z - mean) * inverse))
            factors = torch.zeros(3, len(mean), dtype=torch.float64)
            factors[0] = scale
            if plan.gathers[i]:
                factors[1] = -scale.double() * of_scale * inverse / count
                factors[2] = -scale.double() * of_offset / count - factors[1] * mean
            is_last = i == len(plan.gathers) - 1
            if i > 0:
                source, before = kept[5 * i - 5], kept[5 * i - 4 : 5 * i]
                load = (before[2].numpy(), before[3].numpy())
                in_mean, sums = before[0], torch.empty(2, len(before[0]))
            else:
                source, load, in_mean = rows, (None, None), None
            wants_input = ctx.needs_input_grad[1] if i == 0 else i > first or _wants_norm(wanted, i - 1)
            input_gradient = torch.empty_like(source) if wants_input else None
            filter_gradient = torch.empty(depthwise.shape)
            weight_gradient = torch.empty(pointwise.shape) if wanted[6 * i + 1] else None
            gathers_sums = i > 0 and input_gradient is not None
            trainer.backward(
                sizes, _array(source), scale=load[0], shift=load[1], relu=plan.input_relu[i], dilation=plan.dilation,
                filters=_flat(depthwise), weights=_weights(pointwise), z=z.numpy(), gradient=value,
                out_scale=scale.numpy(), out_shift=shift.numpy(), out_relu=plan.output_relu and is_last,
                factors=factors.float().numpy(),
                in_mean=in_mean.numpy() if in_mean is not None and gathers_sums else None,
                residual=_array(arrived) if i == 0 and plan.identity and input_gradient is not None else None,
                input_gradient=None if input_gradient is None else _array(input_gradient),
                filter_gradient=_flat(filter_gradient),
                weight_gradient=None if weight_gradient is None else _weights(weight_gradient),
                sums=sums.numpy() if gathers_sums else None,
            )  # fmt: skip
            if wanted[6 * i]:
                results[6 * i] = filter_gradient
            results[6 * i + 1] = weight_gradient
            if i == 0:
                x_gradient = None if input_gradient is None else input_gradient.permute(0, 3, 1, 2)
            elif input_gradient is not None:
                value = input_gradient.numpy()
        if x_gradient is None and ctx.needs_input_grad[1] and plan.identity:
            x_gradient = gradient
        return (None, x_gradient, gradient if ctx.needs_input_grad[2] else None, *results)


def _wants_norm(wanted: Sequence[bool], unit: int) -> bool:
    return wanted[6 * unit + 2] or wanted[6 * unit + 3]


def _first_wanted(of_input: bool, wanted: Sequence[bool]) -> int:
    """The first unit whose convolutions the backward pass has to reach."""
    if of_input:
        return 0
    units = len(wanted) // 6
    for i in range(units):
        if wanted[6 * i] or wanted[6 * i + 1]:
            return i
        if _wants_norm(wanted, i):  # the sums of its normalisation come from the next unit's backward pass
            return i + 1
    return units


def _window(pool: PoolSampling, sizes: tuple[int, int, int]) -> tuple[dict[str, int], tuple[int, int, int]]:
    """The pool's window over maps of `sizes`, and the sizes of what it gives."""
    (height, top), (width, left) = pool.along(sizes[1]), pool.along(sizes[2])
    window = {"stride": pool.stride, "dilation": pool.tap_dilation, "pad_top": top, "pad_left": left}
    return window, (sizes[0], height, width)


def _channels_last(x: Tensor) -> Tensor:
    """N C H W as contiguous N H W C."""
    return x.detach().permute(0, 2, 3, 1).contiguous()


def _array(rows: Tensor) -> Any:
    """As NumPy has it, which knows no bfloat16."""
    return rows.view(torch.int16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()


def _flat(depthwise: Tensor) -> Any:
    return depthwise.detach().reshape(-1).numpy()


def _weights(pointwise: Tensor) -> Any:
    return pointwise.detach().reshape(pointwise.shape[0], -1).numpy()
