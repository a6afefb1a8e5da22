"""Products of bytes: exact at every level, and whole networks with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from covered_networks import COVERED, images, model_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from native_levels import LEVELS, network
from numpy.typing import NDArray
from torch import Tensor

import xception
from xception.errors import ConfigError
from xception.inference.lowering import lower
from xception.inference.quantize import steps_of
from xception.models.layers import ConvNorm
from xception.ops import backend, reference

pytest.importorskip("xception._native")

BYTES = [level for level, kind in LEVELS if kind == "bf16"]
if "avx512_vnni" in backend.detected_features():
    BYTES.append("avx512_vnni")
KEPT = {
    level: torch.float16 if "half" in level or "fp16" in level else torch.bfloat16 for level in BYTES
}  # what a level's maps hold
if "avx512_fp16" in backend.detected_features():
    KEPT["amx_bf16"] = torch.float16


@dataclass(frozen=True)
class Case:
    """A separable layer (or a regular one), its input's size, and what is around it."""

    images: int = 1
    height: int = 7
    width: int = 9
    channels: int = 5
    out_channels: int = 6
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    input_relu: bool = False
    middle: str = "none"
    activation: str = "none"
    bias: bool = True
    threads: int = 1
    latency: bool = False
    beyond: bool = False  # numbers that a byte does not hold
    regular: bool = False  # whose bytes are rectified with `input_relu`, and which has no `middle`


class Layer:
    """Weights and images that bytes and floats hold exactly, so that the result has one right value."""

    def __init__(self, case: Case) -> None:
        self.case = case
        random = np.random.default_rng(case.channels * 100 + case.out_channels)
        taps = case.kernel**2
        # Steps of powers of two, and filters that give halves of them: rounding has ties to break.
        self.steps = (2.0 ** random.integers(-3, 4, case.channels)).astype(np.float32)
        factor = 40 if case.beyond else 1
        filters = random.integers(-1, 2, (taps, case.channels)) * self.steps * (factor / 2)
        self.filters = filters.astype(np.float32)
        biases = (random.integers(-3, 4, case.channels) * self.steps).astype(np.float32)
        self.filter_bias = biases if case.bias else None
        # A row's largest weight is 127 of its parts, which are powers of two.
        self.parts = random.integers(-127, 128, (case.out_channels, case.channels)).astype(np.float64)
        self.parts[np.arange(case.out_channels), random.integers(0, case.channels, case.out_channels)] = 127
        self.part = 2.0 ** random.integers(-9, -4, case.out_channels)
        self.weights = (self.parts * self.part[:, None] / self.steps).astype(np.float32)
        self.bias = random.integers(-64, 65, case.out_channels).astype(np.float32) if case.bias else None
        shape = (case.images, case.height, case.width, case.channels)
        self.x = random.integers(-2, 3, shape).astype(np.float32)
        if case.regular:
            self.x = (random.integers(-5, 6, shape) * self.steps * (factor / 2)).astype(np.float32)
            self.parts = random.integers(-7, 8, (case.out_channels, taps * case.channels)).astype(np.float64)
            self.parts[:, random.integers(0, taps * case.channels)] = 127
            self.weights = (self.parts * self.part[:, None] / np.tile(self.steps, taps)).astype(np.float32)

    def expected(self) -> Tensor:
        """In float64, by plain PyTorch, but for the last rounding."""
        case = self.case
        y = torch.from_numpy(self.x).double().permute(0, 3, 1, 2)
        y = reference.pad_same(F.relu(y) if case.input_relu else y, case.kernel, case.stride, case.dilation)
        if case.regular:
            low, high = (0, 255) if case.input_relu else (-128, 127)
            counted = torch.round(y / torch.from_numpy(self.steps).double()[:, None, None]).clamp(low, high)
            parts = torch.from_numpy(self.parts).reshape(-1, case.kernel, case.kernel, case.channels)
            parts = parts.permute(0, 3, 1, 2)
            return self.finished(F.conv2d(counted, parts, stride=case.stride, dilation=case.dilation))
        filters = torch.from_numpy((self.filters / self.steps).T.copy()).double()
        bias = None if self.filter_bias is None else torch.from_numpy(self.filter_bias / self.steps).double()
        filters = filters.reshape(case.channels, 1, case.kernel, case.kernel)
        y = F.conv2d(y, filters, bias, groups=case.channels, stride=case.stride, dilation=case.dilation)
        low, high = (0, 255) if case.middle == "relu" else (-128, 127)
        counted = torch.round(y).clamp(low, high)  # ties to even
        return self.finished(F.conv2d(counted, torch.from_numpy(self.parts)[:, :, None, None]))

    def finished(self, sums: Tensor) -> Tensor:
        out = sums * torch.from_numpy(self.part)[:, None, None]
        if self.bias is not None:
            out = out + torch.from_numpy(self.bias).double()[:, None, None]
        return reference.activate(out, self.case.activation)  # type: ignore[arg-type]

    def computed(self, level: str) -> Tensor:
        """By the kernels, into memory that held something else."""
        case = self.case
        net = network(level, "bf16", case.channels, case.threads, case.latency)
        options: dict[str, Any] = {
            "weights": self.weights,
            "bias": self.bias,
            "activation": case.activation,
            "kernel": case.kernel,
            "stride": case.stride,
            "dilation": case.dilation,
            "padding": "same",
            "input_relu": case.input_relu,
            "steps": self.steps,
        }
        if case.regular:
            value = net.convolution(net.load(), **options)
        else:
            between = {"filters": self.filters, "filter_bias": self.filter_bias, "middle": case.middle}
            value = net.separable(net.load(), **between, **options)
        output = np.full((case.images, *net.shape(value, case.height, case.width)), 12345.0, np.float32)
        net.run(self.x, value, output)
        return torch.from_numpy(output).permute(0, 3, 1, 2)


