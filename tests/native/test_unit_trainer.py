"""The trainer's bindings: what does not fit is refused; no memory but the arrays' own is read or written."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from xception.ops import backend

native = pytest.importorskip("xception._native")

Array = NDArray[Any]
RunPython = Callable[..., subprocess.CompletedProcess[str]]

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
        result = inside.view(dtype).reshape(shape)
        if values is not None:
            result[...] = values
        return result

    def check(self) -> None:
        for whole in self.around:
            assert (whole[:GUARD] == 0xA5).all()
            assert (whole[-GUARD:] == 0xA5).all()


def bf16(values: Array) -> Array:
    """Of float32 whose lower halves are 0."""
    halves: Array = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
    return halves


def float32(values: Array) -> Array:
    if values.dtype != np.int16:
        return values
    return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


class Calls:
    """A right call of each method: positional arguments and named ones, which tests then spoil."""

    def __init__(self, level: str = "scalar", kind: str = "fp32", threads: int = 1, fill: int = 0xFF) -> None:
        self.trainer = native.UnitTrainer(level, kind, threads)
        self.memory = Guarded(fill)
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

        def blocks(channels: int) -> Array:
            return m.array(self.trainer.blocked_bytes(channels, SIZES), np.uint8)

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
            "finish": ("finish", (SIZES, OUT), norm | {
                "z": self.z, "relu": True, "residual": self.residual, "output": self.output,
            }),
            "pool": ("pool", (SIZES, OUT), norm | window | {
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
        return {name: float32(getattr(self, name)).copy() for name in names}


def levels() -> list[tuple[str, str]]:
    features = backend.detected_features()
    found = [("scalar", "fp32"), ("scalar", "bf16")]
    found += [(level, kind) for level in ("avx2", "avx512") for kind in ("fp32", "bf16") if level in features]
    needs = (("avx512_bf16", "avx512_bf16"), ("amx_emulated", "avx512"), ("amx_bf16", "amx_bf16"))
    return found + [(level, "bf16") for level, feature in needs if feature in features]


@pytest.mark.parametrize(("level", "kind"), levels())
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_calls_stay_inside_and_do_not_read_what_they_write(level: str, kind: str, threads: int) -> None:
    found = []
    for fill in (0xFF, 0x00):  # as floats: NaN, and zeros
        calls = Calls(level, kind, threads, fill)
        given = {k: getattr(calls, k).copy() for k in ("input", "filters", "weights", "gradient", "residual", "beside")}
        for name in calls.calls:
            calls.call(name)
        calls.memory.check()
        for k, before in given.items():
            assert np.array_equal(getattr(calls, k), before), k
        found.append(calls.results())
        assert (calls.winners.reshape(4, -1, 16)[:3] < 9).all()
    for k, first in found[0].items():
        assert np.isfinite(first).all(), k
        assert np.array_equal(first, found[1][k]), k


def test_what_is_not_asked_for_changes_nothing_else() -> None:
    calls = Calls()
    for name in calls.calls:
        calls.call(name)
    right = calls.results()
    calls.filter_gradient[:] = calls.filter_gradient2[:] = calls.input_gradient[:] = np.nan
    calls.call("backward", weight_gradient=None)
    calls.call("backward2", weight_gradient=None, in_mean=None, sums=None)
    found = calls.results()
    assert all(np.array_equal(found[k], right[k]) for k in right)
    calls.filter_gradient[:] = calls.weight_gradient[:] = np.nan
    calls.call("backward", input_gradient=None, residual=None)
    found = calls.results()
    assert all(np.array_equal(found[k], right[k]) for k in right)
    calls.call("backward", residual=None)
    assert np.array_equal(calls.input_gradient + calls.beside, right["input_gradient"])


# Arrays by method. Each is then given a wrong type, sizes one off, the elements of another, and no array at all.
ARRAYS = {
    "forward": ("input", "filters", "weights", "z", "mean", "variance"),
    "forward2": ("input", "scale", "shift", "filters", "weights", "z", "mean", "variance"),
    "finish": ("z", "scale", "shift", "residual", "output"),
    "pool": ("z", "scale", "shift", "residual", "output", "winners"),
    "pool_backward": ("gradient", "winners", "input_gradient"),
    "gradient_sums": ("z", "scale", "shift", "mean", "gradient", "sums"),
    "backward": (
        "input", "filters", "weights", "z", "gradient", "out_scale", "out_shift", "factors", "residual",
        "input_gradient", "filter_gradient", "weight_gradient",
    ),
    "backward2": (
        "input", "scale", "shift", "filters", "weights", "z", "gradient", "out_scale", "out_shift", "factors",
        "in_mean", "input_gradient", "filter_gradient", "weight_gradient", "sums",
    ),
}  # fmt: skip


def argument(calls: Calls, name: str, key: str) -> Array:
    _, positional, named = calls.calls[name]
    found: Array = positional[1] if key == "input" else named[key]
    return found


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in ARRAYS.items() for key in keys])
def test_arrays_that_do_not_fit(name: str, key: str, kind: str) -> None:
    calls = Calls("scalar", kind)
    right = argument(calls, name, key)
    calls.call(name)
    # Each of these has a dimension or an element too few or too many, or elements of a type that nothing takes.
    wrong: list[Any] = [
        right.reshape(-1)[1:].copy(),
        right.reshape(-1)[:-1].copy(),
        np.concatenate([right.reshape(-1), right.reshape(-1)[:1]]),
        right.reshape(-1)[:0].copy(),
        np.zeros((), right.dtype),
        *(
            np.zeros(right.shape, t)
            for t in (np.float64, np.float16, np.int32, np.int8, np.int64, np.complex64, np.uint16, bool)
        ),
    ]
    wrong += [np.zeros(right.shape, t) for t in (np.float32, np.int16, np.uint8) if t != right.dtype]
    for array in wrong:
        with pytest.raises(ValueError, match="expected"):
            calls.call(name, **{key: array})
    frozen = right.copy()
    frozen.flags.writeable = False
    flipped = np.stack([right, right], -1)[..., 0]
    others: list[Any] = [frozen, flipped, "an array", [1.0, 2.0], 7, object()]
    if right.ndim > 1:
        others.append(np.asfortranarray(right))
    for thing in others:
        with pytest.raises((TypeError, ValueError)):
            calls.call(name, **{key: thing})
    calls.call(name)
    calls.memory.check()


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in ARRAYS.items() for key in keys])
def test_arrays_that_have_to_be_there(name: str, key: str) -> None:
    """None is taken for what is optional, alone or with its other half; and refused else."""
    optional = {"finish.residual", "pool.residual", "backward.residual", "backward.input_gradient"}
    optional |= {"backward.weight_gradient", "backward2.weight_gradient"}
    calls = Calls()
    if f"{name}.{key}" in optional:
        calls.call(name, **{key: None})
        return
    with pytest.raises((TypeError, ValueError)):
        calls.call(name, **{key: None})
    calls.memory.check()


NUMBERS: list[tuple[str, str, Any]] = [
    *((name, "sizes", sizes) for name in ARRAYS for sizes in (
        (0, 7, 9), (3, 0, 9), (3, 7, 0), (-3, 7, 9), (3, -7, -9), (4, 7, 9), (2, 7, 9), (3, 8, 9), (3, 7, 10),
        (1 << 20, 1 << 14, 1 << 14), ((1 << 31) - 1,) * 3, (-(1 << 31),) * 3,
    )),
    *((name, "channels", count) for name in ("finish", "pool", "pool_backward", "gradient_sums") for count in (
        0, -1, OUT - 1, OUT + 1, 65, 1 << 17, (1 << 31) - 1, -(1 << 31),
    )),
    *((name, "dilation", dilation) for name in ("forward", "backward", "pool", "pool_backward") for dilation in (
        0, -1, 4097, (1 << 31) - 1, -(1 << 31),
    )),
    *((name, key, value) for name in ("pool", "pool_backward") for key, value in (
        ("stride", 0), ("stride", -2), ("stride", (1 << 31) - 1), ("pad_top", -1), ("pad_left", -1),
        ("pad_top", (1 << 31) - 1), ("pad_left", (1 << 31) - 1), ("pooled", (2, 4, 5)), ("pooled", (4, 4, 5)),
        ("pooled", (3, 0, 5)), ("pooled", (3, 4, 4)), ("pooled", (3, 5, 5)), ("pooled", (3, 1, 20)),
        ("pooled", (3, 20, 1)), ("pooled", (-3, -4, 5)), ("pooled", ((1 << 31) - 1,) * 3),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), NUMBERS)
def test_numbers_that_do_not_fit(name: str, key: str, value: Any) -> None:
    calls = Calls()
    with pytest.raises(ValueError, match="expected"):
        calls.call(name, **{key: value})
    calls.memory.check()


@pytest.mark.parametrize("value", [1 << 31, 1 << 70, 1.5, "1", None, (3, 7)])
@pytest.mark.parametrize(("name", "key"), [("forward", "sizes"), ("forward", "dilation"), ("pool", "channels")])
def test_numbers_of_another_kind(name: str, key: str, value: Any) -> None:
    calls = Calls()
    with pytest.raises((TypeError, ValueError, OverflowError)):
        calls.call(name, **{key: (value, 7, 9) if key == "sizes" and not isinstance(value, tuple) else value})


def test_what_does_not_go_together() -> None:
    calls = Calls()
    blocked = np.zeros(calls.trainer.blocked_bytes(IN, SIZES), np.uint8)
    last = np.zeros((*SIZES, OUT), np.float32)
    wrong: list[tuple[str, str, dict[str, Any]]] = [
        ("both scale and shift", "forward", {"scale": np.zeros(IN, np.float32)}),
        ("both scale and shift", "forward", {"shift": np.zeros(IN, np.float32)}),
        ("both scale and shift", "backward", {"out_scale": None}),
        ("the normalisation before a ReLU", "backward", {"out_scale": None, "out_shift": None}),
        ("a blocked input", "backward", {"in_mean": np.zeros(IN, np.float32), "sums": np.zeros((2, IN), np.float32)}),
        ("in_mean and sums", "backward", {"sums": np.zeros((2, IN), np.float32)}),
        ("in_mean and sums", "backward2", {"in_mean": None}),
        ("in_mean and sums", "backward2", {"sums": None}),
        ("not asked for", "backward2", {"input_gradient": None}),
        ("laid out as the input", "backward", {"input_gradient": blocked}),
        ("laid out as the input", "backward2", {"input_gradient": last}),
        ("channels last as the residual", "backward", {"residual": blocked}),
        ("channels last as the output", "finish", {"output": calls.z.copy()}),
        ("channels last as the residual", "pool", {"residual": calls.z2.copy()}),
        ("bytes of channel blocks as z", "forward", {"z": last}),
        ("bytes of channel blocks as z", "gradient_sums", {"z": last}),
        ("bytes of channel blocks as the input's gradient", "pool_backward", {"input_gradient": last}),
        ("two dimensions", "forward", {"weights": calls.weights.reshape(-1)}),
        ("as the input", "forward", {"weights": np.zeros((OUT, IN + 1), np.float32)}),
        ("channels", "forward", {"weights": np.zeros((0, IN), np.float32)}),
        ("channels", "forward", {"weights": np.zeros((OUT, 0), np.float32)}),
        ("channels", "backward", {"weights": np.zeros((1 << 17, 1), np.float32)}),
        ("expected", "forward", {"weights": calls.weights.T.copy()}),
        ("expected", "backward", {"weights": calls.weights.T.copy()}),
        ("expected", "forward", {"weights": np.zeros((OUT, IN, 2), np.float32)}),
    ]
    for message, name, changed in wrong:
        with pytest.raises(ValueError, match=r"expected|not asked") as refused:
            calls.call(name, **changed)
        if "residual" not in changed:  # whose size is looked at first
            assert message in str(refused.value), (name, list(changed))
    calls.memory.check()


def test_arguments_have_to_be_named_and_known() -> None:
    calls = Calls()
    _, positional, named = calls.calls["forward"]
    for missing in named:
        with pytest.raises(TypeError):
            calls.trainer.forward(*positional, **{k: v for k, v in named.items() if k != missing})
    with pytest.raises(TypeError):
        calls.trainer.forward(*positional, *named.values())
    with pytest.raises(TypeError):
        calls.call("forward", bias=np.zeros(OUT, np.float32))


def test_levels_types_and_threads() -> None:
    for level, kind in levels():
        trainer = native.UnitTrainer(level, kind, 3)
        assert (trainer.level, trainer.threads) == (level, 3)
    run_here = dict.fromkeys(level for level, _ in levels())
    for level in ("avx1024", "", "AVX2", "amx_bf16" if "amx_bf16" not in run_here else "neon", "scalar\0", "é"):
        for kind in ("fp32", "bf16"):
            with pytest.raises(ValueError, match=r"."):
                native.UnitTrainer(level, kind, 1)
    for kind in ("int8", "", "float32", "fp16"):  # half precision of the other kind has no kernels to train with
        for level in run_here:
            with pytest.raises(ValueError, match=r"."):
                native.UnitTrainer(level, kind, 1)
    for level in run_here:
        if level.startswith("amx"):
            with pytest.raises(ValueError, match=r"."):
                native.UnitTrainer(level, "fp32", 1)
    for threads in (0, -1, 1025, -(1 << 31)):
        with pytest.raises(ValueError, match="threads"):
            native.UnitTrainer("scalar", "fp32", threads)
    for arguments in (("scalar",), ("scalar", "fp32"), ("scalar", "fp32", 1.5), (1, "fp32", 1), ("scalar", None, 1)):
        with pytest.raises(TypeError):
            native.UnitTrainer(*arguments)


def test_the_size_of_blocks() -> None:
    trainer = native.UnitTrainer("scalar", "fp32", 1)
    half = native.UnitTrainer("scalar", "bf16", 1)
    for channels in (1, 16, 31, 32, 33, 64, 728):
        for sizes in (SIZES, (1, 1, 1), (2, 4, 4)):
            pixels = int(np.prod(sizes))
            padded = -(-channels // 32) * 32
            assert trainer.blocked_bytes(channels, sizes) >= padded * pixels * 4
            assert half.blocked_bytes(channels, sizes) >= padded * pixels * 2
    for channels in (0, -1, (1 << 16) + 1):
        with pytest.raises(ValueError, match="channels"):
            trainer.blocked_bytes(channels, SIZES)
    for sizes in ((0, 1, 1), (1 << 20, 1 << 14, 1 << 14), (1, -1, 1)):
        with pytest.raises(ValueError, match="at least an image"):
            trainer.blocked_bytes(3, sizes)


def test_winners_of_any_bytes_are_taken_without_harm() -> None:
    """The backward pass of a pool reads them; what names no tap gives nothing to any pixel."""
    calls = Calls()
    calls.call("forward")
    calls.call("pool")
    calls.winners[:] = np.random.default_rng(1).integers(9, 256, calls.winners.shape)
    calls.call("pool_backward")
    calls.call("gradient_sums", gradient=calls.taken_back, relu=False)
    assert (calls.sums == 0).all()
    calls.memory.check()


def test_a_cached_trainer_ends_quietly(run_python: RunPython) -> None:
    """Nothing is said when Python ends with trainers that are still held."""
    code = """
import torch
from xception.ops import units
from xception.ops.reference import Unit
x = torch.randn(2, 4, 5, 5, requires_grad=True)
y = units.separable_units(x, [Unit(depthwise=torch.randn(4, 1, 3, 3), pointwise=torch.randn(6, 4, 1, 1))])
y.sum().backward()
print(units._trainer.cache_info().currsize)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
