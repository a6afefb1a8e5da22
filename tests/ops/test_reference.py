"""The reference operations against definitions written out with loops, and against each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xception.errors import ConfigError
from xception.ops.reference import (
    ACTIVATIONS,
    ORDERS,
    activate,
    depthwise_conv2d,
    max_pool2d_same,
    pad_same,
    same_padding,
    separable_conv2d,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "dilation", "padding"),
    [
        (147, 3, 2, 1, (1, 1)),  # the four pools of Xception at 299 pixels
        (74, 3, 2, 1, (0, 1)),
        (37, 3, 2, 1, (1, 1)),
        (19, 3, 2, 1, (1, 1)),
        (224, 7, 2, 1, (2, 3)),
        (10, 3, 1, 1, (1, 1)),
        (10, 3, 1, 4, (4, 4)),
        (10, 2, 1, 1, (0, 1)),
        (10, 1, 2, 1, (0, 0)),
        (9, 1, 3, 1, (0, 0)),
        (1, 3, 2, 1, (1, 1)),
    ],
)
def test_same_padding_is_tensorflows(
    size: int, kernel_size: int, stride: int, dilation: int, padding: tuple[int, int]
) -> None:
    assert same_padding(size, kernel_size, stride, dilation) == padding


@given(size=st.integers(1, 64), kernel_size=st.integers(1, 7), stride=st.integers(1, 4), dilation=st.integers(1, 3))
def test_same_padding_is_the_least_that_gives_every_position(
    size: int, kernel_size: int, stride: int, dilation: int
) -> None:
    before, after = same_padding(size, kernel_size, stride, dilation)
    window = dilation * (kernel_size - 1) + 1
    outputs = math.ceil(size / stride)
    assert 0 <= before <= after <= before + 1
    assert size + before + after >= (outputs - 1) * stride + window
    assert before + after == 0 or size + before + after == (outputs - 1) * stride + window


@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation"), list(itertools.product((1, 2, 3, 4, 5), (1, 2, 3), (1, 2)))
)
def test_max_pool_same_is_a_pool_over_minus_infinity(kernel_size: int, stride: int, dilation: int) -> None:
    for height, width in ((1, 2), (7, 8), (8, 7), (9, 12)):
        x = (randn(2, 3, height, width) - 10).requires_grad_()  # zeros as padding would win
        y = max_pool2d_same(x, kernel_size, stride, dilation)
        padded = pad_same(x, kernel_size, stride, dilation, value=-math.inf)
        expected = F.max_pool2d(padded, kernel_size, stride, dilation=dilation)[
            :, :, : math.ceil(height / stride), : math.ceil(width / stride)
        ]
        assert y.shape == (2, 3, math.ceil(height / stride), math.ceil(width / stride))
        assert torch.equal(y, expected)
        upstream = randn(*y.shape, seed=1)
        assert torch.equal(torch.autograd.grad(y, x, upstream)[0], torch.autograd.grad(expected, x, upstream)[0])


def test_max_pool_same_starts_at_the_first_pixel_on_even_sizes() -> None:
    x = torch.arange(8.0).flip(0).reshape(1, 1, 1, 8).expand(1, 1, 8, 8)
    assert max_pool2d_same(x)[0, 0, 0].tolist() == [7, 5, 3, 1]
    assert F.max_pool2d(x, 3, 2, 1)[0, 0, 0].tolist() == [7, 6, 4, 2]


def depthwise_by_loops(x: Tensor, weight: Tensor, stride: int, pad: tuple[int, int], dilation: int) -> Tensor:
    """The definition: output channel c * m + j at (i, k) sums filter c * m + j over channel c."""
    multiplier = weight.shape[0] // x.shape[1]
    size = weight.shape[2]
    padded = F.pad(x, (*pad, *pad))
    height = (padded.shape[2] - dilation * (size - 1) - 1) // stride + 1
    width = (padded.shape[3] - dilation * (size - 1) - 1) // stride + 1
    out = torch.zeros(x.shape[0], weight.shape[0], height, width, dtype=x.dtype)
    for channel, dy, dx in itertools.product(range(weight.shape[0]), range(size), range(size)):
        rows = slice(dy * dilation, dy * dilation + (height - 1) * stride + 1, stride)
        columns = slice(dx * dilation, dx * dilation + (width - 1) * stride + 1, stride)
        out[:, channel] += weight[channel, 0, dy, dx] * padded[:, channel // multiplier, rows, columns]
    return out


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 12),
    kernel_size=st.sampled_from((1, 2, 3, 5)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    multiplier=st.integers(1, 3),
)
def test_depthwise_is_one_filter_a_channel(
    size: int, kernel_size: int, stride: int, dilation: int, multiplier: int
) -> None:
    x, weight = randn(2, 3, size, size), randn(3 * multiplier, 1, kernel_size, kernel_size, seed=1)
    bias = randn(3 * multiplier, seed=2)
    pad = same_padding(size, kernel_size, stride, dilation)
    expected = depthwise_by_loops(x, weight, stride, pad, dilation)[
        :, :, : math.ceil(size / stride), : math.ceil(size / stride)
    ]
    y = depthwise_conv2d(x, weight, bias, stride=stride, dilation=dilation)
    torch.testing.assert_close(y, expected + bias[:, None, None])


def test_depthwise_takes_a_number_as_padding_on_every_side() -> None:
    x, weight = randn(1, 2, 8, 8), randn(2, 1, 3, 3, seed=1)
    for padding in (0, 1, 2):
        y = depthwise_conv2d(x, weight, stride=2, padding=padding)
        torch.testing.assert_close(y, depthwise_by_loops(x, weight, 2, (padding, padding), 1))


@pytest.mark.parametrize("shape", [(3, 1, 3, 3), (4, 2, 3, 3), (4, 1, 3), (2, 1, 3, 3)])
def test_depthwise_refuses_weights_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="4 channels"):
        depthwise_conv2d(torch.zeros(1, 4, 5, 5), torch.zeros(shape))


def pointwise_by_sum(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nchw,oc->nohw", x, weight[:, :, 0, 0])


@pytest.mark.parametrize("input_relu", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("intermediate", ACTIVATIONS)
@pytest.mark.parametrize("output", ACTIVATIONS)
def test_separable_is_what_its_definition_says(order: str, intermediate: str, output: str, input_relu: bool) -> None:
    x, pointwise, bias = randn(2, 4, 7, 6), randn(5, 4, 1, 1, seed=1), randn(5, seed=2)
    depthwise = randn(4 if order == "depthwise_pointwise" else 5, 1, 3, 3, seed=3)
    residual = randn(2, 5, 7, 6, seed=4)
    functions = {"none": lambda t: t, "relu": lambda t: t.clamp(min=0), "elu": F.elu}
    expected = x.clamp(min=0) if input_relu else x
    if order == "depthwise_pointwise":
        expected = functions[intermediate](depthwise_by_loops(expected, depthwise, 1, (1, 1), 1))
        expected = pointwise_by_sum(expected, pointwise)
    else:
        expected = functions[intermediate](pointwise_by_sum(expected, pointwise))
        expected = depthwise_by_loops(expected, depthwise, 1, (1, 1), 1)
    expected = functions[output](expected + bias[:, None, None] + residual)
    given_x, given_residual = x.clone(), residual.clone()
    y = separable_conv2d(
        x,
        depthwise,
        pointwise,
        bias,
        order=order,  # type: ignore[arg-type]
        input_relu=input_relu,
        intermediate_activation=intermediate,  # type: ignore[arg-type]
        residual=residual,
        output_activation=output,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(y, expected)
    assert torch.equal(x, given_x)
    assert torch.equal(residual, given_residual)


@pytest.mark.parametrize("order", ORDERS)
def test_separable_has_exact_gradients(order: str) -> None:
    inputs = [randn(1, 2, 5, 4), randn(3 if order == "pointwise_depthwise" else 2, 1, 3, 3), randn(3, 2, 1, 1)]
    inputs += [randn(3), randn(1, 3, 3, 2)]
    for tensor in inputs:
        tensor.requires_grad_()

    def function(x: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return separable_conv2d(
            x,
            depthwise,
            pointwise,
            bias,
            stride=2,
            order=order,  # type: ignore[arg-type]
            input_relu=True,
            intermediate_activation="elu",
            residual=residual,
        )

    assert torch.autograd.gradcheck(function, inputs)


def test_separable_reads_strided_and_channels_last_tensors() -> None:
    x, depthwise, pointwise = randn(2, 4, 9, 12), randn(4, 1, 3, 3, seed=1), randn(6, 4, 1, 1, seed=2)
    view = x[:, :, ::2, 1::3]
    expected = separable_conv2d(view.contiguous(), depthwise, pointwise)
    torch.testing.assert_close(separable_conv2d(view, depthwise, pointwise), expected)
    channels_last = view.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(separable_conv2d(channels_last, depthwise, pointwise), expected)


def test_separable_refuses_what_does_not_fit() -> None:
    x, depthwise, pointwise = randn(1, 2, 4, 4), randn(2, 1, 3, 3), randn(3, 2, 1, 1)
    with pytest.raises(ConfigError, match="order"):
        separable_conv2d(x, depthwise, pointwise, order="backwards")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="residual"):
        separable_conv2d(x, depthwise, pointwise, residual=randn(1, 3, 1, 1))
    with pytest.raises(ConfigError, match="activation"):
        activate(x, "gelu")  # type: ignore[arg-type]