def check(case: Case, level: str) -> None:
    layer = Layer(case)
    expected = layer.expected()
    computed = layer.computed(level)
    if case.activation == "elu":  # which is rounded before and behind
        torch.testing.assert_close(computed.double(), expected, rtol=2**-7, atol=2**-7)
    else:  # float32 holds what is rounded here
        assert torch.equal(computed, expected.float().to(KEPT[level]).float())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        images=draw(st.integers(1, 3)),
        height=draw(st.integers(1, 14)),
        width=draw(st.integers(1, 40)),
        channels=draw(st.sampled_from([1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 96, 130])),
        out_channels=draw(st.sampled_from([1, 15, 16, 17, 32, 33, 64, 70])),
        kernel=draw(st.sampled_from([1, 2, 3, 3, 3, 5])),
        stride=draw(st.integers(1, 3)),
        dilation=draw(st.sampled_from([1, 1, 2, 3])),
        input_relu=draw(st.booleans()),
        middle=draw(st.sampled_from(["none", "relu"])),
        activation=draw(st.sampled_from(["none", "relu", "elu"])),
        bias=draw(st.booleans()),
        threads=draw(st.integers(1, 3)),
        latency=draw(st.booleans()),
        beyond=draw(st.booleans()),
        regular=draw(st.booleans()),
    )


