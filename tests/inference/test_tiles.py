"""Layers that are computed together on tiles: flows, strips and bands, each product with other work inside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from native_levels import LEVELS, network
from numpy.typing import NDArray
from torch import Tensor

from xception.ops import backend

pytest.importorskip("xception._native")

TILES = [pair for pair in LEVELS if pair[0].startswith("amx")]
# Those whose maps are in half precision: the processor's own where it has AVX-512 FP16 and BF16.
HAVE_HALVES = {"avx512_fp16", "avx512_bf16"} <= set(backend.detected_features())
HALVES = [
    (level, kind)
    for level, kind in TILES
    if kind != "fp32" and (level == "amx_half_emulated" or ("emulated" not in level and HAVE_HALVES))
]
THREADS = [(1, False), (2, False), (2, True), (3, True)]
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 3e-3}  # of the norm, over some layers
GUARD = np.float32(12345)

if not TILES:
    pytest.skip("the tiles' emulation needs AVX-512", allow_module_level=True)


def numbers(*shape: int, seed: int) -> NDArray[np.float32]:
    """Values that every type holds exactly: multiples of 1/8 up to 2."""
    return np.random.default_rng(seed).integers(-16, 17, shape).astype(np.float32) / 8


@dataclass(frozen=True)
class Step:
    """A layer that reads the one before it; `residual` is the number of an earlier value."""

    kind: str = "separable"
    out: int = 0
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    amount: int = 1
    relu: bool = False
    middle: str = "none"
    activation: str = "none"
    residual: int = -1
    reads: int = -1


@dataclass(frozen=True)
class Net:
    height: int
    width: int
    channels: int
    steps: tuple[Step, ...]

    def weights(self, i: int) -> dict[str, NDArray[np.float32]]:
        step = self.steps[i]
        depth, taps = self.channels_of(self.reads(i)), step.kernel**2
        if step.kind == "pool":
            return {}
        scale = np.float32(2.0 ** -np.ceil(np.log2(depth) / 2 + 1))
        if step.kind == "convolution":
            return {
                "weights": numbers(step.out, taps * depth, seed=i) * scale / np.float32(step.kernel),
                "bias": numbers(step.out, seed=50 + i),
            }
        return {
            "filters": numbers(taps, depth, seed=i) / np.float32(step.kernel),
            "filter_bias": numbers(depth, seed=150 + i),
            "weights": numbers(step.out, depth, seed=100 + i) * scale,
            "bias": numbers(step.out, seed=200 + i),
        }

    def reads(self, i: int) -> int:
        return i if self.steps[i].reads < 0 else self.steps[i].reads

    def channels_of(self, value: int) -> int:
        if value == 0:
            return self.channels
        step = self.steps[value - 1]
        return self.channels_of(self.reads(value - 1)) if step.kind == "pool" else step.out

    def expected(self, x: Tensor) -> Tensor:
        """In float64, by plain PyTorch."""
        values = [x.double()]
        acts: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda v: v, "relu": F.relu, "elu": F.elu}
        for i, step in enumerate(self.steps):
            y = values[self.reads(i)]
            options = {"stride": step.stride, "dilation": step.dilation, "padding": step.amount}
            w = {k: torch.from_numpy(v).double() for k, v in self.weights(i).items()}
            k = step.kernel
            if step.kind == "pool":
                y = F.max_pool2d(y, k, **options)
            else:
                y = F.relu(y) if step.relu else y
                if step.kind == "convolution":
                    kernel = w["weights"].reshape(step.out, k, k, -1).permute(0, 3, 1, 2)
                    y = F.conv2d(y, kernel, w["bias"], **options)
                else:
                    depth = y.shape[1]
                    y = F.conv2d(y, w["filters"].T.reshape(depth, 1, k, k), w["filter_bias"], groups=depth, **options)
                    y = F.conv2d(acts[step.middle](y), w["weights"][:, :, None, None], w["bias"])
            if step.residual >= 0:
                y = y + values[step.residual]
            values.append(acts[step.activation](y))
        return values[-1]

    def computed(self, level: str, kind: str, x: Tensor, threads: int = 1, latency: bool = False) -> Tensor:
        """By the kernels, between guards."""
        net = network(level, kind, self.channels, threads, latency)
        first_reads_image = self.channels == 3
        values = [0 if first_reads_image else net.load()]
        for i, step in enumerate(self.steps):
            options: dict[str, Any] = {"kernel": step.kernel, "stride": step.stride, "dilation": step.dilation}
            options |= {"padding": "fixed", "amount": step.amount}
            if step.residual >= 0:
                options["residual"] = values[step.residual]
            if step.kind != "pool":
                options |= self.weights(i) | {"input_relu": step.relu, "activation": step.activation}
            if step.kind == "separable":
                options["middle"] = step.middle
            values.append(getattr(net, step.kind)(values[self.reads(i)], **options))
        count, _, height, width = x.shape
        shape = (count, *net.shape(values[-1], height, width))
        size = int(np.prod(shape))
        memory = np.full(size + 2048, GUARD, np.float32)
        output = memory[1024 : 1024 + size].reshape(shape)
        output[:] = np.nan
        net.run(np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy()), values[-1], output)
        assert (memory[:1024] == GUARD).all()
        assert (memory[1024 + size :] == GUARD).all()
        return torch.from_numpy(output.copy()).permute(0, 3, 1, 2)


def middle(channels: int, *, relu: bool = True) -> tuple[Step, ...]:
    """Two modules of the middle flow."""
    unit = Step(out=channels, relu=relu)
    with_shortcut = [Step(out=channels, relu=relu, residual=0), Step(out=channels, relu=relu, residual=3)]
    return (unit, unit, with_shortcut[0], unit, unit, with_shortcut[1])


NETS = {
    "a flow": Net(10, 10, 96, middle(96)),
    "a flow on one pixel": Net(1, 1, 40, middle(40)),
    "a flow whose blocks alternate": Net(19, 19, 72, middle(72)),
    "a flow of many panels": Net(6, 7, 264, middle(264)),
    "a flow that grows and shrinks": Net(9, 5, 33, (Step(out=70), Step(out=31, relu=True), Step(out=129), Step(out=1))),
    "a flow with strides": Net(17, 21, 40, (Step(out=40, stride=2), Step(out=65, kernel=5, amount=2), Step(out=33))),
    "a flow with dilation": Net(12, 13, 40, (Step(out=40, dilation=2, amount=2), Step(out=40, dilation=3, amount=3))),
    "a flow with every activation": Net(
        8, 9, 40, (Step(out=48, middle="elu", activation="relu"), Step(out=40, middle="relu", activation="elu"))
    ),
    "an exit flow": Net(
        19, 19, 64,
        (Step("convolution", 96, 1, 2, amount=0), Step(out=64, relu=True, reads=0), Step(out=96, relu=True),
         Step("pool", stride=2, residual=1), Step(out=120, activation="relu"), Step(out=150, activation="relu")),
    ),
    "strips": Net(96, 90, 64, (Step(out=70, relu=True),)),
    "strips of few panels": Net(120, 101, 64, (Step(out=32, activation="relu"),)),
    "bands": Net(96, 97, 64, (Step(out=64), Step(out=72, relu=True), Step("pool", stride=2))),
    "bands with a shortcut": Net(
        90, 95, 64,
        (Step("convolution", 72, 1, 2, amount=0), Step(out=72, reads=0), Step(out=72, relu=True),
         Step("pool", stride=2, residual=1)),
    ),
    "bands of three": Net(96, 97, 64, (Step(out=64), Step(out=72, relu=True), Step(out=64, relu=True, stride=2))),
    "an image's stem": Net(
        131, 140, 3, (Step("convolution", 32, stride=2, amount=0, activation="relu"), Step("convolution", 64, amount=0),
                      Step(out=70, relu=True), Step(out=64), Step("pool", stride=2))
    ),
    "a small image's stem": Net(
        33, 34, 3, (Step("convolution", 20, stride=2, activation="relu"), Step("convolution", 40), Step(out=70))
    ),
}  # fmt: skip


@pytest.mark.parametrize(("level", "kind"), TILES)
@pytest.mark.parametrize("name", NETS)
def test_layers_together(name: str, level: str, kind: str) -> None:
    """PyTorch's numbers; and bit for bit the same from any number of threads and images."""
    net = NETS[name]
    count = 2 if net.height > 40 else 5
    x = torch.from_numpy(numbers(count, net.height, net.width, net.channels, seed=7)).permute(0, 3, 1, 2)
    expected = net.expected(x)
    alone = torch.cat([net.computed(level, kind, x[i : i + 1]) for i in range(count)])
    error = float((alone - expected).norm() / expected.norm())
    assert error < TOLERANCE[kind]
    for threads, latency in THREADS:
        assert torch.equal(net.computed(level, kind, x, threads, latency), alone), (threads, latency)


