"""Regular convolutions with batch normalisation, for training: the stems', and the shortcuts' of separable modules.

`normalised_conv2d` is the operation by itself, whose definition is `reference.normalised_conv2d`; `forward` and
`backward` are its two passes for those who fuse it with something else. Compiled: native/src/train_conv.cpp, where the
windows are a matrix that is multiplied as it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xception.ops import reference
from xception.ops.reference import Convolution as Convolution
from xception.ops.trainer import (
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
    covers,
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

if TYPE_CHECKING:
    from xception.ops.backend import UnitTrainer

_MOST_NUMBERS = 4096  # in a window of more than a pixel: `kMostDepth` of the extension


@dataclass(frozen=True)
class ConvPlan:
    """What of a convolution is no tensor."""

    stride: int
    padding: int
    norm: NormPlan

    @classmethod
    def of(cls, convolution: Convolution) -> ConvPlan:
        return cls(convolution.stride, convolution.padding, NormPlan.of(convolution))

    def window(self, weight: Tensor, sizes: Sizes) -> dict[str, Any]:
        """As the extension takes it, for maps of `sizes`."""
        kernel = weight.shape[-1]
        height, width = ((size + 2 * self.padding - kernel) // self.stride + 1 for size in sizes[1:])
        return {
            "output": (sizes[0], height, width), "kernel": kernel, "stride": self.stride, "pad_top": self.padding,
            "pad_left": self.padding,
        }  # fmt: skip


def normalised_conv2d(x: Tensor, convolution: Convolution, *, output_relu: bool = False) -> Tensor:
    """N C H W -> N C' H' W'; see `reference.normalised_conv2d`, whose signature this is.

    The compiled path is taken as for `units.separable_units`, for square windows; elsewhere it is the definition.
    """
    if not (covers(x) and trains(x, [convolution]) and is_covered(x, convolution)):
        return reference.normalised_conv2d(x, convolution, output_relu=output_relu)
    x = as_map(x)
    tensors = [convolution.weight, *norm_tensors(convolution)]
    out, norm = _NormalisedConv.apply(ConvPlan.of(convolution), output_relu, x, *tensors)
    update_running(convolution, norm, out.numel() // out.shape[1])
    result: Tensor = out
    return result


def is_covered(x: Tensor, convolution: Convolution) -> bool:
    """Whether the compiled kernels know this convolution of this input."""
    if convolution.weight.dim() != 4 or convolution.stride < 1 or convolution.padding < 0:
        return False
    channels, *kernel = convolution.weight.shape[1:]
    if kernel[0] != kernel[1] or channels != x.shape[1] or kernel[0] > 16 or convolution.stride > 16:
        return False
    if kernel[0] == 1 and convolution.padding != 0:
        return False
    if kernel[0] > 1 and (channels * kernel[0] ** 2 > _MOST_NUMBERS or convolution.padding >= kernel[0]):
        return False
    sizes = [convolution.along(size) for size in x.shape[2:]]
    if not fits(x.shape[0], convolution.weight.shape[0], sizes[0], sizes[1]):
        return False
    # One pixel has no variance: PyTorch refuses it, and so does the definition.
    return min(sizes) >= 1 and not (convolution.gathers and x.shape[0] * sizes[0] * sizes[1] == 1)


def forward(
    trainer: UnitTrainer, rows: Tensor, plan: ConvPlan, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """From N H W C: the output before its normalisation, in channel blocks, and the normalisation."""
    weight, *of_norm = tensors
    assert weight is not None
    sizes = (rows.shape[0], rows.shape[1], rows.shape[2])
    window = plan.window(weight, sizes)
    z = torch.empty(trainer.blocked_bytes(weight.shape[0], window["output"]), dtype=torch.uint8)
    kept = torch.empty(NORM_ROWS, weight.shape[0])
    norm = kept.numpy()
    trainer.convolve(
        sizes, array(rows), **window, weights=_by_windows(weight), z=z.numpy(), mean=norm[MEAN],
        variance=norm[VARIANCE],
    )  # fmt: skip
    normalise(trainer, plan.norm, norm, of_norm)
    return z, kept


def backward(
    trainer: UnitTrainer,
    rows: Tensor,
    plan: ConvPlan,
    weight: Tensor,
    kept: Sequence[Tensor],
    arrived: Tensor,
    *,
    output_relu: bool,
    wants_weight: bool,
    input_gradient: Tensor | None,
    adds: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of weight, gamma and beta from that of the output, N H' W' C'; `kept` is what `forward` gave.

    The input's is written into `input_gradient`, or added to what is there; None: it is not wanted.
    """
    z, norm = kept[0].numpy(), kept[1].numpy()
    sizes = (rows.shape[0], rows.shape[1], rows.shape[2])
    window = plan.window(weight, sizes)
    out = window["output"]
    sums = np.empty((2, norm.shape[1]), np.float32)
    gradient = array(arrived)
    trainer.gradient_sums(
        out, norm.shape[1], z=z, scale=norm[SCALE], shift=norm[SHIFT], relu=output_relu, mean=norm[MEAN],
        gradient=gradient, sums=sums,
    )  # fmt: skip
    of_scale, of_offset, factors = norm_gradients(trainer, plan.norm, norm, sums, out[0] * out[1] * out[2])
    of_weight = torch.empty(weight.permute(0, 2, 3, 1).shape) if wants_weight else None
    if wants_weight or input_gradient is not None:
        trainer.convolve_backward(
            sizes, array(rows), **window, weights=_by_windows(weight), z=z, gradient=gradient,
            out_scale=norm[SCALE], out_shift=norm[SHIFT], out_relu=output_relu, factors=factors,
            input_gradient=None if input_gradient is None else array(input_gradient), adds=adds,
            weight_gradient=None if of_weight is None else matrix(of_weight),
        )  # fmt: skip
    return None if of_weight is None else of_weight.permute(0, 3, 1, 2).contiguous(), of_scale, of_offset


