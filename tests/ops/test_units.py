"""Units that train in the compiled extension, against their definition in float64: every level, option and odd size.

In bfloat16 a pixel near a ReLU's kink, or two that are nearly a pool's maximum, may fall on either side of it, in any
implementation. So the generated cases keep away from both (or have whole numbers, which are exact), and their oracle
rounds where the kernels round; on what is left, errors are small. The fixed cases are of any kind, and their errors are
held against PyTorch's own.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
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


ODD = st.sampled_from([1, 3, 5, 15, 16, 17, 32, 33, 47])


@st.composite
def cases(draw: st.DrawFn, kind: str) -> Case:
    images, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    if draw(st.integers(0, 7)) == 0:
        height = width = 1
    gathers = draw(st.booleans()) if images * height * width > 5 else False
    widths = tuple(draw(st.lists(ODD, min_size=1, max_size=4)))
    channels = draw(ODD)
    # In bfloat16 the winners are the oracle's only where its numbers are exact: behind one unit.
    pool = draw(st.sampled_from(["none", *POOLS])) if kind == "fp32" or len(widths) == 1 else "none"
    shortcut = draw(st.sampled_from(["none", "input", "tensor"]))
    if shortcut == "input" and pool in ("none", "dense", "dense_dilated"):
        channels = widths[-1]
    elif shortcut == "input":
        shortcut = "none"
    return Case(
        images=images,
        height=height,
        width=width,
        channels=channels,
        widths=widths,
        dilation=draw(st.integers(1, 3)),
        input_relu=draw(st.booleans()),
        output_relu=pool == shortcut == "none" and draw(st.booleans()),
        shortcut=shortcut,
        pool=pool,
        gathers=gathers,
        momentum=draw(st.sampled_from([0.1, 0.7, None])),
        affine=draw(st.booleans()),
        epsilon=draw(st.sampled_from([1e-3, 1e-5])),
        seed=draw(st.integers(0, 10**6)),
    )


@native
@at_every_level
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(draw=st.data(), count=st.integers(1, 3))
def test_generated(level: str, kind: str, draw: st.DataObject, count: int) -> None:
    check(draw.draw(cases(kind)), level, kind, count)


@native
@pytest.mark.slow
@pytest.mark.timeout(3600)
@at_every_level
@settings(max_examples=3000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(draw=st.data(), count=st.integers(1, 3))
def test_generated_at_length(level: str, kind: str, draw: st.DataObject, count: int) -> None:
    check(draw.draw(cases(kind)), level, kind, count)


@settings(max_examples=40)
@given(case=cases("fp32"))
@example(case=Case(pool="dense_dilated", height=2, width=1, gathers=False))
def test_the_oracle_is_the_definition(case: Case) -> None:
    data = data_for(case)
    right = run(reference.separable_units, data, torch.float64)
    for name, value in run(Oracle(), data, torch.float64).items():
        torch.testing.assert_close(value, right[name], rtol=1e-7, atol=1e-7, msg=name)


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


@native
@at_every_level
@pytest.mark.parametrize("case", FIXED, ids=range(len(FIXED)))
def test_errors_are_of_the_size_of_torchs_own(case: Case, level: str, kind: str) -> None:
    """Against float64; PyTorch, in the same precision, is given the same numbers."""
    data = data_for(case, kind)
    right = run(reference.separable_units, data, torch.float64)
    own, found = run_torch(data, kind), run_native(data, level, kind)
    floor = 1e-6 if kind == "fp32" else 4e-3
    for name, value in right.items():
        bound = 3 * distance(own[name], value) + floor * float(value.norm())
        assert distance(found[name], value) <= bound, name


def test_gradients_of_the_definition() -> None:
    """PyTorch's numerical check, in float64."""
    for case in (
        Case(images=2, height=3, width=4, channels=3, widths=(2, 3), shortcut="input", momentum=None),
        Case(images=2, height=3, width=5, channels=2, widths=(3,), shortcut="tensor", pool="same", momentum=None),
        Case(images=2, height=3, width=3, channels=2, widths=(3,), output_relu=True, gathers=False, dilation=2),
    ):
        data = data_for(case)
        names = [(i, k) for i, unit in enumerate(data.units) for k in PARAMETERS if k in unit]
        leaves = [data.x, *(data.units[i][k] for i, k in names)]
        leaves += [data.shortcut] if isinstance(data.shortcut, Tensor) else []

        def call(x: Tensor, *rest: Tensor, data: Data = data, names: Any = names) -> Tensor:
            made = [dict(unit) for unit in data.units]
            for unit in made:
                unit |= {k: unit[k].double() for k in ("running_mean", "running_variance")}
            for (i, k), value in zip(names, rest, strict=False):
                made[i][k] = value
            shortcut = rest[-1] if isinstance(data.shortcut, Tensor) else data.shortcut
            return reference.separable_units(x, [Unit(**u) for u in made], shortcut=shortcut, **data.options)  # type: ignore[arg-type]

        assert torch.autograd.gradcheck(call, [t.double().requires_grad_() for t in leaves])


