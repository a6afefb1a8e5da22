"""Convolutions that train in the compiled extension, against their definition in float64; and which ones those are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conv_cases import FIXED_CONVOLUTIONS, ConvCase, conv_data
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from trainer_cases import (
    assert_errors_are_of_the_size_of_torchs_own,
    assert_gradients_are_right,
    assert_takes_the_definition,
    at_every_level,
    at_level,
    distance,
    leaves,
    native,
    right_of,
    run,
    run_native,
    watched,
)
from trainer_oracle import assert_the_oracle_is_the_definition, check

from xception.ops import reference
from xception.ops.convolutions import Convolution, normalised_conv2d

ODD = st.sampled_from([1, 3, 5, 15, 16, 17, 32, 33, 47])


@st.composite
def cases(draw: st.DrawFn) -> ConvCase:
    kernel, stride = draw(st.sampled_from([1, 1, 2, 3, 3, 3, 4, 5])), draw(st.integers(1, 3))
    case = ConvCase(
        images=draw(st.integers(1, 4)),
        height=draw(st.integers(1, 12)),
        width=draw(st.integers(1, 12)),
        channels=draw(ODD),
        out=draw(ODD),
        kernel=kernel,
        stride=stride,
        padding=draw(st.integers(0, min(2, kernel - 1))),
        output_relu=draw(st.booleans()),
        momentum=draw(st.sampled_from([0.1, 0.7, None])),
        affine=draw(st.booleans()),
        epsilon=draw(st.sampled_from([1e-3, 1e-5])),
        seed=draw(st.integers(0, 10**6)),
    )
    images, _, height, width = case.output
    assume(min(height, width) >= 1)
    return replace(case, gathers=images * height * width > 5 and draw(st.booleans()))


def check_case(case: ConvCase, level: str, kind: str, count: int) -> None:
    check(conv_data(case, kind, tame=kind == "bf16"), level, kind, count, kink=2e-5)


@native
@at_every_level
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(case=cases(), count=st.integers(1, 3))
def test_generated(level: str, kind: str, case: ConvCase, count: int) -> None:
    check_case(case, level, kind, count)


@native
@pytest.mark.slow
@pytest.mark.timeout(3600)
@at_every_level
@settings(max_examples=3000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(case=cases(), count=st.integers(1, 3))
def test_generated_at_length(level: str, kind: str, case: ConvCase, count: int) -> None:
    check_case(case, level, kind, count)


@settings(max_examples=40)
@given(case=cases())
def test_the_oracle_is_the_definition(case: ConvCase) -> None:
    assert_the_oracle_is_the_definition(conv_data(case))


@native
@at_every_level
@pytest.mark.parametrize("case", FIXED_CONVOLUTIONS)
def test_errors_are_of_the_size_of_torchs_own(case: str, level: str, kind: str) -> None:
    assert_errors_are_of_the_size_of_torchs_own(conv_data(FIXED_CONVOLUTIONS[case], kind), level, kind)


@pytest.mark.parametrize(
    "case",
    [
        ConvCase(height=4, width=5, channels=2, out=3, momentum=None),
        ConvCase(height=5, width=4, channels=2, out=3, stride=2, padding=1, gathers=False, output_relu=True),
        ConvCase(height=3, width=4, channels=3, out=2, kernel=1, stride=2, momentum=None),
    ],
    ids=["gathers", "relu", "pixels"],
)
def test_gradients_of_the_definition(case: ConvCase) -> None:
    assert_gradients_are_right(conv_data(case))


@native
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 2, 0), (3, 2, 1), (5, 1, 2)])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_it_is_what_modules_of_pytorch_compute(kernel: int, stride: int, padding: int, momentum: float | None) -> None:
    """Over three batches, statistics and all; a momentum of None is the average of the batches'."""
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 18, kernel, stride, padding, bias=False)
    norm = nn.BatchNorm2d(18, momentum=momentum)
    running_mean, running_variance = torch.zeros(18), torch.ones(18)
    for batch in range(3):
        x = torch.randn(2, 5, 11, 12)
        right = norm(conv(x)).relu()
        convolution = Convolution(
            weight=conv.weight, stride=stride, padding=padding, scale=norm.weight, offset=norm.bias,
            running_mean=running_mean, running_variance=running_variance, epsilon=norm.eps,
            momentum=1 / (batch + 1) if momentum is None else momentum,
        )  # fmt: skip
        with at_level("scalar") as taken:
            found = normalised_conv2d(x, convolution, output_relu=True)
        assert taken.call_count == 1
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(running_mean, norm.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(running_variance, norm.running_var, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------- parts that are not there


@native
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("missing", [("scale",), ("offset",), ("scale", "offset")])
def test_without_scale_or_offset(missing: tuple[str, ...], gathers: bool) -> None:
    data = conv_data(ConvCase(gathers=gathers, padding=1, stride=2))
    data = data.having({f"conv.{name}": None for name in missing})
    right, found = right_of(data), run_native(data, "scalar", "fp32")
    for name, value in right.items():
        assert distance(found[name], value) <= 1e-5 * float(value.norm()), name


@native
def test_statistics_that_nobody_keeps() -> None:
    """No running statistics at all; or none that move."""
    data = conv_data(ConvCase(momentum=None))
    bare = data.having({"conv.running_mean": None, "conv.running_variance": None})
    found, right = run_native(bare, "scalar", "fp32"), run_native(data, "scalar", "fp32")
    assert found.keys() == right.keys() - {"conv.running_mean", "conv.running_variance"}
    assert all(torch.equal(value, right[name]) for name, value in found.items())
    assert all(torch.equal(right[f"conv.{k}"], data.tensors[f"conv.{k}"]) for k in ("running_mean", "running_variance"))


# ----------------------------------------------------------------------------------------- which path is taken

# At the edges of what the kernels know: the last that they do, and the first that they do not.
PIXEL_ROW = ConvCase(images=1, height=1, width=1 << 14, channels=1, out=2, kernel=1, gathers=False)
WIDE = ConvCase(height=1, width=2, channels=1, out=2, kernel=1, gathers=False)
EDGES = {
    "kernel": (ConvCase(kernel=16, height=17, width=16), ConvCase(kernel=17, height=17, width=18)),
    "stride": (ConvCase(stride=16, height=40, width=20), ConvCase(stride=17, height=40, width=20)),
    "depth": (ConvCase(kernel=5, channels=163), ConvCase(kernel=5, channels=164)),
    "padding": (ConvCase(padding=2), ConvCase(padding=3)),
    "padding of pixels": (ConvCase(kernel=1, channels=5000), ConvCase(kernel=1, padding=1)),
    # And of the sizes that the extension takes.
    "row": (PIXEL_ROW, replace(PIXEL_ROW, width=(1 << 14) + 1)),
    "padded row": (
        replace(PIXEL_ROW, kernel=3, padding=2, width=(1 << 14) - 2),
        replace(PIXEL_ROW, kernel=3, padding=2, width=1 << 14),
    ),
    "images": (
        replace(PIXEL_ROW, images=1 << 16, width=1),
        replace(PIXEL_ROW, images=(1 << 20) + 1, width=1),
    ),
    "channels": (replace(WIDE, channels=1 << 16), replace(WIDE, channels=(1 << 16) + 1)),
    "outputs": (replace(WIDE, out=1 << 16), replace(WIDE, out=(1 << 16) + 1)),
}


@native
@pytest.mark.parametrize("edge", EDGES)
def test_the_edges_of_what_the_kernels_know(edge: str) -> None:
    inside, outside = EDGES[edge]
    assert_errors_are_of_the_size_of_torchs_own(conv_data(inside), "scalar", "fp32")
    assert_takes_the_definition(conv_data(outside))


@native
@pytest.mark.parametrize("shape", [(6, 5, 1, 3), (6, 5, 3, 1), (6, 5, 2, 3)])
def test_windows_that_are_not_square_take_the_definition(shape: tuple[int, ...]) -> None:
    data = conv_data(ConvCase(gathers=False)).having({"conv.weight": torch.randn(shape)})
    size = data.call(data.definition, data.tensors).shape
    assert_takes_the_definition(replace(data, gradient=torch.randn(size)))


def test_one_pixel_has_no_variance() -> None:
    for case in (ConvCase(images=1, height=3, width=3), ConvCase(images=1, height=2, width=2, kernel=1, stride=2)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            run(normalised_conv2d, conv_data(case))


@native
def test_one_pixel_may_be_normalised_by_what_is_known() -> None:
    for case in (ConvCase(images=1, height=3, width=3), ConvCase(images=1, height=1, width=1, kernel=1)):
        data = conv_data(replace(case, gathers=False))
        right, found = right_of(data), run_native(data, "scalar", "fp32")
        for name, value in right.items():
            assert distance(found[name], value) <= 1e-5 * float(value.norm()), name


WRONG = {
    "too few channels": ("weight", (6, 4, 3, 3)),
    "too many channels": ("weight", (6, 6, 3, 3)),
    "a window larger than the map": ("weight", (6, 5, 8, 8)),
    "no kernel": ("weight", (6, 5)),
    "half a kernel": ("weight", (6, 5, 3)),
    "a third axis": ("weight", (6, 5, 3, 3, 3)),
    "scale": ("scale", (5,)),
    "one scale for all": ("scale", (1,)),
    "offset": ("offset", (7,)),
    "one offset for all": ("offset", (1,)),
    "mean": ("running_mean", (5,)),
    "one mean for all": ("running_mean", (1,)),
    "variance": ("running_variance", (7,)),
    "one variance for all": ("running_variance", (1,)),
}


@native
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("gathers", [False, True])
def test_wrong_sizes_are_refused(wrong: str, gathers: bool) -> None:
    """By the same errors as the definition's, or the extension's."""
    name, shape = WRONG[wrong]
    data = conv_data(ConvCase(gathers=gathers)).having({f"conv.{name}": torch.ones(shape)})
    for function in (normalised_conv2d, reference.normalised_conv2d):
        with pytest.raises((RuntimeError, ValueError)):
            data.call(function, leaves(data, wanted=frozenset(["x"])))


@native
@pytest.mark.parametrize("missing", [("running_mean",), ("running_variance",), ("running_mean", "running_variance")])
def test_statistics_that_are_needed(missing: tuple[str, ...]) -> None:
    """What does not gather them normalises by those that it is given."""
    data = conv_data(ConvCase(gathers=False)).having({f"conv.{name}": None for name in missing})
    for function in (normalised_conv2d, reference.normalised_conv2d):
        with pytest.raises((RuntimeError, ValueError)):
            data.call(function, leaves(data))


@native
@pytest.mark.parametrize("changed", [{"stride": 0}, {"stride": -1}, {"padding": -1}, {"padding": -3}])
def test_wrong_strides_and_paddings_are_refused(changed: dict[str, int]) -> None:
    convolution = replace(Convolution(weight=torch.randn(6, 5, 3, 3, requires_grad=True)), **changed)  # type: ignore[arg-type]
    x = torch.randn(2, 5, 7, 9)
    for function in (normalised_conv2d, reference.normalised_conv2d):
        with pytest.raises((RuntimeError, ValueError)):
            function(x, convolution)


@native
def test_weights_of_another_type_take_the_definition() -> None:
    data = conv_data(ConvCase())
    for kind in (torch.float64, torch.bfloat16):
        with watched() as taken:
            run(data.operation, data, kind)
        assert taken.call_count == 0
    mixed = leaves(data)
    mixed["conv.weight"] = mixed["conv.weight"].detach().bfloat16()
    with watched() as taken, torch.autocast("cpu", torch.bfloat16):
        assert data.call(data.operation, mixed).dtype == torch.bfloat16
    assert taken.call_count == 0