@pytest.mark.parametrize(("level", "kind"), TILES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spreads_with_the_windows_only(level: str, kind: str, value: float) -> None:
    net = Net(19, 19, 40, (Step(out=40), Step(out=40), Step(out=33)))
    x = torch.from_numpy(numbers(1, 19, 19, 40, seed=3)).permute(0, 3, 1, 2).contiguous()
    x[0, :, 9, 11] = value
    found = net.computed(level, kind, x).isfinite()[0]
    reached = torch.zeros(19, 19, dtype=torch.bool)
    reached[6:13, 8:15] = True
    assert found[:, ~reached].all()
    assert not found[:, 9, 11].any()


def large(net: Net, image: int, factor: float) -> Tensor:
    x = torch.from_numpy(numbers(3, net.height, net.width, net.channels, seed=7)).permute(0, 3, 1, 2).contiguous()
    x[image] *= factor
    return x


@pytest.mark.parametrize(("level", "kind"), HALVES)
@pytest.mark.parametrize("factor", [1e5, 1e12])
@pytest.mark.parametrize(("threads", "latency"), THREADS)
def test_numbers_beyond_half_precision_are_computed_again_without_it(
    level: str, kind: str, factor: float, threads: int, latency: bool
) -> None:
    """bf16 holds them; and of several images only those that need it are computed otherwise."""
    net = NETS["a flow"]
    x = large(net, 1, factor)
    found = net.computed(level, kind, x, threads, latency)
    plain = net.computed("amx_emulated", kind, x)
    usual = net.computed(level, kind, large(net, 1, 1.0))
    if level == "amx_half_emulated":  # the processor adds the products of a tile in another order
        torch.testing.assert_close(found[1], plain[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[[0, 2]], usual[[0, 2]])
    if kind == "bf16":
        assert not torch.equal(found[0], plain[0])
        assert found.isfinite().all()
        expected = net.expected(x)[1]
        assert float((found[1] - expected).norm() / expected.norm()) < TOLERANCE[kind]


@pytest.mark.parametrize(("level", "kind"), HALVES)
@pytest.mark.parametrize("factor", [1e-7, 1e6])
def test_filters_that_half_precision_does_not_hold(
    level: str, kind: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net(7, 8, 40, (Step(out=33),))
    weights = net.weights(0)
    scale = np.float32(factor)
    weights |= {"filters": weights["filters"] * scale, "filter_bias": weights["filter_bias"] * scale}
    if kind == "bf16":  # in fp16 the matrix itself has no such numbers
        weights["weights"] = weights["weights"] / scale
    monkeypatch.setattr(Net, "weights", lambda self, i: weights)
    x = torch.from_numpy(numbers(1, 7, 8, 40, seed=7)).permute(0, 3, 1, 2)
    found, expected = net.computed(level, kind, x), net.expected(x)
    if kind == "bf16":
        assert float((found - expected).norm() / expected.norm()) < TOLERANCE[kind]
    elif factor > 1 and level == "amx_half_emulated":
        torch.testing.assert_close(found, net.computed("amx_emulated", kind, x), rtol=0, atol=0, equal_nan=True)