# ------------------------------------------------------------------------------------------- what is asked for


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


@native
@pytest.mark.parametrize(
    "case",
    [
        Case(channels=6, widths=(6, 6), shortcut="input", height=4, width=5),
        Case(channels=6, widths=(7, 5), shortcut="tensor", pool="same", height=4, width=5),
        Case(channels=6, widths=(7, 5), output_relu=True, gathers=False, height=4, width=5),
    ],
    ids=["input", "pool", "relu"],
)
def test_every_subset_of_gradients(case: Case) -> None:
    """What is wanted has the same bits whatever else is, and what is not has none."""
    data = data_for(case)
    everything = run(units.separable_units, data)
    right = run(reference.separable_units, data, torch.float64)
    names = [k for k in everything if k != "output" and "running" not in k]
    for k in names:
        assert distance(everything[k], right[k]) <= 1e-5 * float(right[k].norm()), k
    for chosen in itertools.product((False, True), repeat=len(names)):
        wanted = frozenset(k for k, choice in zip(names, chosen, strict=True) if choice)
        x, made, shortcut = _leaves(data, wanted)
        y = units.separable_units(x, [Unit(**u) for u in made], shortcut=shortcut, **data.options)  # type: ignore[arg-type]
        if not wanted - {"shortcut"} and not case.gathers:
            assert "SeparableUnits" not in str(y.grad_fn)
            continue
        assert y.requires_grad == bool(wanted)
        torch.testing.assert_close(y.detach(), everything["output"], rtol=0, atol=0)
        if wanted:
            assert "SeparableUnits" in str(y.grad_fn)
            y.backward(data.gradient)
        found = {"x": x.grad, "shortcut": shortcut.grad if isinstance(shortcut, Tensor) else None}
        found |= {f"{i}.{k}": unit[k].grad for i, unit in enumerate(made) for k in PARAMETERS}
        for k in names:
            gradient = found[k]
            assert (gradient is not None) == (k in wanted), (k, wanted)
            assert gradient is None or torch.equal(gradient, everything[k]), (k, wanted)


@native
def test_statistics_are_gathered_without_gradients() -> None:
    data = data_for(Case(channels=17, widths=(9, 12), momentum=0.25))
    x, made, _ = _leaves(data, frozenset())
    with torch.no_grad(), at_level("scalar") as taken:
        y = units.separable_units(x, [Unit(**u) for u in made])
    assert taken.call_count == 1
    assert y.grad_fn is None
    right = run(reference.separable_units, data, torch.float64)
    for i, unit in enumerate(made):
        for k in ("running_mean", "running_variance"):
            torch.testing.assert_close(unit[k].double(), right[f"{i}.{k}"], rtol=1e-5, atol=1e-6)
            assert not torch.equal(unit[k], data.units[i][k])
    torch.testing.assert_close(y.double(), right["output"], rtol=1e-4, atol=1e-5)


