"""Float32 on tiles that multiply bf16: each number in three pieces, and nothing of it lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from native_levels import LEVELS, network
from numpy.typing import NDArray

pytest.importorskip("xception._native")

Floats = NDArray[np.float32]
PIECES = [level for level, kind in LEVELS if kind == "fp32" and level.startswith("amx")]
LARGEST = float(np.finfo(np.float32).max)
# Below 2^-102 the last pieces are numbers that tiles take for zero.
SMALLEST = 2.0**-102

if not PIECES:
    pytest.skip("the tiles' emulation needs AVX-512", allow_module_level=True)

at_every_level = pytest.mark.parametrize("level", PIECES)


def product(level: str, x: Floats, weights: Floats, threads: int = 1, **options: Any) -> Floats:
    """`x` [pixels, channels] by `weights` [out, channels], as a 1x1 convolution of a row of pixels."""
    pixels, channels = x.shape
    net = network(level, "fp32", channels, threads)
    value = net.convolution(net.load(), weights=weights, kernel=1, **options)
    output = np.full((1, 1, pixels, len(weights)), 12345.0, np.float32)
    net.run(x.reshape(1, 1, pixels, channels), value, output)
    return output[0, 0]


def exact(x: Floats, weights: Floats) -> NDArray[np.float64]:
    found: NDArray[np.float64] = x.astype(np.float64) @ weights.T.astype(np.float64)
    return found


def floats(*shape: int, seed: int, exponents: int = 0) -> Floats:
    """All 24 bits of them, of sizes apart by up to 2^(2 * `exponents`)."""
    generator = np.random.default_rng(seed)
    plain = generator.standard_normal(shape)
    return np.ldexp(plain, generator.integers(-exponents, exponents + 1, shape)).astype(np.float32)


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda x: x == 0 or abs(x) >= SMALLEST)
# Those with all their bits set, and powers of two, come too seldom by themselves.
edges = st.sampled_from([LARGEST, -LARGEST, 3.3961775e38, 3.3961776e38, 0.99999994, 1.0000001, 1.9999999, -0.00390625])


@at_every_level
@settings(max_examples=200, deadline=None)
@given(values=st.lists(numbers | edges, min_size=40, max_size=40))
def test_a_number_is_the_sum_of_its_pieces(level: str, values: list[float]) -> None:
    """Bit for bit, as an activation and as a weight."""
    column = np.array(values, np.float32)
    one = np.eye(40, dtype=np.float32)
    found = product(level, np.diag(column), np.ones((1, 40), np.float32))
    assert np.array_equal(found[:, 0], column)
    assert np.array_equal(product(level, one, np.diag(column)), np.diag(column))


@at_every_level
@pytest.mark.parametrize("exponents", [0, 10])
@pytest.mark.parametrize(
    ("pixels", "channels", "out"),
    [(1, 1, 1), (15, 16, 32), (16, 17, 33), (17, 31, 5), (33, 33, 64), (100, 728, 70), (48, 2048, 32)],
)
def test_it_is_as_exact_as_float32(level: str, pixels: int, channels: int, out: int, exponents: int) -> None:
    x, weights = floats(pixels, channels, seed=1, exponents=exponents), floats(out, channels, seed=2)
    right = exact(x, weights)
    sizes = exact(np.abs(x), np.abs(weights))
    errors = {at: np.abs(product(at, x, weights) - right) / sizes for at in (level, "scalar")}
    assert errors[level].max() <= max(1.2 * errors["scalar"].max(), 2.0**-22)  # some roundings of one term
    assert np.sqrt((errors[level] ** 2).mean()) <= max(np.sqrt((errors["scalar"] ** 2).mean()), 2.0**-24)


@at_every_level
@pytest.mark.parametrize("value", [np.inf, -np.inf, LARGEST, np.nan])
@pytest.mark.parametrize("activation", ["none", "relu", "elu"])
def test_activations_without_pieces(level: str, value: float, activation: str) -> None:
    """They are summed as floats, and nobody else is: which numbers a pixel lies beside does not show in its own."""
    x, weights = floats(50, 40, seed=3), floats(70, 40, seed=4)
    weights[:, 7] /= 4
    plain = product(level, x, weights, activation=activation)
    x[20, 7] = x[35, 7] = value
    found = product(level, x, weights, activation=activation)
    with np.errstate(over="ignore"):
        right = exact(x, weights).astype(np.float32)
    right = {"none": torch.from_numpy, "relu": lambda y: F.relu(torch.from_numpy(y)),
             "elu": lambda y: F.elu(torch.from_numpy(y))}[activation](right).numpy()  # fmt: skip
    np.testing.assert_allclose(found[[20, 35]], right[[20, 35]], rtol=1e-6)
    others = np.delete(np.arange(50), [20, 35])
    assert np.array_equal(found[others], plain[others])


@at_every_level
@pytest.mark.parametrize("value", [np.inf, -np.inf, LARGEST, np.nan])
def test_weights_without_pieces(level: str, value: float) -> None:
    x, weights = np.abs(floats(50, 40, seed=3)) / 8, floats(70, 40, seed=4)
    plain = product(level, x, weights)
    weights[33, 5] = value
    found = product(level, x, weights)
    np.testing.assert_allclose(found, exact(x, weights), rtol=1e-5, atol=1e-5)
    far = np.delete(np.arange(70), range(32, 64))  # of other panels
    assert np.array_equal(found[:, far], plain[:, far])


@at_every_level
def test_infinity_beside_a_residual_and_among_images(level: str) -> None:
    """An image's numbers are the same whichever others it comes with, from any number of threads."""
    x, weights, bias = floats(3 * 7 * 9, 33, seed=5), floats(20, 33, seed=6), floats(20, seed=7)
    images = x.reshape(3, 7, 9, 33)
    images[1, 3, 4, 5] = np.inf

    def run(some: Floats, threads: int) -> Floats:
        net = network(level, "fp32", 33, threads)
        beside = net.convolution(net.load(), weights=weights, kernel=1)
        value = net.convolution(1, weights=weights, kernel=1, bias=bias, residual=beside, activation="relu")
        output = np.empty((len(some), 7, 9, 20), np.float32)
        net.run(np.ascontiguousarray(some), value, output)
        return output

    alone = np.concatenate([run(images[i : i + 1], 1) for i in range(3)])
    for threads in (1, 2, 3):
        assert np.array_equal(run(images, threads), alone, equal_nan=True)
    doubled = 2 * exact(x, weights).reshape(3, 7, 9, 20) + bias
    np.testing.assert_allclose(alone, np.maximum(doubled, 0), rtol=1e-4, atol=1e-4)
