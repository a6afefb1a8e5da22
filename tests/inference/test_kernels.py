"""The executor's layers against their definition in float64: every level, odd sizes, every option, NaN and infinity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from native_levels import LEVELS, TOLERANCE, network
from numpy.typing import NDArray
from torch import Tensor

from xception.ops import reference

pytest.importorskip("xception._native")


@dataclass(frozen=True)
class Case:
    """A layer, its input's size, and what is around it."""

    kind: str = "separable"
    images: int = 1
    height: int = 7
    width: int = 9
    channels: int = 5
    out_channels: int = 6
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    padding: str = "same"
    amount: int = 0
    input_relu: bool = False
    middle: str = "none"
    activation: str = "none"
    bias: bool = True
    residual: bool = False
    segments: int = 1
    threads: int = 1


def numbers(*shape: int, seed: int) -> NDArray[np.float32]:
    """Values that every type holds exactly: multiples of 1/8 up to 2."""
    return np.random.default_rng(seed).integers(-16, 17, shape).astype(np.float32) / 8


def sampling(case: Case) -> dict[str, Any]:
    amount = {"amount": case.amount} if case.padding == "fixed" else {}
    return {
        "kernel": case.kernel,
        "stride": case.stride,
        "dilation": case.dilation,
        "padding": case.padding,
        **amount,
    }


def padded(case: Case, x: Tensor, value: float) -> Tensor:
    if case.padding == "same":
        return reference.pad_same(x, case.kernel, case.stride, case.dilation, value=value)
    return F.pad(x, (case.amount,) * 4, value=value)


