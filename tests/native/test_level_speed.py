"""Each level's share of what its vectors promise, by processor time of one thread, the levels in turns.

A loop that the compiler leaves as it is keeps its vectors in memory: results stay right, and a level loses half of its
speed. Vectors of half the length should take twice the time; the bounds lie below what such loops were seen to take.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from xception.ops import backend

native = pytest.importorskip("xception._native")

# (wider, narrower, how many times longer the narrower one may take): plain C++ has vectors of 4, and no multiply-adds.
PAIRS = [pair for pair in (("avx512", "avx2", 2.8), ("avx2", "scalar", 8.0)) if pair[0] in backend.detected_features()]
CHANNELS, SIDE = 256, 24
ROUNDS = 7


def numbers(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def inference(level: str) -> float:
    """Seconds of a separable layer."""
    net = native.Network(level, "fp32", CHANNELS, native.Crews(1), latency=False)
    layer = net.separable(
        net.load(), filters=numbers(9, CHANNELS), weights=numbers(CHANNELS, CHANNELS), kernel=3, padding="same"
    )
    seconds: list[float] = net.profile(numbers(1, SIDE, SIDE, CHANNELS), layer, 2)
    return seconds[-1]


def training(level: str) -> float:
    """Seconds of a separable unit, forward and backward."""
    trainer = native.UnitTrainer(level, "fp32", 1)
    sizes, statistics = (1, SIDE, SIDE), np.zeros((2, CHANNELS), np.float32)
    x, gradient = numbers(*sizes, CHANNELS), numbers(*sizes, CHANNELS)
    filters, weights = numbers(CHANNELS * 9), numbers(CHANNELS, CHANNELS)
    z = np.zeros(trainer.blocked_bytes(CHANNELS, sizes), np.uint8)
    shared: dict[str, Any] = {"scale": None, "shift": None, "relu": True, "dilation": 1}
    shared |= {"filters": filters, "weights": weights, "z": z}
    best = np.inf
    for _ in range(2):
        begin = time.thread_time()
        trainer.forward(sizes, x, mean=statistics[0], variance=statistics[1], **shared)
        trainer.backward(
            sizes, x, gradient=gradient, out_scale=None, out_shift=None, out_relu=False, factors=numbers(3, CHANNELS),
            in_mean=None, residual=None, input_gradient=np.empty_like(x), filter_gradient=np.empty_like(filters),
            weight_gradient=np.empty_like(weights), sums=None, **shared,
        )  # fmt: skip
        best = min(best, time.thread_time() - begin)
    return best


@pytest.mark.native
@pytest.mark.parametrize("measure", [inference, training])
@pytest.mark.parametrize(("wider", "narrower", "most"), PAIRS)
def test_a_level_is_as_fast_as_its_vectors_are_long(
    measure: Callable[[str], float], wider: str, narrower: str, most: float
) -> None:
    rounds = [(measure(wider), measure(narrower)) for _ in range(ROUNDS)]
    fast, slow = (min(times) for times in zip(*rounds, strict=True))
    assert slow < most * fast, f"{narrower} took {slow / fast:.2f} times as long as {wider}"
