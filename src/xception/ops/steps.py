"""Steps of optimisers over many tensors in one pass of compiled code: each array is read and written once.

The definitions are PyTorch's own, in `training.optimizers`; who takes this path instead, and when, is decided in
`training.update`. The compiled code is given addresses: `Rows` is the one place where they are made, and where each
array is held against its weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xception.ops import backend

if TYPE_CHECKING:
    from xception.ops.backend import Optimiser

Rule = Literal["average", "sgd", "rmsprop", "adamw"]


class Unsuitable(Exception):
    """An array that the compiled steps do not take; the message says what it is."""


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """What a step reads and writes for one parameter; `first` and `second` are what the rule has gathered."""

    weight: Tensor
    gradient: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None
    average: Tensor | None = None


class Rows:
    """The addresses of parameters' arrays, each of them checked; raises `Unsuitable`.

    All are float32, on the CPU, dense, of their weight's shape and layout in memory.
    """

    def __init__(self, arrays: Iterable[Arrays]) -> None:
        self._kept = list(arrays)  # the memory stays as long as its address is known
        numbers = [_row(of) for of in self._kept]
        self._numbers: NDArray[np.uint64] = np.array(numbers, np.uint64).reshape(len(numbers), 6)

    def step(
        self,
        rule: Rule,
        *,
        nesterov: bool = False,
        momentum: bool = False,
        begins: bool = False,
        decays: bool = False,
        scale: float = 1.0,
        rate: float = 0.0,
        decay: float = 0.0,
        first: float = 0.0,
        second: float = 0.0,
        rest: float = 0.0,
        epsilon: float = 0.0,
        correction: float = 1.0,
        share: float = 0.0,
    ) -> None:
        """One step of `rule`, on as many threads as PyTorch's; the coefficients are those of native/src/optimise.hpp.

        The result does not depend on the number of threads. Gradients stay as they are. Raises ValueError where an
        array is missing that the rule needs.
        """
        optimiser = _optimiser(torch.get_num_threads(), backend.vector_level())
        optimiser.step(
            self._numbers,
            rule,
            nesterov=nesterov,
            momentum=momentum,
            begins=begins,
            decays=decays,
            scale=scale,
            rate=rate,
            decay=decay,
            first=first,
            second=second,
            rest=rest,
            epsilon=epsilon,
            correction=correction,
            share=share,
        )
        written = [t for of in self._kept for t in (of.weight, of.first, of.second, of.average) if t is not None]
        # As every change in place: whoever kept something that was made of the old numbers can see it.
        torch.autograd.graph.increment_version(written)


@lru_cache(maxsize=4)
def _optimiser(threads: int, level: str) -> Optimiser:
    """`level` is the one that the backend takes now: another makes another object."""
    return backend.new_optimiser(threads)


def _row(of: Arrays) -> list[int]:
    weight, shape = of.weight, of.weight.shape
    channels_last = not weight.is_contiguous()
    addresses = [0 if t is None else _address(t, weight, shape, channels_last) for t in _arrays(of)]
    return [*addresses, weight.numel()]


def _arrays(of: Arrays) -> tuple[Tensor | None, ...]:
    return of.weight, of.gradient, of.first, of.second, of.average


def _address(array: Tensor, weight: Tensor, shape: torch.Size, channels_last: bool) -> int:
    if type(array) not in (Tensor, nn.Parameter):
        raise Unsuitable(f"a {type(array).__name__} is no plain tensor")
    if array.dtype != torch.float32 or not array.is_cpu or array.layout != torch.strided or array.is_neg():
        raise Unsuitable(f"expected float32 on the CPU, got {array.dtype} on {array.device}, {array.layout}")
    if array.is_inference():
        raise Unsuitable("a tensor that was made in inference mode")
    if array.shape != shape:
        raise Unsuitable(f"expected the weight's shape {tuple(shape)}, got {tuple(array.shape)}")
    if channels_last:
        dense = array.dim() == 4 and array.is_contiguous(memory_format=torch.channels_last)
    else:
        dense = array.is_contiguous()
    if not dense:
        raise Unsuitable(f"an array of strides {array.stride()} beside a weight of strides {weight.stride()}")
    return array.data_ptr()
