"""Training in float32 on tiles that multiply bf16: as exact as without them, whatever the numbers are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trainer_cases import LEVELS, Data, Function, native, right_of, run_native, threads

from xception.ops.reference import Convolution

PIECES = [level for level, kind in LEVELS if kind == "fp32" and level.startswith("amx")]
LARGEST = float(np.finfo(np.float32).max)

pytestmark = [native, pytest.mark.skipif(not PIECES, reason="the tiles' emulation needs AVX-512")]
at_every_level = pytest.mark.parametrize("level", PIECES)

SIZES = {
    "one": (1, 1, 2, 1, 1),
    "less than a tile": (2, 3, 5, 7, 5),
    "odd groups": (3, 19, 19, 33, 47),
    "whole tiles": (2, 8, 16, 64, 96),
    "more groups than are split at a time": (1, 9, 10, 800, 20),
    "more pixels than are split at a time": (1, 30, 31, 20, 17),
}


def pixels_by_weights(images: int, height: int, width: int, channels: int, out: int, *, exponents: int = 0) -> Data:
    """A 1x1 convolution whose normalisation changes nothing: y is the product, and so are both gradients.

    Numbers have all their 24 bits, and sizes that are apart by up to 2^(2 * `exponents`).
    """
    generator = np.random.default_rng(0)

    def floats(*shape: int, apart: int = 0) -> Tensor:
        values = np.ldexp(generator.standard_normal(shape), generator.integers(-apart, apart + 1, shape))
        return torch.from_numpy(values.astype(np.float32))

    def call(function: Function, tensors: dict[str, Tensor], parts: dict[str, dict[str, Any]]) -> Tensor:
        return function(tensors["x"], Convolution(**parts["conv"], stride=1, padding=0))

    tensors = {
        "x": floats(images, channels, height, width, apart=exponents),
        "conv.weight": floats(out, channels, 1, 1),
        "conv.running_mean": torch.zeros(out),
        "conv.running_variance": torch.ones(out),
    }
    norm = {"gathers": False, "momentum": 0.1, "epsilon": 0.0}
    return Data("normalised_conv2d", tensors, {"conv": norm}, floats(images, out, height, width), call)


def terms_of(data: Data) -> Data:
    """The same of the numbers' sizes: what each sum's terms sum to without their signs."""
    tensors = {name: tensor.abs() for name, tensor in data.tensors.items()}
    return Data(data.name, tensors, data.norms, data.gradient.abs(), data.make)


@at_every_level
@pytest.mark.parametrize("exponents", [0, 8])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_as_exact_as_float32(sizes: str, exponents: int, level: str) -> None:
    data = pixels_by_weights(*SIZES[sizes], exponents=exponents)
    right, terms = right_of(data), right_of(terms_of(data))
    for count in (1, 2):
        with threads(count):
            found, plain = run_native(data, level, "fp32"), run_native(data, "scalar", "fp32")
        for name in ("output", "x", "conv.weight"):
            ours, floats = (((of[name].double() - right[name]) / terms[name]).abs() for of in (found, plain))
            assert float(ours.max()) <= max(1.2 * float(floats.max()), 2.0**-22), name  # some roundings of one term
            assert float(ours.norm()) <= max(float(floats.norm()), 2.0**-24 * ours.numel() ** 0.5), name


@at_every_level
@pytest.mark.parametrize("where", ["x", "gradient", "conv.weight"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, LARGEST, np.nan])
def test_what_has_no_pieces_is_summed_as_floats(value: float, where: str, level: str) -> None:
    data = pixels_by_weights(2, 19, 19, 40, 70)
    if value == LARGEST:  # sums stay finite
        data.tensors["x"].mul_(1e-3)
        data.tensors["conv.weight"].mul_(1e-3)
        data.gradient.mul_(1e-3)
    spoilt = data.gradient if where == "gradient" else data.tensors[where]
    spoilt[(1, 5) if where == "conv.weight" else (1, 5, 7, 3)] = value
    found, plain = run_native(data, level, "fp32"), run_native(data, "scalar", "fp32")
    for name, numbers in plain.items():
        torch.testing.assert_close(found[name], numbers, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)