class _NormalisedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: ConvPlan, output_relu: bool, x: Tensor, *tensors: Tensor | None) -> Any:
        trainer = trainer_for(x)
        rows = channels_last(x)
        weight = tensors[0]
        assert weight is not None
        z, kept = forward(trainer, rows, plan, tensors)
        norm = kept.numpy()
        out = plan.window(weight, (rows.shape[0], rows.shape[1], rows.shape[2]))["output"]
        result = rows.new_empty(*out, norm.shape[1])
        trainer.finish(
            out, norm.shape[1], z=z.numpy(), scale=norm[SCALE], shift=norm[SHIFT], relu=output_relu, residual=None,
            residual_scale=None, residual_shift=None, output=array(result),
        )  # fmt: skip
        ctx.plan, ctx.output_relu = plan, output_relu
        ctx.save_for_backward(x, z, kept, *tensors)
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        return result.permute(0, 3, 1, 2), kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Tensor | None) -> Any:
        if gradient is None:
            return (None,) * len(ctx.needs_input_grad)
        plan: ConvPlan = ctx.plan
        x, *saved = ctx.saved_tensors
        kept, tensors = saved[:2], saved[2:]
        if needs_definition(gradient):

            def definition() -> Tensor:
                return reference.normalised_conv2d(x, rebuilt(plan, tensors), output_relu=ctx.output_relu)

            return (None, None, *definition_gradients(definition, x, gradient, [x, *tensors]))
        trainer = trainer_for(x)
        rows = channels_last(x)
        of_x = torch.empty_like(rows) if ctx.needs_input_grad[2] else None
        of_weight, of_scale, of_offset = backward(
            trainer, rows, plan, tensors[0], kept, channels_last(gradient.to(rows.dtype)), output_relu=ctx.output_relu,
            wants_weight=ctx.needs_input_grad[3], input_gradient=of_x, adds=False,
        )  # fmt: skip
        found = [None if of_x is None else of_x.permute(0, 3, 1, 2), of_weight, of_scale, of_offset, None, None]
        wanted = ctx.needs_input_grad[2:]
        return (None, None, *(t if wants else None for t, wants in zip(found, wanted, strict=True)))


def rebuilt(plan: ConvPlan, tensors: Sequence[Tensor | None]) -> Convolution:
    """The convolution of which these are the plan and the tensors; its running statistics stay as they are."""
    weight, scale, offset, running_mean, running_variance = tensors
    assert weight is not None
    return Convolution(
        weight=weight, stride=plan.stride, padding=plan.padding, scale=scale, offset=offset,
        running_mean=running_mean, running_variance=running_variance, gathers=plan.norm.gathers,
        epsilon=plan.norm.epsilon,
    )  # fmt: skip


def _by_windows(weight: Tensor) -> Any:
    """C' C k k as [C'][k][k][C], flat behind the first."""
    return matrix(weight.detach().permute(0, 2, 3, 1))
