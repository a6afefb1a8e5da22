"""Modules of separable units, with their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trainer_cases import Data, Function, Numbers, named

from xception.ops import reference
from xception.ops.reference import Convolution, PoolSampling, Shortcut, Unit

POOLS = {
    "same": PoolSampling(),
    "torch": PoolSampling(same=False),
    "dense": PoolSampling(dense=True),
    "dense_dilated": PoolSampling(same=False, dense=True, dilation=2),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A module, and its input's sizes. `shortcut` is one of "none", "input", "tensor" and "convolution"."""

    images: int = 2
    height: int = 7
    width: int = 9
    channels: int = 5
    widths: tuple[int, ...] = (6,)
    dilation: int = 1
    input_relu: bool = True
    output_relu: bool = False
    shortcut: str = "none"
    shortcut_kernel: int = 1
    shortcut_gathers: bool = True
    pool: str = "none"
    gathers: bool = True
    momentum: float | None = 0.1
    affine: bool = True
    epsilon: float = 1e-3
    seed: int = 0

    @property
    def output(self) -> tuple[int, int, int, int]:
        """The output's shape."""
        height, width = self.height, self.width
        if self.pool != "none":
            height, width = reference.max_pool3x3(torch.zeros(1, 1, height, width), POOLS[self.pool]).shape[2:]
        return self.images, (self.channels, *self.widths)[-1], height, width

    def _call(self, function: Function, tensors: dict[str, Tensor], parts: dict[str, dict[str, Any]]) -> Tensor:
        count = len(self.widths)
        made = [Unit(**parts[str(i)], input_relu=self.input_relu or i > 0) for i in range(count)]
        shortcut: Shortcut = "input" if self.shortcut == "input" else tensors.get("shortcut")
        if self.shortcut == "convolution":
            stride = 2 if self.pool in ("same", "torch") else 1
            shortcut = Convolution(**parts["shortcut"], stride=stride, padding=self.shortcut_kernel // 2)
        options = {"dilation": self.dilation, "pool": POOLS.get(self.pool), "output_relu": self.output_relu}
        return function(tensors["x"], made, shortcut=shortcut, **options)


def data_for(case: Case, kind: str = "fp32", *, tame: bool = False) -> Data:
    """`tame`: no value near a kink, but by bad luck; and whole numbers into the first normalisations."""
    numbers = Numbers(case.seed, kind, tame=tame)
    tensors = {"x": numbers.input(case.images, case.channels, case.height, case.width)}
    norm = {"gathers": case.gathers, "momentum": case.momentum, "epsilon": case.epsilon}
    norms = {}
    spread = 5.0 if tame else 1.0  # of sums of whole numbers
    channels = case.channels
    for i, out in enumerate(case.widths):
        last = i == len(case.widths) - 1
        if i == 0:
            unit = {"depthwise": numbers.weights(channels, 1, 3, 3), "pointwise": numbers.weights(out, channels, 1, 1)}
        else:
            unit = {"depthwise": numbers.normal(channels, 1, 3, 3) * 0.4}
            unit["pointwise"] = numbers.normal(out, channels, 1, 1) / channels**0.5
        away = tame and (not last or (case.output_relu and i > 0))
        unit |= numbers.norm(out, affine=case.affine, away=away, spread=spread if i == 0 else 1.0)
        tensors |= named(str(i), unit)
        norms[str(i)] = norm
        channels = out
    if case.shortcut == "tensor":
        tensors["shortcut"] = numbers.gradient(*case.output)
    if case.shortcut == "convolution":
        weight = numbers.weights(channels, case.channels, case.shortcut_kernel, case.shortcut_kernel)
        other = {"weight": weight} | numbers.norm(channels, affine=case.affine, spread=spread)
        tensors |= named("shortcut", other)
        norms["shortcut"] = norm | {"gathers": case.shortcut_gathers}
    return Data("separable_units", tensors, norms, numbers.gradient(*case.output), case._call)


FIXED = {
    "one": Case(channels=5, widths=(40,)),
    "three": Case(images=3, channels=16, height=19, width=19, widths=(16, 16, 16), shortcut="input"),
    "relu": Case(images=4, channels=33, height=8, width=8, widths=(33,), output_relu=True),
    "pool": Case(channels=48, height=13, width=12, widths=(80, 80), shortcut="tensor", pool="same"),
    "dense": Case(channels=20, height=10, width=10, widths=(24,), pool="dense_dilated", dilation=2),
    "one image": Case(images=1, channels=64, height=33, width=40, widths=(70, 64), pool="torch"),
    "plain norm": Case(images=5, channels=200, height=6, width=5, widths=(200,), shortcut="input", affine=False),
    # Strips of rows, and bands of the padded map.
    "strips": Case(images=2, channels=17, height=70, width=64, widths=(33, 17), dilation=2, input_relu=False),
    "frozen": Case(images=33, channels=40, height=3, width=5, widths=(40, 40), gathers=False, output_relu=True),
    # Shortcuts that are convolutions.
    "halving": Case(channels=17, height=13, width=12, widths=(40, 47), shortcut="convolution", pool="same", seed=1),
    "halving, torch": Case(channels=48, height=9, width=33, widths=(80,), shortcut="convolution", pool="torch"),
    "projecting": Case(
        channels=33, height=8, width=9, widths=(20, 16), dilation=3, shortcut="convolution", shortcut_gathers=False
    ),
    "dense, projecting": Case(
        images=3, channels=20, widths=(24,), pool="dense_dilated", dilation=2, shortcut="convolution", gathers=False
    ),
    "wide shortcut": Case(
        channels=18, height=30, width=31, widths=(35, 21), pool="same", shortcut="convolution", shortcut_kernel=3
    ),
}
