"""An oracle that rounds as the kernels that train do, and the check of generated cases against it.

In bfloat16 a pixel near a ReLU's kink, or two that are nearly a pool's maximum, may fall on either side of it, in any
implementation. So generated cases keep away from both (or have whole numbers, which are exact), and the oracle rounds
where the kernels round; on what is left, errors are small.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from torch import Tensor
from trainer_cases import Data, Function, distance, run, run_native, run_torch, threads

from xception.ops.reference import Convolution, Normalised, PoolSampling, Shortcut, Unit


class _Rounded(torch.autograd.Function):
    """To bfloat16 and back; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _rounded(x: Tensor) -> Tensor:
    y: Tensor = _Rounded.apply(x)
    return y


class Oracle:
    """The definitions, part by part, rounding what the kernels store (`stores`) and multiply (`multiplies`).

    `kink` becomes the least distance of a value to a ReLU's kink, behind the first unit; `gap` the least difference
    that is not 0 of a pooled window's two largest values.
    """

    def __init__(self, *, stores: bool = False, multiplies: bool = False) -> None:
        self.stores, self.multiplies = stores, multiplies
        self.kink = self.gap = float("inf")

    def normalised_conv2d(self, x: Tensor, convolution: Convolution, *, output_relu: bool = False) -> Tensor:
        z = self._product(x, convolution.weight, convolution.stride, convolution.padding)
        y = self._normalised(z, convolution)
        return self._relu(y) if output_relu else y

    def separable_units(
        self,
        x: Tensor,
        parts: list[Unit],
        *,
        dilation: int = 1,
        pool: PoolSampling | None = None,
        shortcut: Shortcut = None,
        output_relu: bool = False,
    ) -> Tensor:
        y = x
        for i, unit in enumerate(parts):
            if unit.input_relu:
                y = self._relu(y) if i > 0 else F.relu(y)
            y = F.conv2d(y, unit.depthwise, padding=dilation, dilation=dilation, groups=y.shape[1])
            y = self._normalised(self._product(y, unit.pointwise), unit)
        if pool is not None:
            y = self._pool(y, pool)
        if isinstance(shortcut, Convolution):
            y = y + self.normalised_conv2d(x, shortcut)
        elif shortcut is not None:
            y = y + (shortcut if isinstance(shortcut, Tensor) else x)
        return self._relu(y) if output_relu else y

    def _product(self, y: Tensor, weights: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        if self.multiplies:
            y, weights = _rounded(y), _rounded(weights)
        z = F.conv2d(y, weights, stride=stride, padding=padding)
        return _rounded(z) if self.stores else z

    def _normalised(self, z: Tensor, norm: Normalised) -> Tensor:
        mean, variance = norm.running_mean, norm.running_variance
        if norm.gathers:
            if norm.momentum is not None and mean is not None and variance is not None:
                with torch.no_grad():
                    mean.lerp_(z.mean((0, 2, 3)), norm.momentum)
                    variance.lerp_(z.var((0, 2, 3)), norm.momentum)
            mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
        assert mean is not None
        assert variance is not None
        y = (z - mean[:, None, None]) / (variance[:, None, None] + norm.epsilon).sqrt()
        y = y if norm.scale is None else y * norm.scale[:, None, None]
        return y if norm.offset is None else y + norm.offset[:, None, None]

    def _relu(self, y: Tensor) -> Tensor:
        self.kink = min(self.kink, float(y.detach().abs().min()))
        return F.relu(y)

    def _pool(self, y: Tensor, pool: PoolSampling) -> Tensor:
        """The largest of nine shifted maps, the first of equal ones."""
        (height, top), (width, left) = (pool.along(size) for size in y.shape[2:])
        s, d = pool.stride, pool.tap_dilation
        bottom = max((height - 1) * s + 2 * d + 1 - top - y.shape[2], 0)
        right = max((width - 1) * s + 2 * d + 1 - left - y.shape[3], 0)
        padded = F.pad(y, (left, right, top, bottom), value=-torch.inf)
        taps = [
            padded[:, :, ky * d : ky * d + (height - 1) * s + 1 : s, kx * d : kx * d + (width - 1) * s + 1 : s]
            for ky, kx in itertools.product(range(3), range(3))
        ]
        values = torch.stack(taps, -1)
        best = values.detach().topk(2).values
        gaps = (best[..., 0] - best[..., 1])[best[..., 0] > best[..., 1]]
        self.gap = min([self.gap, *gaps.flatten().tolist()])
        first = (values.detach() == best[..., :1]).int().argmax(-1, keepdim=True)
        return values.gather(-1, first)[..., 0]


def sizes_of(data: Data, oracle: Function, right: dict[str, Tensor]) -> dict[str, float]:
    """How large each result is, or what it is the sum of, which may cancel to next to nothing.

    Seen with gradients of other signs; and without the means that normalisation takes from them (the gradient of a
    normalised convolution's weights has no part along the weights: with one channel it vanishes).
    """
    norms = {part: n | {"momentum": 1.0 if n["gathers"] else None} for part, n in data.norms.items()}
    seen = run(oracle, replace(data, norms=norms), torch.float64)
    constant = dict(data.tensors)
    for part, norm in data.norms.items():
        pixels = data.gradient if part in ("shortcut", "conv") else data.tensors["x"]
        count = pixels.numel() // pixels.shape[1]
        biased = (count - 1) / count if norm["gathers"] else 1
        constant[f"{part}.running_mean"] = seen[f"{part}.running_mean"]
        constant[f"{part}.running_variance"] = seen[f"{part}.running_variance"] * biased
    fixed = replace(data, tensors=constant, norms={p: n | {"gathers": False} for p, n in data.norms.items()})
    found = {name: float(value.norm()) for name, value in right.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        signs = torch.randint(0, 2, data.gradient.shape, generator=generator) * 2 - 1
        plain = run(oracle, replace(fixed, gradient=data.gradient * signs), torch.float64)
        found = {name: max(size, float(plain[name].norm())) for name, size in found.items()}
    return found


# What of its size a result may be off in the generated cases: a few roundings for each part, which add up in maps of
# one pixel or channel. The fixed cases are held to PyTorch's own error.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}
LEAST = {"fp32": 0.1, "bf16": 1e-3}  # of the largest result: a sum of such terms may cancel to next to nothing


def check(data: Data, level: str, kind: str, number_of_threads: int, *, kink: float) -> None:
    """`kink`: how near a value may come to a ReLU's."""
    rounding = Oracle()
    if kind == "bf16":
        rounding = Oracle(stores=True, multiplies=level in ("avx512_bf16", "amx_emulated", "amx_bf16"))
    oracle: Function = getattr(rounding, data.name)
    right = run(oracle, data, torch.float64)
    assume(rounding.kink > kink and rounding.gap > 1e-4)
    with threads(number_of_threads):
        found = run_native(data, level, kind)
    sizes = sizes_of(data, oracle, right)
    least = LEAST[kind] * max(sizes.values())
    errors = {name: distance(found[name], value) / (sizes[name] + least) for name, value in right.items()}
    wrong = {name: error for name, error in errors.items() if error > TOLERANCE[kind]}
    if wrong and kind == "fp32":  # a case may be ill-conditioned, to PyTorch as to us
        own = run_torch(data, kind)
        wrong = {k: e for k, e in wrong.items() if distance(found[k], right[k]) > 4 * distance(own[k], right[k])}
    assert not wrong, wrong


def assert_the_oracle_is_the_definition(data: Data) -> None:
    right = run(data.definition, data, torch.float64)
    for name, value in run(getattr(Oracle(), data.name), data, torch.float64).items():
        torch.testing.assert_close(value, right[name], rtol=1e-7, atol=1e-7, msg=name)