@native
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("missing", ["scale", "offset", "both"])
def test_without_scale_or_offset(missing: str, gathers: bool) -> None:
    data = data_for(Case(widths=(6, 7), gathers=gathers))
    gone = PARAMETERS[2:] if missing == "both" else (missing,)
    data = replace(data, units=[{k: v for k, v in unit.items() if k not in gone} for unit in data.units])
    right = run(reference.separable_units, data, torch.float64)
    found = run_native(data, "scalar", "fp32")
    assert found.keys() == right.keys()
    for k in right:
        assert distance(found[k], right[k]) <= 1e-5 * float(right[k].norm()), k


@native
def test_statistics_that_nobody_keeps() -> None:
    """No running statistics at all; or none that move."""
    data = data_for(Case(widths=(6, 7)))
    x, made, _ = _leaves(data, frozenset(["x"]))
    bare = [{k: v for k, v in unit.items() if "running" not in k} | {"momentum": None} for unit in made]
    still = [unit | {"momentum": None} for unit in made]
    with at_level("scalar") as taken:
        outputs = [units.separable_units(x, [Unit(**u) for u in some]) for some in (bare, still)]
    assert taken.call_count == 2
    assert torch.equal(*outputs)
    for unit, before in zip(made, data.units, strict=True):
        assert torch.equal(unit["running_mean"], before["running_mean"])
        assert torch.equal(unit["running_variance"], before["running_variance"])


# ----------------------------------------------------------------------------------------- which path is taken


