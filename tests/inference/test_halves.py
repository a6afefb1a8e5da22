"""Products in half precision arithmetic: short chains whose sums are floats, and what is too large for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from native_levels import LEVELS, network
from numpy.typing import NDArray

pytest.importorskip("xception._native")

HALVES = [(level, kind) for level, kind in LEVELS if level.startswith("avx512_fp16")]
if not HALVES:
    pytest.skip("half precision's emulation needs AVX-512", allow_module_level=True)
UNIT = 2.0**-11  # of half precision's rounding
at_each_level = pytest.mark.parametrize(("level", "kind"), HALVES)

Array = NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def halves(x: Array) -> Array:
    """As they are after rounding, so that only the arithmetic differs."""
    return x.astype(np.float16).astype(np.float32)


def product(level: str, kind: str, x: Array, weights: Array, bias: Array | None = None, threads: int = 1) -> Array:
    """A 1x1 convolution of [images, height, width, K] with [out, K]."""
    net = network(level, kind, x.shape[-1], threads)
    out = net.convolution(net.load(), kernel=1, weights=weights, bias=bias)
    result = np.full((*x.shape[:3], len(weights)), 12345, np.float32)
    net.run(x, out, result)
    return result


def exact(x: Array, weights: Array) -> NDArray[np.float64]:
    found: NDArray[np.float64] = x.astype(np.float64) @ weights.astype(np.float64).T
    return found


@at_each_level
@settings(deadline=None, max_examples=60)
@given(depth=st.integers(1, 1500), out=st.integers(1, 70), width=st.integers(1, 33), seed=st.integers(0, 99))
@example(depth=1, out=1, width=1, seed=0)
@example(depth=64, out=32, width=14, seed=0)  # a chain, two, four (totals), and one number more or less
@example(depth=65, out=32, width=15, seed=0)
@example(depth=128, out=33, width=14, seed=0)
@example(depth=255, out=32, width=13, seed=0)
@example(depth=256, out=32, width=14, seed=0)
@example(depth=257, out=32, width=14, seed=0)
@example(depth=320, out=32, width=14, seed=0)
@example(depth=448, out=32, width=14, seed=0)
@example(depth=512, out=32, width=28, seed=0)
@example(depth=2048, out=64, width=29, seed=0)
def test_sums(level: str, kind: str, depth: int, out: int, width: int, seed: int) -> None:
    """The error of a sum does not grow beyond that of a chain, however long it is."""
    x, weights = halves(normal(1, 1, width, depth, seed=seed)), halves(normal(out, depth, seed=seed + 1))
    found, expected = product(level, kind, x, weights), exact(x, weights)
    # Each addition of a chain, and of its pairs, rounds a partial sum: a random walk of 32 steps and 2.
    sizes = np.sqrt((x.astype(np.float64) ** 2) @ (weights.astype(np.float64) ** 2).T)
    error = np.abs(found - expected) / sizes
    assert float(error.max()) < 20 * UNIT
    if error.size > 100:
        assert float(np.sqrt(np.mean(error**2))) < 3 * UNIT


@at_each_level
def test_whole_numbers_are_exact(level: str, kind: str) -> None:
    """Sums that half precision holds, each channel's weights of another size."""
    random = np.random.default_rng(3)
    x = random.integers(-1, 2, (2, 3, 5, 300)).astype(np.float32)
    signs = random.integers(-1, 2, (45, 300)).astype(np.float32)
    sizes = np.ldexp(np.float32(1), random.integers(-3, 3, (45, 1))).astype(np.float32)
    found = product(level, kind, x, signs * sizes)
    assert np.array_equal(found, exact(x, signs * sizes).astype(np.float32))


@at_each_level
@pytest.mark.parametrize("power", [-40, -20, 20, 40])
def test_weights_of_any_size(level: str, kind: str, power: int) -> None:
    """A power of two changes nothing but the result's exponent: weights beyond half precision are brought into it."""
    x, weights = halves(normal(1, 2, 9, 500)), normal(33, 500, seed=1)
    small = np.ldexp(np.float32(1), -power).astype(np.float32)
    # The map that is written has to hold the results, so a second product takes the power back.
    net = network(level, kind, 500)
    first = net.separable(
        net.load(), filters=np.full((1, 500), small, np.float32), weights=np.ldexp(weights, power), kernel=1
    )
    found = np.empty((1, 2, 9, 33), np.float32)
    net.run(x, first, found)
    assert np.array_equal(found, product(level, kind, x, weights))


@at_each_level
@pytest.mark.parametrize("latency", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_too_large(level: str, kind: str, threads: int, latency: bool) -> None:
    """A chain's sum beyond 65,504, whose total half precision holds: computed by floats, for that image alone."""
    x = halves(normal(5, 4, 6, 200))
    x[3] *= 3
    x[3, ..., :40], x[3, ..., 100:140] = 30000, -30000
    weights = halves(normal(40, 200, seed=1))
    weights[:, :40] = weights[:, 100:140] = 1
    net = network(level, kind, 200, threads, latency)
    out = net.convolution(net.load(), kernel=1, weights=weights)
    found, alone = np.empty((5, 4, 6, 40), np.float32), np.empty((1, 4, 6, 40), np.float32)
    net.run(x, out, found)
    expected = exact(x, weights)
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() < 2e-2 * np.abs(expected).max()
    for i in range(5):
        net.run(x[i : i + 1], out, alone)
        assert np.array_equal(found[i], alone[0])
    if kind == "bf16":  # it holds these
        far = x * np.float32(1e6)
        net.run(far, out, found)
        assert np.isfinite(found).all()
        assert np.linalg.norm(found - exact(far, weights)) < 1e-2 * np.linalg.norm(exact(np.abs(far), np.abs(weights)))


@at_each_level
def test_infinity_and_nan_stay_where_they_are(level: str, kind: str) -> None:
    x, weights = halves(normal(1, 3, 20, 333)), halves(normal(37, 333, seed=1))
    usual = product(level, kind, x, weights)
    x[0, 1, 7, 200], x[0, 2, 3, 5] = np.inf, np.nan
    found = product(level, kind, x, weights)
    touched = np.zeros((1, 3, 20), bool)
    touched[0, 1, 7] = touched[0, 2, 3] = True
    assert np.array_equal(found[~touched], usual[~touched])
    assert np.array_equal(found[0, 1, 7], np.where(weights[:, 200] > 0, np.inf, -np.inf).astype(np.float32))
    assert np.isnan(found[0, 2, 3]).all()


@pytest.mark.skipif(("avx512_fp16", "fp16") not in HALVES, reason="this processor has no half precision arithmetic")
def test_processor_and_emulation() -> None:
    """The machine's own arithmetic beside the emulated one, which rounds a sum to a float before it is a half."""
    x, weights = halves(normal(2, 5, 7, 728)), halves(normal(64, 728, seed=1))
    expected = exact(x, weights)
    errors = [
        np.linalg.norm(product(level, "fp16", x, weights) - expected) / np.linalg.norm(expected)
        for level in ("avx512_fp16", "avx512_fp16_emulated")
    ]
    assert errors[0] < 1.05 * errors[1] < 1.2 * errors[0]
