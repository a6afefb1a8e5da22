"""Modules of separable units with their numbers, how they are run, and an oracle that rounds as the kernels do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume
from torch import Tensor

from xception.ops import backend, reference, units
from xception.ops.reference import PoolSampling, Unit

native = pytest.mark.skipif(not backend.native_available(), reason="the extension is not built")

PARAMETERS = ("depthwise", "pointwise", "scale", "offset")
POOLS = {
    "same": PoolSampling(),
    "torch": PoolSampling(same=False),
    "dense": PoolSampling(dense=True),
    "dense_dilated": PoolSampling(same=False, dense=True, dilation=2),
}


def _levels() -> list[tuple[str, str]]:
    """Every (level, type) that trains on this machine; AMX by its emulation too."""
    features = backend.detected_features()
    found = [("scalar", "fp32"), ("scalar", "bf16")]
    for level in ("avx2", "avx512"):
        found += [(level, kind) for kind in ("fp32", "bf16") if level in features]
    needs = (("avx512_bf16", "avx512_bf16"), ("amx_emulated", "avx512"), ("amx_bf16", "amx_bf16"))
    return found + [(level, "bf16") for level, feature in needs if feature in features]


LEVELS = _levels()
at_every_level = pytest.mark.parametrize(("level", "kind"), LEVELS)


@contextmanager
def at_level(level: str) -> Iterator[mock.Mock]:
    """Train with these kernels; what is yielded counts the calls that did."""
    with (
        backend.use_backend("native"),
        mock.patch.object(backend, "kernel_level", return_value=level),
        mock.patch.object(units, "_trainer", wraps=units._trainer) as taken,
    ):
        yield taken


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A module, and its input's sizes."""

    images: int = 2
    height: int = 7
    width: int = 9
    channels: int = 5
    widths: tuple[int, ...] = (6,)
    dilation: int = 1
    input_relu: bool = True
    output_relu: bool = False
    shortcut: str = "none"
    pool: str = "none"
    gathers: bool = True
    momentum: float | None = 0.1
    affine: bool = True
    epsilon: float = 1e-3
    seed: int = 0

    def options(self) -> dict[str, Any]:
        return {"dilation": self.dilation, "pool": POOLS.get(self.pool), "output_relu": self.output_relu}


@dataclass(frozen=True)
class Data:
    """A case's numbers, all of which float32 (maps: bfloat16, where `kind` says so) holds exactly."""

    x: Tensor
    units: list[dict[str, Any]]
    shortcut: Tensor | str | None
    gradient: Tensor
    options: dict[str, Any]


def data_for(case: Case, kind: str = "fp32", *, tame: bool = False) -> Data:
    """`tame`: no value near a kink, but by bad luck; and whole numbers into the first unit's normalisation."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return values.bfloat16().float() if kind == "bf16" else values

    def whole(most: int, *shape: int) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator).float()

    def signs(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1

    made: list[dict[str, Any]] = []
    size = (case.images, case.channels, case.height, case.width)
    x = whole(2, *size) if tame else normal(*size)
    channels = case.channels
    for i, out in enumerate(case.widths):
        last = i == len(case.widths) - 1
        unit: dict[str, Any] = {"input_relu": case.input_relu or i > 0, "momentum": case.momentum}
        unit |= {"gathers": case.gathers, "epsilon": case.epsilon}
        if tame and i == 0:
            unit |= {"depthwise": whole(1, channels, 1, 3, 3), "pointwise": whole(1, out, channels, 1, 1)}
        else:
            unit["depthwise"] = torch.randn((channels, 1, 3, 3), generator=generator) * 0.4
            unit["pointwise"] = torch.randn((out, channels, 1, 1), generator=generator) / channels**0.5
        away = tame and (not last or (case.output_relu and i > 0))
        if away:  # from zero: whole channels are on or off
            unit["scale"] = (torch.rand(out, generator=generator) * 0.2 + 0.1) * signs(out)
            unit["offset"] = (torch.rand(out, generator=generator) + 1.5) * signs(out)
        elif case.affine:
            unit["scale"] = torch.rand(out, generator=generator) + 0.5
            unit["offset"] = torch.randn(out, generator=generator) * 0.3
        spread = 5.0 if tame and i == 0 else 1.0
        unit["running_mean"] = torch.randn(out, generator=generator) * spread
        unit["running_variance"] = (torch.rand(out, generator=generator) + 0.5) * spread**2 * (9 if away else 1)
        made.append(unit)
        channels = out
    shape = reference.max_pool3x3(torch.zeros(1, 1, *size[2:]), POOLS[case.pool]).shape if case.pool != "none" else size
    output = (case.images, channels, *shape[2:])
    shortcut: Tensor | str | None = {"none": None, "input": "input"}.get(case.shortcut)
    if case.shortcut == "tensor":
        shortcut = normal(*output)
    return Data(x, made, shortcut, normal(*output), case.options())


def run(
    function: Callable[..., Tensor], data: Data, dtype: torch.dtype = torch.float32, maps: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output, gradients and running statistics by name; weights and statistics of `dtype`, maps of `maps`."""

    def leaf(value: Any, kind: torch.dtype = dtype) -> Any:
        return value.detach().to(kind, copy=True).requires_grad_() if isinstance(value, Tensor) else value

    x, shortcut = leaf(data.x, maps or dtype), leaf(data.shortcut, maps or dtype)
    made = [{k: leaf(v) if k in PARAMETERS else v for k, v in unit.items()} for unit in data.units]
    for unit in made:
        unit |= {k: unit[k].to(dtype, copy=True) for k in ("running_mean", "running_variance")}
    y = function(x, [Unit(**unit) for unit in made], shortcut=shortcut, **data.options)
    y.backward(data.gradient.to(y.dtype))
    found = {"output": y.detach(), "x": x.grad}
    if isinstance(shortcut, Tensor):
        assert shortcut.grad is not None
        found["shortcut"] = shortcut.grad
    for i, unit in enumerate(made):
        found |= {f"{i}.{k}": unit[k].grad for k in PARAMETERS if k in unit}
        found |= {f"{i}.{k}": unit[k] for k in ("running_mean", "running_variance")}
    assert all(v is not None for v in found.values())
    return found