@native
@pytest.mark.parametrize(("cap", "level"), [("scalar", "scalar"), ("avx2", "avx2"), ("avx512", "avx512")])
def test_the_cap_chooses_the_level(cap: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (level, "fp32") not in LEVELS:
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv(backend.CAP_VARIABLE, cap)
    data = data_for(Case())
    with mock.patch.object(units, "_trainer", wraps=units._trainer) as taken:
        run(units.separable_units, data)
        assert [call.args[:2] for call in taken.call_args_list] == [(level, "fp32")] * 2
        assert units._trainer(level, "fp32", torch.get_num_threads()).level == level


@native
def test_what_takes_the_definition() -> None:
    case = Case(gathers=False, shortcut="tensor")
    data = data_for(case)
    empty = replace(data, x=data.x[:0], shortcut=None)
    with mock.patch.object(units, "_trainer", wraps=units._trainer) as taken:
        run(units.separable_units, data, torch.float64)
        x, made, _ = _leaves(empty, frozenset(["0.pointwise"]))
        assert units.separable_units(x, [Unit(**u) for u in made]).shape == (0, 6, 7, 9)
        with torch.no_grad():  # nothing is gathered, and no gradient wanted
            x, made, shortcut = _leaves(data, frozenset(["x", "0.pointwise"]))
            found = units.separable_units(x, [Unit(**u) for u in made], shortcut=shortcut)  # type: ignore[arg-type]
            right = reference.separable_units(x, [Unit(**u) for u in made], shortcut=shortcut)  # type: ignore[arg-type]
        assert torch.equal(found, right)
        with torch.autocast("cpu", torch.float16):
            run(units.separable_units, data)
        with backend.use_backend("reference"):
            run(units.separable_units, data)
        x, made, _ = _leaves(data, frozenset(["x"]))
        half = [{k: v.bfloat16() if k in PARAMETERS[:2] else v for k, v in u.items()} for u in made]
        with torch.autocast("cpu", torch.bfloat16):
            assert units.separable_units(x, [Unit(**u) for u in half]).dtype == torch.bfloat16
        assert taken.call_count == 0
        run(units.separable_units, data)
        assert taken.call_count == 2


@native
def test_a_relu_behind_a_shortcut_or_a_pool_takes_the_definition() -> None:
    for case in (Case(output_relu=True, shortcut="tensor"), Case(output_relu=True, pool="same")):
        data = data_for(case)
        with mock.patch.object(units, "_trainer", wraps=units._trainer) as taken:
            found = run(units.separable_units, data)
        assert taken.call_count == 0
        right = run(reference.separable_units, data)
        assert all(torch.equal(found[k], right[k]) for k in right)


def test_one_pixel_has_no_variance() -> None:
    data = data_for(Case(images=1, height=1, width=1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(units.separable_units, data)


@native
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("shortcut", (2, 6, 9, 7)),  # as many numbers as the output, lying otherwise
        ("shortcut", (2, 6, 7, 8)),
        ("depthwise", (4, 1, 3, 3)),
        ("pointwise", (6, 4, 1, 1)),
        ("scale", (5,)),
        ("offset", (7,)),
        ("running_mean", (5,)),
        ("running_variance", (7,)),
    ],
)
@pytest.mark.parametrize("gathers", [False, True])
def test_wrong_sizes_are_refused(name: str, shape: tuple[int, ...], gathers: bool) -> None:
    data = data_for(Case(gathers=gathers, shortcut="tensor"))
    wrong = torch.ones(shape)
    data = replace(data, shortcut=wrong) if name == "shortcut" else replace(data, units=[data.units[0] | {name: wrong}])
    x, made, shortcut = _leaves(data, frozenset(["x"]))
    with pytest.raises((RuntimeError, ValueError)):
        units.separable_units(x, [Unit(**u) for u in made], shortcut=shortcut)  # type: ignore[arg-type]


@native
def test_second_derivatives_are_refused() -> None:
    x, made, _ = _leaves(data_for(Case()), frozenset(["x"]))
    (gradient,) = torch.autograd.grad(
        units.separable_units(x, [Unit(**u) for u in made]).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ------------------------------------------------------------------------------------------- layouts and memory


@native
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "turned", "strided", "expanded"])
def test_any_layout_gives_the_same_bits(layout: str, kind: str) -> None:
    data = data_for(Case(channels=6, widths=(7, 6), height=8, width=8, shortcut="tensor"), kind)
    level = backend.kernel_level(kind)  # type: ignore[arg-type]
    right = run_native(data, level, kind)

    def laid(x: Tensor) -> Tensor:
        if layout == "contiguous":
            return x.clone(memory_format=torch.contiguous_format)
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "turned":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        if layout == "strided":
            return x.repeat_interleave(2, dim=3)[..., ::2]
        return x.clone()

    maps = torch.bfloat16 if kind == "bf16" else torch.float32
    x = laid(data.x.to(maps)).requires_grad_()
    assert isinstance(data.shortcut, Tensor)
    _, made, _ = _leaves(data, frozenset(k for k in right if k[0].isdigit() and "running" not in k))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        y = units.separable_units(x, [Unit(**u) for u in made], shortcut=laid(data.shortcut.to(maps)))
    assert torch.equal(y, right["output"])
    if layout == "expanded":  # as the gradient of a sum is
        data = replace(data, gradient=torch.ones(()).expand(y.shape))
        right = run_native(data, level, kind)
        y.backward(data.gradient.to(maps).expand(y.shape))
    else:
        y.backward(laid(data.gradient.to(maps)))
    assert x.grad is not None
    assert torch.equal(x.grad, right["x"])
    for i, unit in enumerate(made):
        assert all(torch.equal(unit[k].grad, right[f"{i}.{k}"]) for k in PARAMETERS)