def segment_of_each(channels: int, segments: int) -> list[tuple[int, int]]:
    """Where the segment of each channel begins, and how wide it is: as equal as can be, the wider ones first."""
    widths = [channels // segments + (i < channels % segments) for i in range(segments)]
    return [(sum(widths[:i]), width) for i, width in enumerate(widths) for _ in range(width)]


class Layer:
    """A case's weights, the executor's result and the definition's."""

    def __init__(self, case: Case) -> None:
        self.case = case
        taps = case.kernel**2
        self.filters = numbers(taps, case.channels, seed=1)
        self.filter_bias = numbers(case.channels, seed=2) if case.bias else None
        depth = case.channels * (taps if case.kind == "convolution" else 1)
        if case.kind == "grouped":
            depth = taps * -(-case.channels // case.segments)
        self.weights = numbers(case.out_channels, depth, seed=3)
        self.bias = numbers(case.out_channels, seed=4) if case.bias else None
        self.beside = numbers(case.out_channels, case.channels, seed=5)

    def expected(self, x: Tensor) -> Tensor:
        """In float64, by plain PyTorch."""
        case = self.case
        x = x.double()
        y = F.relu(x) if case.input_relu else x
        options = {"stride": case.stride, "dilation": case.dilation}
        bias = None if self.bias is None else torch.from_numpy(self.bias).double()
        if case.kind == "pool":
            y = F.max_pool2d(padded(case, x, -torch.inf), case.kernel, **options)
            return reference.activate(self.with_residual(x, y), case.activation)
        y = padded(case, y, 0.0)
        k = case.kernel
        if case.kind == "separable":
            y = F.conv2d(self.filtered(x), torch.from_numpy(self.weights).double()[:, :, None, None])
        elif case.kind == "depthwise":
            filters = torch.from_numpy(self.filters.T.copy()).double().reshape(-1, 1, k, k)
            y = F.conv2d(y, filters, groups=case.channels, **options)
        elif case.kind == "grouped":
            weights = torch.from_numpy(self.weights).double().reshape(case.channels, k, k, -1).permute(0, 3, 1, 2)
            each = enumerate(segment_of_each(case.channels, case.segments))
            y = torch.cat([F.conv2d(y[:, a : a + n], weights[c : c + 1, :n], **options) for c, (a, n) in each], dim=1)
        else:
            weights = torch.from_numpy(self.weights).double().reshape(-1, k, k, case.channels).permute(0, 3, 1, 2)
            y = F.conv2d(y, weights, **options)
        if bias is not None:
            y = y + bias[:, None, None]
        return reference.activate(self.with_residual(x, y), case.activation)

    def filtered(self, x: Tensor) -> Tensor:
        """What a separable layer has between its two convolutions."""
        case, k = self.case, self.case.kernel
        y = padded(case, F.relu(x) if case.input_relu else x, 0.0)
        filters = torch.from_numpy(self.filters.T.copy()).double().reshape(-1, 1, k, k)
        bias = None if self.filter_bias is None else torch.from_numpy(self.filter_bias).double()
        y = F.conv2d(y, filters, bias, case.stride, dilation=case.dilation, groups=case.channels)
        return reference.activate(y, case.middle)

    def size_of_terms(self, x: Tensor) -> float:
        """Of a separable layer: the largest root of the squared terms of a sum, each of which was rounded."""
        weights = torch.from_numpy(self.weights).double()[:, :, None, None]
        return float(F.conv2d(self.filtered(x.double()) ** 2, weights**2).amax().sqrt())

    def with_residual(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.conv2d(x, torch.from_numpy(self.beside).double()[:, :, None, None]) if self.case.residual else y

    def computed(self, level: str, kind: str, x: Tensor) -> Tensor:
        """By the kernels, into memory that held something else."""
        case = self.case
        net = network(level, kind, case.channels, case.threads)
        value = net.load()
        options: dict[str, Any] = sampling(case)
        if case.residual:
            options["residual"] = net.convolution(value, weights=self.beside, kernel=1)
        if case.kind == "pool":
            options["relu"] = case.activation == "relu"
        else:
            options |= {"bias": self.bias, "activation": case.activation}
            options |= {"filters": self.filters} if case.kind == "depthwise" else {"weights": self.weights}
            options |= {"segments": case.segments} if case.kind == "grouped" else {"input_relu": case.input_relu}
        if case.kind == "separable":
            options |= {"filters": self.filters, "filter_bias": self.filter_bias, "middle": case.middle}
        result = getattr(net, case.kind)(value, **options)
        count, _, height, width = x.shape
        images = np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
        output = np.full((count, *net.shape(result, height, width)), 12345.0, np.float32)
        net.run(images, result, output)
        again = np.full_like(output, -54321.0)
        net.run(images, result, again)
        assert np.array_equal(output, again, equal_nan=True)
        return torch.from_numpy(output).permute(0, 3, 1, 2)


def check(case: Case, level: str, kind: str, x: Tensor | None = None) -> None:
    shape = (case.images, case.height, case.width, case.channels)
    given_x = torch.from_numpy(numbers(*shape, seed=0)).permute(0, 3, 1, 2) if x is None else x
    layer = Layer(case)
    expected = layer.expected(given_x)
    computed = layer.computed(level, kind, given_x)
    assert computed.shape == expected.shape
    scale = float(expected.abs().max())
    if kind != "fp32":  # in 16 bits the depthwise result is rounded before the product
        scale += float(layer.expected(given_x.abs()).abs().max())
        scale += layer.size_of_terms(given_x) if case.kind == "separable" else 0.0
    torch.testing.assert_close(
        computed.double(),
        expected,
        rtol=0,
        atol=TOLERANCE[kind] * max(scale, 1.0),
        equal_nan=True,
        msg=f"{case} {level}",
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["separable", "separable", "convolution", "depthwise", "grouped", "pool"]))
    kernel = draw(st.sampled_from([1, 2, 3, 3, 3, 5]))
    dilation = draw(st.sampled_from([1, 1, 1, 2, 3]))
    reach = (kernel - 1) * dilation + 1
    fixed = draw(st.booleans())
    channels = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 31, 32, 33, 40, 64, 65]))
    least = reach if fixed else 1
    case = Case(
        kind=kind,
        images=draw(st.integers(1, 3)),
        height=draw(st.integers(least, least + 12)),
        width=draw(st.integers(least, least + 30)),
        channels=channels if kind == "grouped" else min(channels, 64),
        out_channels=draw(st.sampled_from([1, 2, 15, 16, 17, 32, 33, 64, 70])),
        kernel=kernel,
        stride=draw(st.integers(1, 3)),
        dilation=dilation,
        padding="fixed" if fixed else "same",
        amount=draw(st.integers(0, reach // 2)) if fixed else 0,
        input_relu=draw(st.booleans()),
        middle=draw(st.sampled_from(["none", "none", "relu", "elu"])),
        activation=draw(st.sampled_from(["none", "relu", "elu"])),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        threads=draw(st.integers(1, 3)),
    )
    if case.kind in ("pool", "depthwise", "grouped"):
        case = replace(case, out_channels=case.channels)
    if case.kind == "pool":
        relu = "relu" if case.activation == "relu" else "none"
        case = replace(case, amount=min(case.amount, case.kernel // 2), activation=relu)
    if case.kind == "grouped":
        case = replace(case, segments=draw(st.integers(1, case.channels)), input_relu=False)
    same_size = case.stride == 1 and (case.padding == "same" or 2 * case.amount == reach - 1)
    return replace(case, residual=case.residual and same_size)


@pytest.mark.parametrize(("level", "kind"), LEVELS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
@example(case=Case(height=19, width=19, channels=33, out_channels=65, residual=True, input_relu=True))
@example(case=Case(height=1, width=1, channels=1, out_channels=1))
@example(case=Case(images=5, height=3, width=40, threads=3, activation="relu"))
@example(case=Case(kind="pool", out_channels=5, stride=2, height=8, width=9, images=2))
@example(case=Case(kind="convolution", kernel=1, stride=2, padding="fixed", channels=17, out_channels=40))
@example(case=Case(kind="depthwise", channels=40, out_channels=40, residual=True, input_relu=True, activation="relu"))
@example(case=Case(kind="depthwise", kernel=1, channels=17, out_channels=17, bias=False))
@example(case=Case(kind="grouped", channels=70, out_channels=70, segments=3, residual=True, activation="elu"))
@example(case=Case(kind="grouped", channels=100, out_channels=100, segments=67, stride=2, dilation=2))
@example(case=Case(kind="pool", channels=33, out_channels=33, images=2, residual=True, activation="relu"))
def test_layers(level: str, kind: str, case: Case) -> None:
    check(case, level, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("level", "kind"), LEVELS)
@settings(max_examples=3000, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_layers_at_length(level: str, kind: str, case: Case) -> None:
    check(case, level, kind)


@pytest.mark.parametrize(("level", "kind"), LEVELS)
@pytest.mark.parametrize("layer", ["separable", "convolution", "depthwise", "grouped", "pool"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_carried(level: str, kind: str, layer: str, value: float) -> None:
    """To the pixels whose windows hold it, and to no other."""
    out = 20 if layer in ("separable", "convolution") else 1
    # One channel: the convolution that brings the image in would spread a NaN over several.
    case = Case(kind=layer, height=11, width=13, channels=1, out_channels=out, bias=False)
    x = torch.from_numpy(np.abs(numbers(1, 11, 13, 1, seed=0)) + 0.125).permute(0, 3, 1, 2)
    x[0, 0, 5, 6] = value
    made = Layer(case)
    made.filters, made.weights = np.abs(made.filters) + 0.125, np.abs(made.weights) + 0.125
    expected, computed = made.expected(x), made.computed(level, kind, x)
    assert torch.equal(expected.isfinite(), computed.isfinite())
    if layer == "pool" or not np.isnan(value):
        torch.testing.assert_close(expected.isnan(), computed.isnan())
    near = torch.zeros(11, 13, dtype=torch.bool)
    near[4:7, 5:8] = True
    assert computed[0][:, ~near].isfinite().all()


@pytest.mark.parametrize(("level", "kind"), LEVELS)
@pytest.mark.parametrize("layer", ["separable", "convolution", "depthwise", "grouped", "pool"])
def test_no_images(level: str, kind: str, layer: str) -> None:
    out = 6 if layer in ("separable", "convolution") else 5
    case = Case(kind=layer, out_channels=out)
    assert Layer(case).computed(level, kind, torch.zeros(0, 5, 7, 9)).shape == (0, out, 7, 9)


@pytest.mark.parametrize(("level", "kind"), LEVELS)
@pytest.mark.parametrize("maximum", [False, True])
@pytest.mark.parametrize("channels", [1, 16, 33])
def test_heads(level: str, kind: str, maximum: bool, channels: int) -> None:
    """Pooling and linear layers, which are in float32 whatever the activations are."""
    net = network(level, kind, channels, threads=2)
    pooled = net.reduce(net.load(), maximum=maximum)
    weights, bias = numbers(37, channels, seed=1), numbers(37, seed=2)
    hidden = net.linear(pooled, weights=weights, bias=bias, activation="elu")
    last = net.linear(hidden, weights=weights[:5].repeat(37, axis=1)[:, :37].copy())
    for count, height, width in ((0, 3, 4), (1, 1, 1), (5, 7, 3)):
        x = numbers(count, height, width, channels, seed=3)
        if count > 1:
            x[1, 0, 0, 0] = np.nan
        exact = torch.from_numpy(x).double()
        expected = exact.amax((1, 2)) if maximum else exact.mean((1, 2))
        for value, function in (
            (pooled, lambda y: y),
            (hidden, lambda y: F.elu(F.linear(y, torch.from_numpy(weights).double(), torch.from_numpy(bias).double()))),
            (last, lambda y: F.linear(y, torch.from_numpy(weights[:5].repeat(37, axis=1)[:, :37]).double())),
        ):
            expected = function(expected)
            output = np.full((count, *net.shape(value, height, width)), 12345.0, np.float32)
            net.run(x, value, output)
            found = torch.from_numpy(output)[:, 0, 0].double()
            tolerance = 1e-5 * max(1.0, float(expected.nan_to_num().abs().max()) if count else 0.0)
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("level", "kind"), LEVELS[-6:])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9])
def test_numbers_do_not_depend_on_the_threads(level: str, kind: str, threads: int, count: int) -> None:
    """Nor on which images are computed together: bit for bit."""
    case = Case(images=count, height=40, width=33, channels=24, out_channels=40, stride=2)
    x = torch.from_numpy(numbers(count, 40, 33, 24, seed=0)).permute(0, 3, 1, 2)
    alone = torch.cat([Layer(case).computed(level, kind, x[i : i + 1]) for i in range(count)])
    assert torch.equal(Layer(replace(case, threads=threads)).computed(level, kind, x), alone)


def test_wrong_use_is_refused() -> None:
    net = network("scalar", "fp32", 3)
    weights = np.zeros((4, 27), np.float32)
    value = net.convolution(0, weights=weights, kernel=3)
    wrong: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
        ("unknown input", "convolution", (9,), {"weights": weights, "kernel": 3}),
        ("expected 12 numbers as weights, got 108", "convolution", (0,), {"weights": weights, "kernel": 1}),
        ("expected a kernel of 1 to 15", "convolution", (0,), {"weights": weights, "kernel": 16}),
        ("unknown padding", "pool", (value,), {"kernel": 3, "padding": "reflect"}),
        ("unknown activation", "convolution", (0,), {"weights": weights, "kernel": 3, "activation": "gelu"}),
        ("expected 1 to 4 segments", "grouped", (value,), {"weights": weights, "kernel": 3, "segments": 5}),
        ("expected 72 numbers as weights", "grouped", (value,), {"weights": weights, "kernel": 3, "segments": 2}),
        ("stride or dilation", "pool", (value,), {"kernel": 3, "stride": 0}),
        ("a regular convolution has to come first", "pool", (0,), {"kernel": 3}),
        ("linear layers, and only they", "linear", (value,), {"weights": np.zeros((2, 4), np.float32)}),
        ("residual value does not have", "pool", (value,), {"kernel": 3, "residual": 0}),
    ]
    for message, method, positional, named in wrong:
        with pytest.raises(ValueError, match=message):
            getattr(net, method)(*positional, **named)
    output = np.zeros((1, 6, 6, 4), np.float32)
    images = np.zeros((1, 8, 8, 3), np.float32)
    net.run(images, value, output)
    for bad in (images.astype(np.float64), images[:, ::2], images.transpose(0, 3, 1, 2), images[0], "no array", None):
        with pytest.raises((TypeError, ValueError)):
            net.run(bad, value, output)
    for bad in (output[:, :3], output.astype(np.float64), np.zeros((2, 6, 6, 4), np.float32)):
        with pytest.raises((TypeError, ValueError)):
            net.run(images, value, bad)
    frozen = output.copy()
    frozen.flags.writeable = False
    with pytest.raises((TypeError, ValueError)):
        net.run(images, value, frozen)
    with pytest.raises(ValueError, match="too small"):
        net.run(np.zeros((1, 2, 2, 3), np.float32), value, output)
    for level in ("avx1024", "amx_fp16" if ("amx_fp16", "fp16") not in LEVELS else "neon"):
        with pytest.raises(ValueError, match="this processor does not run"):
            network(level, "fp32", 3)
    for threads in (0, -1, 5000):
        with pytest.raises(ValueError, match="threads"):
            network("scalar", "fp32", 3, threads)
