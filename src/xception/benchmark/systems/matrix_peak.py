"""The machine itself: products of matrices that stay in the cache, whose speed stands for the matrix units' limit.

Each visit takes the fastest single call of torch's product, torch's 1x1 convolution (which is one too, by another
library), in fp32 numpy's, at several sizes, and of our own kernels: each is slow on some processors (on AMD's with
AVX-512 torch's fp32 products use half of its width). Bytes are ours alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xception.benchmark.case import PRECISIONS, Case, Loaded, Precision, System, Unsupported, Variant
from xception.ops import backend

SIDE = 1024
OPERATIONS = 2 * SIDE**3
"""Multiplications and additions in a product of this side; the rate is given in such products a second, whatever the
side that was the fastest."""

_SIDES = (512, 1024, 1536)
_LAYERS, _CHANNELS, _WIDTH = 16, 512, 16  # of our own product: 1x1 convolutions of square maps, one behind the other


def load(case: Case, folder: Path, images: NDArray[Any]) -> Loaded:
    import torch

    torch.set_num_threads(case.threads)
    ways = _own_products(case.precision, case.threads)
    if case.precision == "int8":
        if not ways:
            raise Unsupported("without the compiled extension")
        return _loaded(ways)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.precision]
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise Unsupported("oneDNN has no fp16 on this machine")
    return _loaded(ways + [way for side in _SIDES for way in _products(torch, dtype, side)])


def _loaded(ways: list[Loaded]) -> Loaded:
    return Loaded(
        call=ways[0].call,
        logits=None,
        images=ways[0].images,
        rate=lambda seconds: max(way.images / _shortest(way.call, seconds / len(ways)) for way in ways),
    )


def _products(torch: Any, dtype: Any, side: int) -> list[Loaded]:
    """The ways to multiply matrices of this side."""
    left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
    product = torch.empty(side, side, dtype=dtype)
    pixels = left.t().reshape(1, side, 16, side // 16).contiguous(memory_format=torch.channels_last)
    kernel = right.reshape(side, side, 1, 1)
    calls: list[Callable[[], Any]] = [
        lambda: torch.mm(left, right, out=product),
        lambda: torch.conv2d(pixels, kernel),
    ]
    if dtype == torch.float32:
        calls.append(lambda: np.matmul(left.numpy(), right.numpy(), out=product.numpy()))
    return [Loaded(call=call, logits=None, images=(side / SIDE) ** 3) for call in calls]


def _own_products(precision: Precision, threads: int) -> list[Loaded]:
    if not backend.native_available():
        return []
    random = np.random.default_rng(0)
    network = backend.new_network(precision, _CHANNELS, threads)
    value = network.load()
    steps = np.full(_CHANNELS, 4 / 127, np.float32) if precision == "int8" else None
    for _ in range(_LAYERS):
        weights = random.normal(0, _CHANNELS**-0.5, (_CHANNELS, _CHANNELS)).astype(np.float32)
        value = network.convolution(value, weights=weights, kernel=1, steps=steps)
    images = random.normal(0, 1, (2 * threads, _WIDTH, _WIDTH, _CHANNELS)).astype(np.float32)
    output = np.empty_like(images)
    products = images.size * _CHANNELS * _LAYERS / SIDE**3
    return [Loaded(call=lambda: network.run(images, value, output), logits=None, images=products)]


def _shortest(call: Callable[[], Any], seconds: float) -> float:
    """The shortest of the calls that take about `seconds` together; two at least."""
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < seconds:
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken)


SYSTEM = System(
    name="machine",
    needs=("torch",),
    files=(),
    variants=tuple(Variant(name="matrix product", precision=p, modes=("throughput",)) for p in PRECISIONS),
    load=load,
)