@native
@at_every_level
@pytest.mark.parametrize("case", [FIXED[i] for i in (2, 3, 4, 7)], ids=["relu", "pool", "dense", "strips"])
def test_nothing_outside_is_read_or_written(case: Case, level: str, kind: str) -> None:
    """Every input lies between NaN, and none is changed."""
    data = data_for(case, kind)
    right = run_native(data, level, kind)
    held: list[tuple[Tensor, Tensor]] = []

    def between(values: Tensor) -> Tensor:
        around = torch.full((values.numel() + 256,), torch.nan, dtype=values.dtype)
        inside = around[128:-128]
        inside.copy_(values.reshape(-1))
        held.append((around, around.clone()))
        return inside.view(values.shape)

    maps = torch.bfloat16 if kind == "bf16" else torch.float32

    def between_rows(values: Tensor) -> Tensor:
        return between(values.to(maps).permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)

    x = between_rows(data.x).requires_grad_()
    made = [{k: between(v).requires_grad_() if k in PARAMETERS else v for k, v in u.items()} for u in data.units]
    made = [u | {k: u[k].clone() for k in ("running_mean", "running_variance")} for u in made]
    shortcut = between_rows(data.shortcut).requires_grad_() if isinstance(data.shortcut, Tensor) else data.shortcut
    with at_level(level), torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        y = units.separable_units(x, [Unit(**u) for u in made], shortcut=shortcut, **data.options)  # type: ignore[arg-type]
        y.backward(between_rows(data.gradient))
    found = {"output": y.detach(), "x": x.grad}
    found |= {f"{i}.{k}": u[k].grad for i, u in enumerate(made) for k in PARAMETERS}
    found |= {"shortcut": shortcut.grad} if isinstance(shortcut, Tensor) else {}
    for k, value in found.items():
        assert torch.equal(value, right[k]), k  # type: ignore[arg-type]
    for around, before in held:
        assert torch.equal(around.isnan(), before.isnan())
        assert torch.equal(around.nan_to_num(), before.nan_to_num())


@native
@at_every_level
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("end", ["linear", "relu", "shortcut", "pool"])
def test_what_is_not_finite_is_carried(level: str, kind: str, value: float, gathers: bool, end: str) -> None:
    """To the output where the definition has it, and nowhere else; so to the loss."""
    case = Case(channels=3, widths=(5, 18), height=9, width=11, gathers=gathers, input_relu=False)
    case = replace(case, output_relu=end == "relu", pool="same" if end == "pool" else "none")
    data = data_for(replace(case, shortcut="tensor" if end == "shortcut" else "none"), kind)
    data.x[1, 2, 4, 6] = value
    made = [Unit(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in u.items()}) for u in data.units]
    double = [Unit(**{k: v.double() if isinstance(v, Tensor) else v for k, v in u.items()}) for u in data.units]
    shortcut = data.shortcut.double() if isinstance(data.shortcut, Tensor) else None
    right = reference.separable_units(data.x.double(), double, shortcut=shortcut, **data.options)
    with at_level(level) as taken, torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        found = units.separable_units(data.x.requires_grad_(), made, shortcut=data.shortcut, **data.options)  # type: ignore[arg-type]
    assert taken.call_count == 1
    assert not right.isfinite().all()
    assert torch.equal(found.isfinite(), right.isfinite())
    assert torch.equal(found.isnan(), right.isnan())
    loss = found.float().square().mean()
    assert not loss.isfinite()
    loss.backward()
    assert data.x.grad is not None
    assert not data.x.grad.isfinite().all()


# ------------------------------------------------------------------------------------ repetition, threads, graphs


@native
@at_every_level
@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_repeat_bit_for_bit(level: str, kind: str, count: int) -> None:
    case = Case(images=5, channels=33, height=11, width=10, widths=(20, 33), shortcut="input")
    data = data_for(case, kind)
    right = run(reference.separable_units, data, torch.float64)
    with threads(count):
        first = run_native(data, level, kind)
        run_native(data_for(replace(case, images=7, height=20), kind), level, kind)  # its workspace is larger
        again = run_native(data, level, kind)
    for k in first:
        assert torch.equal(first[k], again[k]), k
        assert distance(first[k], right[k]) <= (1e-5 if kind == "fp32" else 0.3) * float(right[k].norm()), k


@native
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_many_threads(kind: str) -> None:
    some = (
        Case(channels=9, widths=(17, 9), shortcut="input"),
        Case(channels=20, height=12, widths=(33,), pool="same"),
        Case(channels=3, widths=(5, 6, 7), output_relu=True),
    )
    level = backend.kernel_level(kind)  # type: ignore[arg-type]
    given_data = [data_for(case, kind) for case in some]
    maps = torch.bfloat16 if kind == "bf16" else None

    def once(i: int) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            return run(units.separable_units, given_data[i % 3], maps=maps)

    right = [run_native(data, level, kind) for data in given_data]

    def same(i: int) -> bool:
        found = once(i)
        return all(torch.equal(found[k], v) for k, v in right[i % 3].items())

    with mock.patch.object(units, "_trainer", wraps=units._trainer) as taken, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, range(240)))
    assert taken.call_count == 480


