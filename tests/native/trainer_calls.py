"""Right calls of the trainer's bindings, whose arrays lie between bytes that nobody may change."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from xception.ops import backend

native = pytest.importorskip("xception._native")

Array = NDArray[Any]

SIZES = (3, 7, 9)
PIXELS = 3 * 7 * 9
POOLED = (3, 4, 5)
POOLED_PIXELS = 3 * 4 * 5
IN, OUT = 5, 33
GUARD = 192  # bytes before and behind each array


class Guarded:
    """Arrays between bytes that nobody may change; all of one content where nothing is given."""

    def __init__(self, fill: int = 0xFF) -> None:
        self.fill = fill
        self.around: list[Array] = []

    def array(self, shape: int | tuple[int, ...], dtype: Any = np.float32, values: Array | None = None) -> Array:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        whole = np.full(count + 2 * GUARD, 0xA5, np.uint8)
        self.around.append(whole)
        inside = whole[GUARD:-GUARD]
        inside[:] = self.fill
        result: Array = inside.view(dtype).reshape(shape)
        if values is not None:
            result[...] = values
        return result

    def check(self) -> None:
        for whole in self.around:
            assert (whole[:GUARD] == 0xA5).all()
            assert (whole[-GUARD:] == 0xA5).all()


class Fenced(Guarded):
    """Arrays beside pages that end the process when they are touched: behind the last byte, or before the first."""

    def __init__(self, fill: int = 0xFF, *, before: bool = False) -> None:
        super().__init__(fill)
        self.before = before
        self.mapped: list[mmap.mmap] = []

    def array(self, shape: int | tuple[int, ...], dtype: Any = np.float32, values: Array | None = None) -> Array:
        count, page = int(np.prod(shape)) * np.dtype(dtype).itemsize, mmap.PAGESIZE
        pages = -(-count // page) + 2
        self.mapped.append(mmap.mmap(-1, pages * page))
        whole = np.frombuffer(self.mapped[-1], np.uint8)
        protect = ctypes.CDLL(None).mprotect
        for at in (0, pages - 1):
            assert protect(ctypes.c_void_p(whole.ctypes.data + at * page), page, 0) == 0
        begin = page if self.before else (pages - 1) * page - count
        inside = whole[begin : begin + count]
        inside[:] = self.fill
        result: Array = inside.view(dtype).reshape(shape)
        if values is not None:
            result[...] = values
        return result


def bf16(values: Array) -> Array:
    """Of float32 whose lower halves are 0."""
    halves: Array = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
    return halves


def float32(values: Array) -> Array:
    if values.dtype != np.int16:
        return values
    whole: Array = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return whole


class Calls:
    """A right call of each method: positional arguments and named ones, which tests then spoil."""

    def __init__(
        self,
        level: str = "scalar",
        kind: str = "fp32",
        threads: int = 1,
        fill: int = 0xFF,
        memory: Guarded | None = None,
    ) -> None:
        self.trainer = native.UnitTrainer(level, kind, threads)
        self.memory = memory or Guarded(fill)
        self.maps = np.float32 if kind == "fp32" else np.int16
        self.convert: Callable[[Array], Array] = (lambda v: v) if kind == "fp32" else bf16
        numbers = np.random.default_rng(0)

        def values(*shape: int) -> Array:
            return numbers.integers(-16, 17, shape).astype(np.float32) / 8

        m = self.memory

        def small(*shape: int) -> Array:
            return m.array(shape, np.float32, values(*shape))

        def a_map(*shape: int) -> Array:
            return m.array(shape, self.maps, self.convert(values(*shape)))

        def blocks(channels: int, sizes: tuple[int, int, int] = SIZES) -> Array:
            return m.array(self.trainer.blocked_bytes(channels, sizes), np.uint8)

        self.input, self.filters, self.weights = a_map(*SIZES, IN), small(IN * 9), small(OUT, IN)
        self.z, self.mean, self.variance = blocks(OUT), m.array(OUT), m.array(OUT)
        self.scale, self.shift = small(OUT), small(OUT)
        self.residual, self.output = a_map(*SIZES, OUT), m.array((*SIZES, OUT), self.maps)
        self.pooled_residual = a_map(*POOLED, OUT)
        self.pooled_output = m.array((*POOLED, OUT), self.maps)
        self.winners = m.array(64 * POOLED_PIXELS, np.uint8)
        self.gradient, self.pooled_gradient = a_map(*SIZES, OUT), a_map(*POOLED, OUT)
        self.taken_back, self.sums = blocks(OUT), m.array((2, OUT))
        # A second unit, from OUT to IN channels, whose input is blocked.
        self.filters2, self.weights2 = small(OUT * 9), small(IN, OUT)
        self.z2, self.mean2, self.variance2 = blocks(IN), m.array(IN), m.array(IN)
        self.gradient2, self.factors2, self.sums2 = a_map(*SIZES, IN), small(3, IN), m.array((2, OUT))
        self.input_gradient2 = blocks(OUT)
        self.filter_gradient2, self.weight_gradient2 = m.array(OUT * 9), m.array((IN, OUT))
        self.factors, self.input_gradient = small(3, OUT), m.array((*SIZES, IN), self.maps)
        self.filter_gradient, self.weight_gradient = m.array(IN * 9), m.array((OUT, IN))
        self.beside = a_map(*SIZES, IN)
        # Convolutions, and what they give to `finish` and to `pool`.
        self.windows, self.other_scale, self.other_shift = small(OUT, 9 * IN), small(OUT), small(OUT)
        self.conv_z, self.conv_mean, self.conv_variance = blocks(OUT), m.array(OUT), m.array(OUT)
        self.halved_z, self.halved_mean, self.halved_variance = blocks(OUT, POOLED), m.array(OUT), m.array(OUT)
        self.sampled_z, self.sampled_mean, self.sampled_variance = blocks(OUT, POOLED), m.array(OUT), m.array(OUT)
        self.finished, self.pooled = m.array((*SIZES, OUT), self.maps), m.array((*POOLED, OUT), self.maps)
        self.conv_gradient, self.halved_gradient = (m.array((*SIZES, IN), self.maps) for _ in range(2))
        self.sampled_gradient, self.added_gradient = m.array((*SIZES, IN), self.maps), a_map(*SIZES, IN)
        self.windows_gradient, self.halved_windows_gradient = m.array((OUT, 9 * IN)), m.array((OUT, 9 * IN))
        self.sampled_weights_gradient = m.array((OUT, IN))
        norm_of_conv = {"out_scale": self.scale, "out_shift": self.shift, "out_relu": True, "factors": self.factors}
        residual_norm = {"residual_scale": self.other_scale, "residual_shift": self.other_shift}
        plain_residual = {"residual_scale": None, "residual_shift": None}
        same = {"output": SIZES, "kernel": 3, "stride": 1, "pad_top": 1, "pad_left": 1, "weights": self.windows}
        halved = same | {"output": POOLED, "stride": 2}
        sampled = {"output": POOLED, "kernel": 1, "stride": 2, "pad_top": 0, "pad_left": 0, "weights": self.weights}
        window = {"pooled": POOLED, "stride": 2, "dilation": 1, "pad_top": 1, "pad_left": 1}
        norm = {"scale": self.scale, "shift": self.shift}
        self.calls: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
            "forward": ("forward", (SIZES, self.input), {
                "scale": None, "shift": None, "relu": True, "dilation": 1, "filters": self.filters,
                "weights": self.weights, "z": self.z, "mean": self.mean, "variance": self.variance,
            }),
            "forward2": ("forward", (SIZES, self.z), norm | {
                "relu": True, "dilation": 2, "filters": self.filters2, "weights": self.weights2, "z": self.z2,
                "mean": self.mean2, "variance": self.variance2,
            }),
            "convolve": ("convolve", (SIZES, self.input), same | {
                "z": self.conv_z, "mean": self.conv_mean, "variance": self.conv_variance,
            }),
            "convolve_halved": ("convolve", (SIZES, self.input), halved | {
                "z": self.halved_z, "mean": self.halved_mean, "variance": self.halved_variance,
            }),
            "convolve_sampled": ("convolve", (SIZES, self.input), sampled | {
                "z": self.sampled_z, "mean": self.sampled_mean, "variance": self.sampled_variance,
            }),
            "convolve_backward": ("convolve_backward", (SIZES, self.input), same | norm_of_conv | {
                "z": self.conv_z, "gradient": self.gradient, "input_gradient": self.conv_gradient, "adds": False,
                "weight_gradient": self.windows_gradient,
            }),
            "convolve_halved_backward": ("convolve_backward", (SIZES, self.input), halved | norm_of_conv | {
                "z": self.halved_z, "gradient": self.pooled_gradient, "input_gradient": self.halved_gradient,
                "adds": False, "weight_gradient": self.halved_windows_gradient,
            }),
            "convolve_sampled_backward": ("convolve_backward", (SIZES, self.input), sampled | norm_of_conv | {
                "z": self.sampled_z, "gradient": self.pooled_gradient, "input_gradient": self.sampled_gradient,
                "adds": False, "weight_gradient": self.sampled_weights_gradient,
            }),
            "convolve_adding": ("convolve_backward", (SIZES, self.input), sampled | norm_of_conv | {
                "z": self.sampled_z, "gradient": self.pooled_gradient, "input_gradient": self.added_gradient,
                "adds": True, "weight_gradient": None,
            }),
            "finish": ("finish", (SIZES, OUT), norm | plain_residual | {
                "z": self.z, "relu": True, "residual": self.residual, "output": self.output,
            }),
            "finish_normalised": ("finish", (SIZES, OUT), norm | residual_norm | {
                "z": self.z, "relu": False, "residual": self.conv_z, "output": self.finished,
            }),
            "pool_normalised": ("pool", (SIZES, OUT), norm | window | residual_norm | {
                "z": self.z, "residual": self.halved_z, "output": self.pooled, "winners": self.winners,
            }),
            "pool": ("pool", (SIZES, OUT), norm | window | plain_residual | {
                "z": self.z, "residual": self.pooled_residual, "output": self.pooled_output, "winners": self.winners,
            }),
            "pool_backward": ("pool_backward", (SIZES, OUT), window | {
                "gradient": self.pooled_gradient, "winners": self.winners, "input_gradient": self.taken_back,
            }),
            "gradient_sums": ("gradient_sums", (SIZES, OUT), norm | {
                "z": self.z, "relu": True, "mean": self.mean, "gradient": self.gradient, "sums": self.sums,
            }),
            "backward2": ("backward", (SIZES, self.z), norm | {
                "relu": True, "dilation": 2, "filters": self.filters2, "weights": self.weights2, "z": self.z2,
                "gradient": self.gradient2, "out_scale": self.factors2[0], "out_shift": self.factors2[1],
                "out_relu": False, "factors": self.factors2, "in_mean": self.mean, "residual": None,
                "input_gradient": self.input_gradient2, "filter_gradient": self.filter_gradient2,
                "weight_gradient": self.weight_gradient2, "sums": self.sums2,
            }),
            "backward": ("backward", (SIZES, self.input), {
                "scale": None, "shift": None, "relu": True, "dilation": 1, "filters": self.filters,
                "weights": self.weights, "z": self.z, "gradient": self.taken_back, "out_scale": self.scale,
                "out_shift": self.shift, "out_relu": True, "factors": self.factors, "in_mean": None,
                "residual": self.beside, "input_gradient": self.input_gradient,
                "filter_gradient": self.filter_gradient, "weight_gradient": self.weight_gradient, "sums": None,
            }),
        }  # fmt: skip

    def call(self, name: str, **changed: Any) -> None:
        """The call `name`, with other arguments; `sizes`, `channels` and `input` are the positional ones."""
        method, positional, named = self.calls[name]
        first = dict(zip(("sizes", "channels" if isinstance(positional[1], int) else "input"), positional, strict=True))
        first |= {k: changed.pop(k) for k in list(changed) if k in first}
        getattr(self.trainer, method)(*first.values(), **(named | changed))

    def results(self) -> dict[str, Array]:
        """All that the calls write, but channel blocks, whose lanes behind the last channel are nobody's."""
        names = ["mean", "variance", "mean2", "variance2", "output", "pooled_output", "sums", "sums2"]
        names += ["filter_gradient", "weight_gradient", "filter_gradient2", "weight_gradient2", "input_gradient"]
        names += ["conv_mean", "conv_variance", "halved_mean", "halved_variance", "sampled_mean", "sampled_variance"]
        names += ["conv_gradient", "halved_gradient", "sampled_gradient", "added_gradient", "finished", "pooled"]
        names += ["windows_gradient", "halved_windows_gradient", "sampled_weights_gradient"]
        return {name: float32(getattr(self, name)).copy() for name in names}


def levels() -> list[tuple[str, str]]:
    features = backend.detected_features()
    found = [("scalar", "fp32"), ("scalar", "bf16")]
    found += [(level, kind) for level in ("avx2", "avx512") for kind in ("fp32", "bf16") if level in features]
    needs = (("avx512_bf16", "avx512_bf16"), ("amx_emulated", "avx512"), ("amx_bf16", "amx_bf16"))
    found += [(level, "bf16") for level, feature in needs if feature in features]
    return found + [(level, "fp32") for level, feature in needs[1:] if feature in features]