def run_native(data: Data, level: str, kind: str) -> dict[str, Tensor]:
    with at_level(level) as taken, torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        found = run(units.separable_units, data, maps=torch.bfloat16 if kind == "bf16" else None)
    assert taken.call_args_list == [mock.call(level, kind, torch.get_num_threads())] * 2  # forward and backward
    assert found["output"].dtype == (torch.bfloat16 if kind == "bf16" else torch.float32)
    return found


def run_torch(data: Data, kind: str) -> dict[str, Tensor]:
    with backend.use_backend("reference"), torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        return run(units.separable_units, data, maps=torch.bfloat16 if kind == "bf16" else None)


def distance(found: Tensor, right: Tensor) -> float:
    assert found.shape == right.shape
    assert found.isfinite().all()
    return float((found.double() - right).norm())


# ------------------------------------------------------------------------------------------------------- oracle


class _Rounded(torch.autograd.Function):
    """To bfloat16 and back; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _rounded(x: Tensor) -> Tensor:
    y: Tensor = _Rounded.apply(x)  # type: ignore[no-untyped-call]
    return y


class Oracle:
    """The definition, part by part, rounding what the kernels store (`stores`) and multiply (`multiplies`).

    `kink` becomes the least distance of a value to a ReLU's kink, behind the first unit; `gap` the least difference
    that is not 0 of a pooled window's two largest values.
    """

    def __init__(self, *, stores: bool = False, multiplies: bool = False) -> None:
        self.stores, self.multiplies = stores, multiplies
        self.kink = self.gap = float("inf")

    def __call__(
        self,
        x: Tensor,
        parts: list[Unit],
        *,
        dilation: int,
        pool: PoolSampling | None,
        shortcut: Tensor | str | None,
        output_relu: bool,
    ) -> Tensor:
        y = x
        for i, unit in enumerate(parts):
            if unit.input_relu:
                self.kink = self.kink if i == 0 else min(self.kink, float(y.detach().abs().min()))
                y = F.relu(y)
            y = F.conv2d(y, unit.depthwise, padding=dilation, dilation=dilation, groups=y.shape[1])
            weights = unit.pointwise
            if self.multiplies:
                y, weights = _rounded(y), _rounded(weights)
            y = F.conv2d(y, weights)
            y = _rounded(y) if self.stores else y
            if unit.gathers and unit.momentum is not None:
                self._gather(y, unit)
            mean, variance = (unit.running_mean, unit.running_variance)
            if unit.gathers:
                mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
            assert mean is not None
            assert variance is not None
            y = (y - mean[:, None, None]) / (variance[:, None, None] + unit.epsilon).sqrt()
            y = y if unit.scale is None else y * unit.scale[:, None, None]
            y = y if unit.offset is None else y + unit.offset[:, None, None]
        if pool is not None:
            y = self._pool(y, pool)
        if shortcut is not None:
            y = y + (shortcut if isinstance(shortcut, Tensor) else x)
        if output_relu:
            self.kink = min(self.kink, float(y.detach().abs().min()))
            y = F.relu(y)
        return y

    @torch.no_grad()
    def _gather(self, y: Tensor, unit: Unit) -> None:
        assert unit.running_mean is not None
        assert unit.running_variance is not None
        assert unit.momentum is not None
        unit.running_mean.lerp_(y.mean((0, 2, 3)), unit.momentum)
        unit.running_variance.lerp_(y.var((0, 2, 3)), unit.momentum)

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


def sizes_of(data: Data, oracle: Oracle, right: dict[str, Tensor]) -> dict[str, float]:
    """How large each result is, or what it is the sum of, which may cancel to next to nothing.

    Seen with gradients of other signs; and without the means that normalisation takes from them (the gradient of a
    normalised convolution's weights has no part along the weights: with one channel it vanishes).
    """
    gathered = replace(data, units=[u | {"momentum": 1.0 if u["gathers"] else None} for u in data.units])
    seen = run(oracle, gathered, torch.float64)
    count = data.x.numel() // data.x.shape[1]
    fixed = [
        u
        | {"gathers": False, "running_mean": seen[f"{i}.running_mean"]}
        | {"running_variance": seen[f"{i}.running_variance"] * ((count - 1) / count if u["gathers"] else 1)}
        for i, u in enumerate(data.units)
    ]
    found = {k: float(v.norm()) for k, v in right.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        signs = torch.randint(0, 2, data.gradient.shape, generator=generator) * 2 - 1
        plain = run(oracle, replace(data, units=fixed, gradient=data.gradient * signs), torch.float64)
        found = {k: max(v, float(plain[k].norm())) for k, v in found.items()}
    return found


# What of its size a result may be off in the generated cases: a few roundings for each unit, which add up in maps of
# one pixel or channel. The fixed cases below are held to PyTorch's own error.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}


def check(case: Case, level: str, kind: str, number_of_threads: int) -> None:
    data = data_for(case, kind, tame=kind == "bf16")
    oracle = Oracle()
    if kind == "bf16":
        oracle = Oracle(stores=True, multiplies=level in ("avx512_bf16", "amx_emulated", "amx_bf16"))
    right = run(oracle, data, torch.float64)
    rounds = kind == "bf16" and len(case.widths) > 1
    assume(oracle.kink > (0.02 if rounds else 1e-4) and oracle.gap > 1e-4)
    with threads(number_of_threads):
        found = run_native(data, level, kind)
    sizes = sizes_of(data, oracle, right)
    least = 1e-3 * max(sizes.values())  # a sum may still cancel
    errors = {k: distance(found[k], right[k]) / (sizes[k] + least) for k in right}
    wrong = {k: v for k, v in errors.items() if v > TOLERANCE[kind]}
    assert not wrong, f"{case}: {wrong}"


FIXED = (
    Case(channels=5, widths=(40,)),
    Case(images=3, channels=16, height=19, width=19, widths=(16, 16, 16), shortcut="input"),
    Case(images=4, channels=33, height=8, width=8, widths=(33,), output_relu=True),
    Case(channels=48, height=13, width=12, widths=(80, 80), shortcut="tensor", pool="same"),
    Case(channels=20, height=10, width=10, widths=(24,), pool="dense_dilated", dilation=2),
    Case(images=1, channels=64, height=33, width=40, widths=(70, 64), pool="torch"),
    Case(images=5, channels=200, height=6, width=5, widths=(200,), shortcut="input", affine=False),
    # Strips of rows, and bands of the padded map.
    Case(images=2, channels=17, height=70, width=64, widths=(33, 17), dilation=2, input_relu=False),
    Case(images=33, channels=40, height=3, width=5, widths=(40, 40), gathers=False, output_relu=True),
)


def _leaves(data: Data, wanted: frozenset[str]) -> tuple[Tensor, list[dict[str, Any]], Tensor | str | None]:
    x = data.x.clone().requires_grad_("x" in wanted)
    made = [dict(unit) for unit in data.units]
    for i, unit in enumerate(made):
        for k in PARAMETERS:
            if k in unit:
                unit[k] = unit[k].clone().requires_grad_(f"{i}.{k}" in wanted)
        unit |= {k: unit[k].clone() for k in ("running_mean", "running_variance")}
    shortcut = data.shortcut
    if isinstance(shortcut, Tensor):
        shortcut = shortcut.clone().requires_grad_("shortcut" in wanted)
    return x, made, shortcut