@native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use() -> None:
    code = """
import os, torch
from xception.ops import units
from xception.ops.reference import Unit
torch.manual_seed(0)
x, depthwise, pointwise = torch.randn(4, 20, 9, 9), torch.randn(20, 1, 3, 3), torch.randn(24, 20, 1, 1)
def work():
    weights = [depthwise.clone().requires_grad_(), pointwise.clone().requires_grad_()]
    y = units.separable_units(x, [Unit(depthwise=weights[0], pointwise=weights[1])])
    assert 'SeparableUnits' in str(y.grad_fn)
    y.square().sum().backward()
    return [y.detach(), *(w.grad for w in weights)]
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    right = work()
    for _ in range(2):
        child = os.fork()
        if child == 0:
            ok = False
            try:
                torch.set_num_threads(threads)
                ok = all(map(torch.equal, work(), right))
            finally:
                os._exit(0 if ok else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, threads
        assert all(map(torch.equal, work(), right))
print('right')
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@native
def test_gradients_accumulate_and_graphs_are_kept() -> None:
    data = data_for(Case(channels=6, widths=(7, 6), shortcut="input"))
    once = run(units.separable_units, data)
    names = frozenset(k for k in once if k != "output" and "running" not in k)
    x, made, _ = _leaves(data, names)

    def gradients() -> dict[str, Tensor]:
        return {"x": x.grad} | {f"{i}.{k}": u[k].grad for i, u in enumerate(made) for k in PARAMETERS}

    y = units.separable_units(x, [Unit(**u) for u in made], shortcut="input")
    y.backward(data.gradient, retain_graph=True)
    assert all(torch.equal(v, once[k]) for k, v in gradients().items())
    y.backward(data.gradient)
    assert all(torch.equal(v, once[k] * 2) for k, v in gradients().items())
    units.separable_units(x, [Unit(**u) for u in made], shortcut="input").backward(data.gradient)
    for k, v in gradients().items():
        torch.testing.assert_close(v, once[k] * 3)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(data.gradient)


@native
def test_weights_that_change_before_the_backward_pass_are_noticed() -> None:
    x, made, _ = _leaves(data_for(Case()), frozenset(["x", "0.pointwise"]))
    y = units.separable_units(x, [Unit(**u) for u in made])
    with torch.no_grad():
        made[0]["pointwise"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@native
def test_one_unit_twice() -> None:
    """Tied weights and statistics, as in a tied middle flow."""
    data = data_for(Case(channels=6, widths=(6,)))
    found: dict[str, Any] = {}
    for choice in ("native", "reference"):
        x, made, _ = _leaves(data, frozenset(["x", "0.depthwise", "0.pointwise", "0.scale", "0.offset"]))
        unit = Unit(**made[0])
        with backend.use_backend(choice):  # type: ignore[arg-type]
            y = units.separable_units(units.separable_units(x, [unit], shortcut="input"), [unit, unit])
        y.backward(data.gradient)
        found[choice] = [y.detach(), x.grad, *(made[0][k].grad for k in PARAMETERS)]
        found[choice] += [made[0][k] for k in ("running_mean", "running_variance")]
        assert ("SeparableUnits" in str(y.grad_fn)) == (choice == "native")
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@native
def test_float32_maps_under_autocast() -> None:
    """The input is rounded once; its gradient comes back in its own type."""
    data = data_for(Case(channels=17, widths=(9, 17), shortcut="input"), "bf16")
    level = backend.kernel_level("bf16")
    right = run_native(data, level, "bf16")
    with at_level(level) as taken, torch.autocast("cpu", torch.bfloat16):
        found = run(units.separable_units, data, maps=torch.float32)
    assert taken.call_count == 2
    assert found["x"].dtype == torch.float32
    assert all(torch.equal(found[k].float(), v.float()) for k, v in right.items())
