"""What the compiled operations of training share: when they may run, their arrays, batch normalisation's arithmetic.

A normalisation is kept as rows of C' numbers, `MEAN`, `VARIANCE`, `SCALE` and `SHIFT`: y = z * scale + shift, where
scale = gamma / sqrt(variance + epsilon) and shift = beta - mean * scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from xception.ops import backend
from xception.ops.openmp import torch_openmp
from xception.ops.reference import Normalised

if TYPE_CHECKING:
    from xception.ops.backend import UnitTrainer

Sizes = tuple[int, int, int]  # images, height, width

MEAN, VARIANCE, SCALE, SHIFT = range(4)
NORM_ROWS = 4

MAP_TYPES: dict[torch.dtype, backend.Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def covers(x: Tensor) -> bool:
    """Whether the compiled path may be taken for this input now, whatever the operation is."""
    return (
        type(x) in (Tensor, nn.Parameter)  # fake tensors say that they are on the CPU, too
        and x.is_cpu
        and x.dim() == 4
        and x.numel() > 0
        and fits(x.shape[0], x.shape[1], x.shape[2], x.shape[3])
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None  # grad, vmap and the like
        and forward_ad._current_level < 0
        and map_type(x) is not None
        and backend.active_backend() == "native"
    )


def fits(images: int, channels: int, height: int, width: int) -> bool:
    """Whether the extension takes maps of this size."""
    few = images <= 1 << 20 and channels <= 1 << 16 and max(height, width) <= 1 << 14
    return few and images * height * width <= 1 << 28


def map_type(x: Tensor) -> torch.dtype | None:
    """Of the maps between operations: autocast's, or the input's; None where there are no kernels for it."""
    if torch.is_autocast_enabled("cpu"):
        wanted = torch.get_autocast_dtype("cpu")
        return wanted if wanted == torch.bfloat16 and x.dtype in MAP_TYPES else None
    return x.dtype if x.dtype == torch.float32 else None


def as_map(x: Tensor) -> Tensor:
    """`x` in the type of maps: under autocast bfloat16."""
    return x.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else x


def trains(x: Tensor, normalised: Sequence[Normalised]) -> bool:
    """Whether gradients are wanted or statistics gathered, by float32 tensors on the CPU, all there and of one size."""
    gathers = any(each.gathers for each in normalised)
    given = [x, *(t for each in normalised for t in each.parameters())]
    if not gathers and not (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return False
    if not all(t.dtype == torch.float32 and t.is_cpu for each in normalised for t in each.tensors()):
        return False
    return all(_is_whole(each) for each in normalised)


def _is_whole(normalised: Normalised) -> bool:
    running = [t for t in (normalised.running_mean, normalised.running_variance) if t is not None]
    of_channels = [t for t in (normalised.scale, normalised.offset, *running) if t is not None]
    return (normalised.gathers or len(running) == 2) and all(t.shape == (normalised.channels,) for t in of_channels)


def trainer_for(maps: Tensor) -> UnitTrainer:
    """The kernels for the type of these maps, on as many threads as PyTorch has."""
    kind = MAP_TYPES[maps.dtype]
    return trainer(backend.training_level(kind), kind, torch.get_num_threads())


@lru_cache(maxsize=16)
def trainer(level: str, kind: backend.Precision, threads: int) -> UnitTrainer:
    """One for each level, type and number of threads: it keeps its memory from call to call."""
    return backend.new_unit_trainer(level, kind, threads, torch_openmp())


def channels_last(x: Tensor) -> Tensor:
    """N C H W as contiguous N H W C."""
    return x.detach().permute(0, 2, 3, 1).contiguous()


def array(rows: Tensor) -> Any:
    """As NumPy has it, which knows no bfloat16."""
    return rows.view(torch.int16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()


def vector(values: Tensor | None) -> Any:
    """One number a channel, as NumPy has it."""
    return None if values is None else values.detach().contiguous().numpy()


def matrix(weights: Tensor) -> Any:
    """Weights of any shape as [outputs][all the others]."""
    return weights.detach().reshape(weights.shape[0], -1).contiguous().numpy()


# ----------------------------------------------------------------------------------------------- normalisation


@dataclass(frozen=True)
class NormPlan:
    """What of a normalisation is no tensor."""

    gathers: bool
    epsilon: float

    @classmethod
    def of(cls, given: Normalised) -> NormPlan:
        return cls(given.gathers, given.epsilon)


def norm_tensors(given: Normalised) -> list[Tensor | None]:
    """In the order in which `normalise` takes them. Running statistics are there where it normalises by them:
    others change while the tensors are kept for the backward pass."""
    running = [None, None] if given.gathers else [given.running_mean, given.running_variance]
    return [given.scale, given.offset, *running]


def normalise(trainer: UnitTrainer, plan: NormPlan, norm: Any, tensors: Sequence[Tensor | None]) -> None:
    """Complete `norm`, whose first rows are the batch's: running statistics take their place if it gathers none."""
    gamma, beta, running_mean, running_variance = (vector(t) for t in tensors)
    if not plan.gathers:
        norm[MEAN], norm[VARIANCE] = running_mean, running_variance
    trainer.normalise(norm, gamma=gamma, beta=beta, epsilon=plan.epsilon)


def norm_gradients(
    trainer: UnitTrainer, plan: NormPlan, norm: Any, sums: Any, pixels: int
) -> tuple[Tensor, Tensor, Any]:
    """Gradients of gamma and beta, and the factors (3 x C') by which the gradient of z follows from that of y.

    `sums` (2 x C') are of the gradient g of y, and of g * (z - mean). Of the batch's own statistics, with
    inverse = 1 / sqrt(variance + epsilon)::

        gradient of z = scale * (g - mean of g - (z - mean) * inverse * mean of (g * (z - mean) * inverse))
    """
    channels = norm.shape[1]
    gradients = torch.empty(2, channels)
    factors = np.empty((3, channels), np.float32)
    trainer.norm_gradients(
        norm, epsilon=plan.epsilon, pixels=pixels if plan.gathers else 0, sums=sums, gradients=gradients.numpy(),
        factors=factors,
    )  # fmt: skip
    of_scale, of_offset = gradients.unbind()
    return of_scale, of_offset, factors


def update_running(given: Normalised, norm: Tensor, count: int) -> None:
    """Running statistics as PyTorch has them: the variance's is of the sample, divided by count - 1."""
    if not given.gathers or given.momentum is None:
        return
    # By NumPy, whose operations on so few numbers take a fifth of PyTorch's time.
    of_batch, share = norm.numpy(), np.float32(given.momentum)
    found = (of_batch[MEAN], of_batch[VARIANCE] * np.float32(count / (count - 1)))
    for running, value in zip((given.running_mean, given.running_variance), found, strict=True):
        if running is not None:
            kept = running.detach().numpy()
            kept *= 1 - share
            kept += value * share
            torch.autograd.graph.increment_version(running)


# ------------------------------------------------------------------------------------- gradients of gradients


def needs_definition(gradient: Tensor) -> bool:
    """Whether the backward pass is to be differentiated itself (`create_graph`), or has several gradients at once."""
    stands_for_many = not torch._C._dispatch_keys(gradient).has(torch._C.DispatchKey.CPU)
    return torch.is_grad_enabled() or stands_for_many


def definition_gradients(
    definition: Callable[[], Tensor], maps: Tensor, gradient: Tensor, inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """PyTorch's, of the definition, which can be differentiated themselves. None where none is wanted."""
    graph = torch.is_grad_enabled()
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=maps.dtype == torch.bfloat16):
        found = iter(torch.autograd.grad(definition(), wanted, gradient, create_graph=graph, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
