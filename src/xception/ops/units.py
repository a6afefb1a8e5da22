"""Separable units with batch normalisation, for training: one after the other, then a pool or not, then a shortcut.

A unit is [ReLU ->] depthwise 3x3 -> pointwise -> batch normalisation (section 2 and Fig. 5). `separable_units` runs a
whole module's units at once. Its definition is `reference.separable_units`; on a CPU, with the compiled extension, the
same is computed forward and backward by native/src/train.cpp, which fuses each unit's normalisation and ReLU into the
next unit's load and computes in the backward pass again what PyTorch would store.

Maps are float32, or bfloat16 under autocast; weights, sums and statistics are float32 always. Results repeat bit for
bit for one number of threads. Gradients of gradients are the definition's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xception.ops import convolutions, reference
from xception.ops.convolutions import ConvPlan
from xception.ops.reference import Convolution as Convolution
from xception.ops.reference import PoolSampling as PoolSampling
from xception.ops.reference import Shortcut as Shortcut
from xception.ops.reference import Unit as Unit
from xception.ops.trainer import (
    MAP_TYPES,
    MEAN,
    NORM_ROWS,
    SCALE,
    SHIFT,
    VARIANCE,
    NormPlan,
    Sizes,
    array,
    as_map,
    channels_last,
    definition_gradients,
    fits,
    matrix,
    needs_definition,
    norm_gradients,
    norm_tensors,
    normalise,
    trainer_for,
    trains,
    update_running,
)
from xception.ops.trainer import covers as covers

if TYPE_CHECKING:
    from xception.ops.backend import UnitTrainer

_MOST_DILATION = 64  # padding is really there, around each map


def separable_units(
    x: Tensor,
    units: Sequence[Unit],
    *,
    dilation: int = 1,
    pool: PoolSampling | None = None,
    shortcut: Shortcut = None,
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
    x = as_map(x)
    given = shortcut.to(x.dtype) if isinstance(shortcut, Tensor) else None
    plan = _Plan(
        tuple(unit.input_relu for unit in units),
        tuple(NormPlan.of(unit) for unit in units),
        dilation,
        pool,
        ConvPlan.of(shortcut) if isinstance(shortcut, Convolution) else None,
        isinstance(shortcut, str),
        output_relu,
    )
    tensors: list[Tensor | None] = []
    for unit in units:
        tensors += [unit.depthwise, unit.pointwise, *norm_tensors(unit)]
    if isinstance(shortcut, Convolution):
        tensors += [shortcut.weight, *norm_tensors(shortcut)]
    out, *norms = _SeparableUnits.apply(plan, x, given, *tensors)
    result: Tensor = out
    pixels = x.numel() // x.shape[1]
    for unit, norm in zip(units, norms, strict=False):
        update_running(unit, norm, pixels)
    if isinstance(shortcut, Convolution):
        update_running(shortcut, norms[-1], result.numel() // result.shape[1])
    return result


def _is_native(
    x: Tensor,
    units: Sequence[Unit],
    shortcut: Shortcut,
    output_relu: bool,
    pool: PoolSampling | None,
) -> bool:
    if not units or not covers(x) or (output_relu and (pool is not None or shortcut is not None)):
        return False
    if not trains(x, [*units, *([shortcut] if isinstance(shortcut, Convolution) else [])]):
        return False
    channels = x.shape[1]
    for unit in units:
        out = unit.pointwise.shape[0]
        if unit.depthwise.shape != (channels, 1, 3, 3) or unit.pointwise.shape != (out, channels, 1, 1):
            return False
        if not fits(x.shape[0], out, x.shape[2], x.shape[3]):
            return False
        channels = out
    given = tuple(x.shape[2:])
    sizes = given if pool is None else tuple(pool.along(size)[0] for size in given)
    if isinstance(shortcut, Convolution):
        if not convolutions.is_covered(x, shortcut):
            return False
        if (shortcut.weight.shape[0], *map(shortcut.along, given)) != (channels, *sizes):
            return False
    elif shortcut is not None:
        other = x if isinstance(shortcut, str) else shortcut
        if other.device.type != "cpu" or other.shape != (x.shape[0], channels, *sizes):
            return False
        if other.dtype not in MAP_TYPES:  # the sum would have a type that there are no kernels for
            return False
    # One pixel has no variance: PyTorch refuses it, and so does the definition.
    return not (any(unit.gathers for unit in units) and x.numel() // x.shape[1] == 1)


@dataclass(frozen=True)
class _Plan:
    """What of a call is no tensor."""

    input_relu: tuple[bool, ...]
    norms: tuple[NormPlan, ...]
    dilation: int
    pool: PoolSampling | None
    projection: ConvPlan | None  # the shortcut's convolution
    identity: bool  # the shortcut is the input itself
    output_relu: bool

    @property
    def count(self) -> int:
        return len(self.norms)


_OF_A_UNIT = 6  # tensors: depthwise, pointwise, gamma, beta, running mean, running variance
_KEPT = 2  # tensors of a unit, and of the shortcut's convolution: z, and its normalisation


class _SeparableUnits(torch.autograd.Function):
    """Saved for backward: the input, each unit's z (before its normalisation) in channel blocks, and small arrays."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, shortcut: Tensor | None, *tensors: Tensor | None) -> Any:
        trainer = trainer_for(x)
        rows = channels_last(x)
        sizes = _sizes(rows)
        value: Any = array(rows)
        scale: Any = None
        shift: Any = None
        kept: list[Tensor] = []
        for i, relu in enumerate(plan.input_relu):
            depthwise, pointwise, *of_norm = tensors[_OF_A_UNIT * i : _OF_A_UNIT * (i + 1)]
            assert depthwise is not None
            assert pointwise is not None
            channels = pointwise.shape[0]
            kept += [
                torch.empty(trainer.blocked_bytes(channels, sizes), dtype=torch.uint8), torch.empty(NORM_ROWS, channels)
            ]  # fmt: skip
            z, norm = kept[-2].numpy(), kept[-1].numpy()
            trainer.forward(
                sizes, value, scale=scale, shift=shift, relu=relu, dilation=plan.dilation, filters=_flat(depthwise),
                weights=matrix(pointwise), z=z, mean=norm[MEAN], variance=norm[VARIANCE],
            )  # fmt: skip
            normalise(trainer, plan.norms[i], norm, of_norm)
            value, scale, shift = z, norm[SCALE], norm[SHIFT]
        added: dict[str, Any] = {"residual": None, "residual_scale": None, "residual_shift": None}
        if plan.projection is not None:
            other = convolutions.forward(trainer, rows, plan.projection, tensors[_OF_A_UNIT * plan.count :])
            kept += other
            norm = other[1].numpy()
            added = {"residual": other[0].numpy(), "residual_scale": norm[SCALE], "residual_shift": norm[SHIFT]}
        elif plan.identity or shortcut is not None:
            added["residual"] = array(rows if shortcut is None else channels_last(shortcut))
        norms = kept[1::_KEPT]
        if plan.pool is None:
            result = rows.new_empty(*sizes, channels)
            trainer.finish(
                sizes, channels, z=value, scale=scale, shift=shift, relu=plan.output_relu, **added,
                output=array(result),
            )  # fmt: skip
        else:
            window, pooled = _window(plan.pool, sizes)
            result = rows.new_empty(*pooled, channels)
            winners = torch.empty(-(-channels // 32) * 32 * pooled[0] * pooled[1] * pooled[2], dtype=torch.uint8)
            trainer.pool(
                sizes, channels, pooled=pooled, **window, z=value, scale=scale, shift=shift, **added,
                output=array(result), winners=winners.numpy(),
            )  # fmt: skip
            kept.append(winners)
        ctx.plan = plan
        ctx.save_for_backward(x, shortcut, *kept, *tensors)
        ctx.kept = len(kept)
        ctx.mark_non_differentiable(*norms)
        ctx.set_materialize_grads(False)
        return result.permute(0, 3, 1, 2), *norms

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Tensor | None) -> Any:
        plan: _Plan = ctx.plan
        if gradient is None:
            return (None,) * len(ctx.needs_input_grad)
        x, shortcut, *saved = ctx.saved_tensors
        kept, tensors = saved[: ctx.kept], saved[ctx.kept :]
        if needs_definition(gradient):
            inputs = [x, shortcut, *tensors]
            return (None, *definition_gradients(lambda: _definition(plan, *inputs), x, gradient, inputs))
        wanted = ctx.needs_input_grad[3:]
        trainer = trainer_for(x)
        rows = channels_last(x)
        arrived = channels_last(gradient.to(rows.dtype))
        of_x, results = _units_backward(trainer, plan, rows, kept, tensors, arrived, ctx.needs_input_grad[1], wanted)
        if plan.projection is not None:
            begin = _OF_A_UNIT * plan.count
            of_weight, of_scale, of_offset = convolutions.backward(
                trainer, rows, plan.projection, tensors[begin], kept[_KEPT * plan.count : _KEPT * (plan.count + 1)],
                arrived, output_relu=False, wants_weight=wanted[begin], input_gradient=of_x, adds=True,
            )  # fmt: skip
            results += [of_weight, of_scale, of_offset, None, None]
        answers = [t if wants else None for t, wants in zip(results, wanted, strict=True)]
        of_shortcut = gradient if ctx.needs_input_grad[2] else None
        return (None, None if of_x is None else of_x.permute(0, 3, 1, 2), of_shortcut, *answers)


def _units_backward(
    trainer: UnitTrainer,
    plan: _Plan,
    rows: Tensor,
    kept: Sequence[Tensor],
    tensors: Sequence[Tensor],
    arrived: Tensor,
    wants_x: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the input, N H W C, by the units and the identity; and of the units' tensors."""
    sizes = _sizes(rows)
    count = sizes[0] * sizes[1] * sizes[2]
    results: list[Tensor | None] = [None] * (_OF_A_UNIT * plan.count)
    z, norm = _arrays(kept, plan.count - 1)
    channels = norm.shape[1]
    value: Any = array(arrived)
    if plan.pool is not None:
        window, pooled = _window(plan.pool, sizes)
        taken_back = torch.empty(trainer.blocked_bytes(channels, sizes), dtype=torch.uint8)
        trainer.pool_backward(
            sizes, channels, pooled=pooled, **window, gradient=value, winners=kept[-1].numpy(),
            input_gradient=taken_back.numpy(),
        )  # fmt: skip
        value = taken_back.numpy()
    sums: Any = np.empty((2, channels), np.float32)
    trainer.gradient_sums(
        sizes, channels, z=z, scale=norm[SCALE], shift=norm[SHIFT], relu=plan.output_relu, mean=norm[MEAN],
        gradient=value, sums=sums,
    )  # fmt: skip
    first = _first_wanted(plan.count, wants_x, wanted)
    of_x: Tensor | None = None
    load: tuple[Any, Any]
    for i in reversed(range(plan.count)):
        if sums is None:  # nothing before is wanted
            break
        at = _OF_A_UNIT * i
        depthwise, pointwise = tensors[at : at + 2]
        z, norm = _arrays(kept, i)
        results[at + 2], results[at + 3], factors = norm_gradients(trainer, plan.norms[i], norm, sums, count)
        if i < first:
            break
        wants_input = wants_x if i == 0 else i > first or _wants_norm(wanted, i - 1)
        source, load, mean, sums = array(rows), (None, None), None, None
        if i > 0:
            source, before = _arrays(kept, i - 1)
            load = before[SCALE], before[SHIFT]
            if wants_input:
                mean, sums = before[MEAN], np.empty((2, before.shape[1]), np.float32)
        input_gradient = torch.empty_like(kept[_KEPT * (i - 1)] if i > 0 else rows) if wants_input else None
        filter_gradient = torch.empty(depthwise.shape)
        weight_gradient = torch.empty(pointwise.shape) if wanted[at + 1] else None
        to_input = None if input_gradient is None else array(input_gradient)
        trainer.backward(
            sizes, source, scale=load[0], shift=load[1], relu=plan.input_relu[i], dilation=plan.dilation,
            filters=_flat(depthwise), weights=matrix(pointwise), z=z, gradient=value, out_scale=norm[SCALE],
            out_shift=norm[SHIFT], out_relu=plan.output_relu and i == plan.count - 1, factors=factors, in_mean=mean,
            residual=array(arrived) if i == 0 and plan.identity and wants_input else None,
            input_gradient=to_input, filter_gradient=_flat(filter_gradient),
            weight_gradient=None if weight_gradient is None else matrix(weight_gradient), sums=sums,
        )  # fmt: skip
        results[at], results[at + 1] = filter_gradient, weight_gradient
        if i == 0:
            of_x = input_gradient
        elif to_input is not None:
            value = to_input
    return of_x, results


def _arrays(kept: Sequence[Tensor], unit: int) -> tuple[Any, Any]:
    """A unit's z and its normalisation."""
    return kept[_KEPT * unit].numpy(), kept[_KEPT * unit + 1].numpy()


def _wants_norm(wanted: Sequence[bool], unit: int) -> bool:
    return wanted[_OF_A_UNIT * unit + 2] or wanted[_OF_A_UNIT * unit + 3]


def _first_wanted(units: int, of_input: bool, wanted: Sequence[bool]) -> int:
    """The first unit whose convolutions the backward pass has to reach."""
    if of_input:
        return 0
    for i in range(units):
        if wanted[_OF_A_UNIT * i] or wanted[_OF_A_UNIT * i + 1]:
            return i
        if _wants_norm(wanted, i):  # the sums of its normalisation come from the next unit's backward pass
            return i + 1
    return units


def _definition(plan: _Plan, x: Tensor, given: Tensor | None, *tensors: Tensor) -> Tensor:
    """What was computed, by PyTorch; running statistics stay as they are."""
    units = []
    for i, norm in enumerate(plan.norms):
        depthwise, pointwise, scale, offset, running_mean, running_variance = tensors[_OF_A_UNIT * i :][:_OF_A_UNIT]
        units.append(
            Unit(
                depthwise=depthwise,
                pointwise=pointwise,
                scale=scale,
                offset=offset,
                running_mean=running_mean,
                running_variance=running_variance,
                gathers=norm.gathers,
                epsilon=norm.epsilon,
                input_relu=plan.input_relu[i],
            )
        )
    shortcut: Shortcut = "input" if plan.identity else given
    if plan.projection is not None:
        shortcut = convolutions.rebuilt(plan.projection, tensors[_OF_A_UNIT * plan.count :])
    return reference.separable_units(
        x, units, dilation=plan.dilation, pool=plan.pool, shortcut=shortcut, output_relu=plan.output_relu
    )


def _sizes(rows: Tensor) -> Sizes:
    return rows.shape[0], rows.shape[1], rows.shape[2]


def _window(pool: PoolSampling, sizes: Sizes) -> tuple[dict[str, Any], Sizes]:
    """The pool's window over maps of `sizes`, and the sizes of what it gives."""
    (height, top), (width, left) = pool.along(sizes[1]), pool.along(sizes[2])
    window = {"stride": pool.stride, "dilation": pool.tap_dilation, "pad_top": top, "pad_left": left}
    return window, (sizes[0], height, width)


def _flat(depthwise: Tensor) -> Any:
    return depthwise.detach().reshape(-1).contiguous().numpy()