@pytest.mark.parametrize("level", BYTES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
@example(case=Case(height=19, width=19, channels=130, out_channels=70, input_relu=True))
@example(case=Case(height=1, width=1, channels=1, out_channels=1))
@example(case=Case(height=96, width=90, channels=64, out_channels=40))  # in strips
@example(case=Case(channels=40, beyond=True))
@example(case=Case(channels=40, beyond=True, middle="relu"))
@example(case=Case(height=60, width=60, channels=32, out_channels=64, input_relu=True, regular=True))  # the stem's
@example(case=Case(channels=70, out_channels=40, kernel=1, stride=2, beyond=True, regular=True))  # a shortcut
@example(case=Case(height=1, width=2, channels=3, kernel=5, dilation=3, regular=True))  # all windows hang over
def test_layers_are_exact(level: str, case: Case) -> None:
    check(case, level)


@pytest.mark.slow
@pytest.mark.parametrize("level", BYTES)
@settings(max_examples=3000, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_layers_are_exact_at_length(level: str, case: Case) -> None:
    check(case, level)


@pytest.mark.parametrize("level", BYTES)
def test_the_largest_sums_fit(level: str) -> None:
    """Every product at its largest: 255 times -127 a channel, of 2,048 channels."""
    channels = 2048
    one = np.ones(channels, np.float32)
    for middle, weight in (("relu", 1.0), ("relu", -1.0), ("none", 1.0), ("none", -1.0)):
        net = network(level, "bf16", channels)
        value = net.separable(
            net.load(),
            filters=one[None] * 1024,
            weights=np.full((3, channels), weight, np.float32),
            middle=middle,
            kernel=1,
            steps=one,
        )
        for sign in (1, -1):
            output = np.zeros((1, 2, 2, 3), np.float32)
            net.run(np.full((1, 2, 2, channels), sign, np.float32), value, output)
            held = (255 if sign > 0 else 0) if middle == "relu" else (127 if sign > 0 else -128)
            expected = torch.tensor(float(held * channels) * weight)
            kept = expected.to(KEPT[level])
            if kept.isfinite():  # half precision does not hold half a million, and is done again in bf16
                assert (output == kept.float().numpy()).all()
            else:
                assert (output == expected.to(torch.bfloat16).float().numpy()).all()


def chain(channels: int, depth: int) -> list[dict[str, NDArray[np.float32]]]:
    random = np.random.default_rng(channels)
    return [
        {
            "filters": random.normal(0, 1 / 3, (9, channels)).astype(np.float32),
            "weights": random.normal(0, channels**-0.5, (channels, channels)).astype(np.float32),
            "steps": np.full(channels, 3 / 127, np.float32),
        }
        for _ in range(depth)
    ]


@pytest.mark.parametrize("level", BYTES)
@pytest.mark.parametrize("size", [(10, 11), (19, 19), (60, 90)])
@pytest.mark.parametrize("channels", [40, 96])
@pytest.mark.parametrize("mixed", [False, True])
def test_layers_together(level: str, size: tuple[int, int], channels: int, mixed: bool) -> None:
    """Flows, strips and bands, of bytes alone and beside others: one result, whatever is computed together."""
    count, (height, width) = 3, size
    random = np.random.default_rng(0)
    x = random.normal(0, 1, (count, height, width, channels)).astype(np.float32)
    results = []
    for threads, latency, together in ((1, False, 1), (1, False, 3), (2, False, 3), (2, True, 3), (3, True, 3)):
        net = network(level, "bf16", channels, threads, latency)
        value = first = net.load()
        for i, weights in enumerate(chain(channels, 5)):
            options: dict[str, Any] = {"residual": first} if i == 3 else {}
            if mixed and i % 2 == 1:
                weights = {**weights, "steps": None}  # type: ignore[dict-item]
            value = net.separable(value, **weights, kernel=3, padding="same", input_relu=True, **options)
        output = np.full((count, height, width, channels), np.nan, np.float32)
        for i in range(0, count, together):
            net.run(x[i : i + together], value, output[i : i + together])
        results.append(output)
    assert np.isfinite(results[0]).all()
    for other in results[1:]:
        assert np.array_equal(results[0], other)
    expected = torch.from_numpy(x).permute(0, 3, 1, 2).double()
    y = expected
    for i, weights in enumerate(chain(channels, 5)):
        filters = torch.from_numpy(weights["filters"].T.copy()).double().reshape(channels, 1, 3, 3)
        y = F.conv2d(F.relu(y), filters, groups=channels, padding=1)
        y = F.conv2d(y, torch.from_numpy(weights["weights"]).double()[:, :, None, None])
        y = y + expected if i == 3 else y
    found = torch.from_numpy(results[0]).permute(0, 3, 1, 2)
    assert 0 < float((found - y).norm() / y.norm()) < 0.08


def test_wrong_steps_are_refused() -> None:
    net = network("scalar", "bf16", 3)
    value = net.load()
    weights: dict[str, Any] = {"filters": np.ones((9, 3), np.float32), "weights": np.ones((4, 3), np.float32)}
    for steps, options, message in (
        (np.ones(2, np.float32), {}, "expected 3 numbers as steps, got 2"),
        (np.array([1, 0, 1], np.float32), {}, "expected steps above zero"),
        (np.array([1, np.nan, 1], np.float32), {}, "expected steps above zero"),
        (np.ones(3, np.float32), {"middle": "elu"}, "an ELU cannot be counted in steps"),
        (np.ones(3, np.float32), {"weights": np.full((4, 3), np.inf, np.float32)}, "expected finite weights"),
        (np.full(3, 1e30, np.float32), {"weights": np.full((4, 3), 1e30, np.float32)}, "expected finite weights"),
    ):
        with pytest.raises(ValueError, match=message):
            net.separable(value, **{**weights, **options}, kernel=3, steps=steps)
    with pytest.raises(TypeError):
        net.separable(value, **weights, kernel=3, steps=np.ones(3))
    one = np.ones(3, np.float32)
    for at, numbers, options, message in (
        (value, np.ones((4, 27), np.float32), {"steps": np.ones(2, np.float32)}, "expected 3 numbers as steps, got 2"),
        (value, np.ones((4, 27), np.float32), {"steps": -one}, "expected steps above zero"),
        (value, np.full((4, 27), np.nan, np.float32), {"steps": one}, "expected finite weights"),
        (0, np.ones((4, 27), np.float32), {"steps": one}, "the image is not counted in steps"),
    ):
        with pytest.raises(ValueError, match=message):
            net.convolution(at, weights=numbers, kernel=3, **options)
    wide = network("scalar", "bf16", 4000)
    with pytest.raises(ValueError, match="expected at most 32,768 bytes a sum"):
        wide.convolution(
            wide.load(), weights=np.ones((1, 36000), np.float32), kernel=3, steps=np.ones(4000, np.float32)
        )


# ------------------------------------------------------------------------------------------------ whole networks


@pytest.mark.parametrize("case", COVERED)
def test_networks(case: str) -> None:
    """Near the reference; the same in every batch, mode and number of threads."""
    name, options, size = COVERED[case]
    model = model_of(name, options)
    calibration, x = images(model, 6, size, size), images(model, 5, size, size + 6)
    with torch.inference_mode():
        expected = model(x)
    one = xception.compile(model, "int8", num_threads=1, calibration=calibration)
    assert one.backend == "native"
    found = one(x)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.12
    for threads, mode in ((2, "throughput"), (2, "latency"), (3, "latency")):
        other = xception.compile(model, "int8", num_threads=threads, mode=mode, calibration=calibration)  # type: ignore[arg-type]
        assert torch.equal(other(x), found)
        alone = torch.cat([other(x[i : i + 1], "pooled") for i in range(5)])  # a head may be PyTorch's
        assert torch.equal(alone, one(x, "pooled"))


@pytest.mark.parametrize("level", BYTES)
@pytest.mark.parametrize("case", ["the paper's, narrow", "aligned", "pre-activated"])
def test_networks_at_every_level(level: str, case: str) -> None:
    name, options, size = COVERED[case]
    model = model_of(name, options)
    x = images(model, 4, size, size + 1)
    batch = np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
    with torch.inference_mode():
        expected = model(x)
    net = network(level, "bf16", 3, 2)
    value = lower(model, net, steps_of(model, batch)).logits
    assert value is not None
    output = np.full((4, *net.shape(value, size, size + 1)), np.nan, np.float32)
    net.run(batch, value, output)
    found = torch.from_numpy(output)[:, 0, 0]
    assert float((found - expected).norm() / expected.norm()) < 0.12


def test_which_layers_count_in_steps() -> None:
    model = model_of("xception", {**COVERED["the paper's, narrow"][1]})
    batch = np.random.default_rng(0).normal(0, 1, (3, 64, 64, 3)).astype(np.float32)
    steps = steps_of(model, batch)
    pointwise = {m.pointwise for m in model.modules() if hasattr(m, "pointwise")}
    maps = {m.conv for m in model.modules() if isinstance(m, ConvNorm)} - {model.entry_flow.stem.conv1.conv}  # type: ignore[union-attr]
    assert set(steps) == pointwise | maps
    rectified = {model.entry_flow.stem.conv2.conv, model.entry_flow.block1.shortcut.conv}  # type: ignore[union-attr]
    for conv, counted in steps.items():
        sizes = counted.steps
        assert (sizes.dtype, sizes.shape) == (np.float32, (conv.in_channels,))
        assert (sizes > 0).all()
        assert counted.signed == (conv not in rectified)
    # Nothing of these images is cut off.
    seen: dict[Any, Tensor] = {}
    for module in model.modules():
        if hasattr(module, "pointwise"):

            def note(conv: Any, inputs: tuple[Tensor]) -> None:
                x = F.relu(inputs[0]) if conv.input_relu else inputs[0]
                seen[conv.pointwise] = conv.depthwise(x).abs().amax((0, 2, 3))

            module.register_forward_pre_hook(note)
        elif isinstance(module, ConvNorm) and module.conv in steps:

            def note_map(unit: Any, inputs: tuple[Tensor]) -> None:
                seen[unit.conv] = inputs[0].abs().amax((0, 2, 3))

            module.register_forward_pre_hook(note_map)
    with torch.inference_mode():
        model(torch.from_numpy(batch).permute(0, 3, 1, 2))
    assert set(seen) == set(steps)
    for conv, found in seen.items():
        counted = found / torch.from_numpy(steps[conv].steps)  # type: ignore[assignment]
        assert float(counted.max()) == pytest.approx(127 if steps[conv].signed else 255, rel=1e-3)  # type: ignore[attr-defined]
    none = model_of("xception", {**COVERED["ELU between"][1]})
    assert {conv.kernel_size for conv in steps_of(none, batch)} == {(3, 3), (1, 1)}  # the stem's and the shortcuts
    assert not any(hasattr(m, "pointwise") and m.pointwise in steps_of(none, batch) for m in none.modules())


def test_one_image_in_many_does_not_make_all_steps_coarse() -> None:
    model: Any = model_of("xception", {**COVERED["the paper's, narrow"][1]})
    random = np.random.default_rng(0)
    batch = random.normal(0, 1, (30, 64, 64, 3)).astype(np.float32)
    conv = model.entry_flow.stem.conv2.conv
    before = steps_of(model, batch)[conv].steps
    batch[7] *= 50
    after = steps_of(model, batch)[conv].steps
    assert (after < 25 * before).all()
    assert (after > 5 * before).all()


def test_channels_that_were_always_zero_have_a_step() -> None:
    model = model_of("xception", {**COVERED["the paper's, narrow"][1]})
    unit: Any = model.middle_flow[0].units[1]  # type: ignore[index, union-attr]
    with torch.no_grad():
        unit.conv.depthwise.weight[3:7] = 0
    x = images(model, 4, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        found = xception.compile(model, "int8", calibration=x)(x)
    assert float((found - expected).norm() / expected.norm()) < 0.12


def test_what_is_not_finite_is_seen_in_its_image() -> None:
    model = model_of("xception", {**COVERED["no residual"][1]})
    x = images(model, 3, 64, 64)
    compiled = xception.compile(model, "int8", calibration=x)
    expected = compiled(x)
    assert expected.isfinite().all()
    for bad in (np.nan, np.inf, -np.inf):
        spoiled = x.clone()
        spoiled[1, 0, 20, 30] = bad
        for output in ("logits", "features", "pooled"):
            found = compiled(spoiled, output)  # type: ignore[arg-type]
            assert found[1].isnan().all()
            assert found[[0, 2]].isfinite().all()
        assert torch.equal(compiled(spoiled)[[0, 2]], expected[[0, 2]])


def test_wrong_use() -> None:
    model = model_of("xception", {**COVERED["the paper's, narrow"][1]})
    x = images(model, 2, 64, 64)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"precision": "int8"}, "calibration images are for the precision int8, which needs them; got none"),
        ({"precision": "bf16", "calibration": x}, "which needs them; got some for bf16"),
        ({"precision": "int8", "calibration": x[:0]}, "expected at least one calibration image for int8"),
        ({"precision": "int8", "calibration": x[:, :2]}, "expected images of 3 channels"),
        ({"precision": "int8", "calibration": x * torch.nan}, "got NaN or infinity"),
        ({"precision": "int8", "calibration": x, "backend": "torch"}, "int8 is for the compiled executor only"),
        ({"precision": "int8", "calibration": x, "backend": "openvino"}, "int8 is for the compiled executor only"),
    ]
    for options, message in wrong:
        with pytest.raises(ConfigError, match=message):
            xception.compile(model, **options)
    inception = model_of("inception_v1", {"num_classes": 5})
    with pytest.raises(ConfigError, match="int8 is for the compiled executor only, which cannot be used: InceptionV1"):
        xception.compile(inception, "int8", calibration=images(inception, 1, 64, 64))


def test_calibration_takes_what_a_call_takes() -> None:
    model = model_of("xception", {**COVERED["the paper's, narrow"][1]})
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    normalised = (pixels.float() / 255 - 0.5) / 0.5
    x = images(model, 2, 64, 64)
    by_pixels = xception.compile(model, "int8", calibration=pixels.numpy())(x)
    assert torch.equal(xception.compile(model, "int8", calibration=normalised.permute(0, 3, 1, 2))(x), by_pixels)


@pytest.mark.parametrize("cap", ["scalar", "avx2", "avx512"])
def test_cap(cap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if cap not in BYTES:
        pytest.skip(f"this processor has no {cap}")
    monkeypatch.setenv("XCEPTION_MAX_ISA", cap)
    assert backend.kernel_level("int8") in ((cap,) if cap != "avx512" else ("avx512", "avx512_vnni", "avx512_bf16"))
    model = model_of("xception_small", {})
    x = images(model, 2, 28, 28)
    with torch.inference_mode():
        expected = model(x)
    compiled = xception.compile(model, "int8", calibration=x)
    assert compiled.level == backend.kernel_level("int8")
    assert float((compiled(x) - expected).norm() / expected.norm()) < 0.12
