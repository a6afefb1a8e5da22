"""The trainer's bindings refuse what does not fit, by one exception and without harm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from trainer_calls import IN, OUT, SIZES, Array, Calls

# Arrays by method. Each is then given a wrong type, sizes one off, the elements of another, and no array at all.
ARRAYS = {
    "forward": ("input", "filters", "weights", "z", "mean", "variance"),
    "forward2": ("input", "scale", "shift", "filters", "weights", "z", "mean", "variance"),
    "convolve": ("input", "weights", "z", "mean", "variance"),
    "convolve_halved": ("input", "weights", "z", "mean", "variance"),
    "convolve_sampled": ("input", "weights", "z", "mean", "variance"),
    "convolve_halved_backward": (
        "input", "weights", "z", "gradient", "out_scale", "out_shift", "factors", "input_gradient", "weight_gradient",
    ),
    "convolve_sampled_backward": (
        "input", "weights", "z", "gradient", "out_scale", "out_shift", "factors", "input_gradient", "weight_gradient",
    ),
    "convolve_adding": ("input_gradient",),
    "finish": ("z", "scale", "shift", "residual", "output"),
    "finish_normalised": ("residual", "residual_scale", "residual_shift"),
    "pool": ("z", "scale", "shift", "residual", "output", "winners"),
    "pool_normalised": ("residual", "residual_scale", "residual_shift"),
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
    optional |= {"backward.weight_gradient", "backward2.weight_gradient", "convolve_adding.input_gradient"}
    optional |= {f"convolve_{k}_backward.{g}_gradient" for k in ("halved", "sampled") for g in ("input", "weight")}
    calls = Calls()
    if f"{name}.{key}" in optional:
        calls.call(name, **{key: None})
        return
    with pytest.raises((TypeError, ValueError)):
        calls.call(name, **{key: None})
    calls.memory.check()


CHANNELS = ("finish", "finish_normalised", "pool", "pool_normalised", "pool_backward", "gradient_sums")
NUMBERS: list[tuple[str, str, Any]] = [
    *((name, "sizes", sizes) for name in ARRAYS for sizes in (
        (0, 7, 9), (3, 0, 9), (3, 7, 0), (-3, 7, 9), (3, -7, -9), (4, 7, 9), (2, 7, 9), (3, 8, 9), (3, 7, 10),
        (1 << 20, 1 << 14, 1 << 14), ((1 << 31) - 1,) * 3, (-(1 << 31),) * 3,
    )),
    *((name, "channels", count) for name in CHANNELS for count in (
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
    *((name, key, value) for name in ("convolve", "convolve_halved", "convolve_halved_backward") for key, value in (
        ("kernel", 0), ("kernel", -3), ("kernel", 1), ("kernel", 2), ("kernel", 5), ("kernel", 17),
        ("kernel", (1 << 31) - 1), ("kernel", -(1 << 31)), ("stride", 0), ("stride", -1), ("stride", 17),
        ("stride", (1 << 31) - 1), ("stride", -(1 << 31)), ("pad_top", -1), ("pad_left", -1), ("pad_top", 3),
        ("pad_left", 3), ("pad_top", (1 << 31) - 1), ("pad_left", -(1 << 31)), ("output", (2, 7, 9)),
        ("output", (4, 4, 5)), ("output", (3, 0, 5)), ("output", (3, 5, 6)), ("output", (3, 9, 9)),
        ("output", (3, 7, 11)), ("output", (3, 1, 4)), ("output", (-3, -4, 5)), ("output", ((1 << 31) - 1,) * 3),
    )),
    *((name, key, value) for name in ("convolve_sampled", "convolve_sampled_backward") for key, value in (
        ("pad_top", 1), ("pad_left", 1), ("stride", 1), ("stride", 3), ("output", (3, 3, 5)), ("output", (3, 4, 4)),
        ("output", (3, 5, 5)), ("output", (3, 7, 9)), ("kernel", 2), ("kernel", 3),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), NUMBERS)
def test_numbers_that_do_not_fit(name: str, key: str, value: Any) -> None:
    calls = Calls()
    with pytest.raises(ValueError, match="expected"):
        calls.call(name, **{key: value})
    calls.memory.check()


@pytest.mark.parametrize("value", [1 << 31, 1 << 70, 1.5, "1", None, (3, 7)])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("forward", "sizes"),
        ("forward", "dilation"),
        ("pool", "channels"),
        ("convolve", "kernel"),
        ("convolve", "stride"),
    ],
)
def test_numbers_of_another_kind(name: str, key: str, value: Any) -> None:
    calls = Calls()
    with pytest.raises((TypeError, ValueError, OverflowError)):
        calls.call(
            name, **{key: (value, 7, 9) if key in ("sizes", "output") and not isinstance(value, tuple) else value}
        )


def test_what_does_not_go_together() -> None:
    calls = Calls()
    blocked = np.zeros(calls.trainer.blocked_bytes(IN, SIZES), np.uint8)
    last = np.zeros((*SIZES, OUT), np.float32)
    scale = np.ones(OUT, np.float32)
    no_residual: dict[str, Any] = {"residual": None}
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
        ("bytes as the residual", "pool", {"residual": calls.z2.copy()}),
        ("a residual in channel blocks", "finish", {"residual": calls.conv_z.copy()}),
        ("a residual in channel blocks", "finish", {"residual_scale": scale, "residual_shift": scale}),
        ("a residual in channel blocks", "finish", {**no_residual, "residual_scale": scale, "residual_shift": scale}),
        ("a residual in channel blocks", "finish_normalised", {"residual": last}),
        ("a residual in channel blocks", "finish_normalised", no_residual),
        ("a residual in channel blocks", "finish_normalised", {"residual_scale": None, "residual_shift": None}),
        ("both scale and shift", "finish_normalised", {"residual_scale": None}),
        ("both scale and shift", "finish_normalised", {"residual_shift": None}),
        ("a residual in channel blocks", "pool", {"residual": calls.halved_z.copy()}),
        ("a residual in channel blocks", "pool_normalised", {"residual": calls.pooled_residual}),
        ("a residual in channel blocks", "pool_normalised", no_residual),
        ("bytes as the residual", "pool_normalised", {"residual": calls.conv_z.copy()}),
        ("both scale and shift", "pool_normalised", {"residual_shift": None}),
        ("channels last as the input", "convolve", {"input": blocked}),
        ("channels last as the gradient", "convolve_backward", {"gradient": calls.conv_z.copy()}),
        ("channels last as the input's gradient", "convolve_backward", {"input_gradient": blocked}),
        ("bytes of channel blocks as z", "convolve", {"z": last}),
        ("bytes of channel blocks as z", "convolve_backward", {"z": last}),
        ("both scale and shift", "convolve_backward", {"out_scale": None}),
        ("the normalisation before a ReLU", "convolve_backward", {"out_scale": None, "out_shift": None}),
        ("two dimensions", "convolve", {"weights": calls.windows.reshape(-1)}),
        ("two dimensions", "convolve", {"weights": calls.windows.reshape(OUT, 9, IN)}),
        ("rows x columns x in", "convolve", {"weights": np.zeros((OUT, 9 * IN + 1), np.float32)}),
        ("at most 4096", "convolve", {"weights": np.zeros((1, 9 * 456), np.float32)}),
        ("as the input", "convolve", {"weights": np.zeros((OUT, 9 * IN + 9), np.float32)}),
        ("channels", "convolve", {"weights": np.zeros((0, 9 * IN), np.float32)}),
        ("channels", "convolve", {"weights": np.zeros((OUT, 0), np.float32)}),
        ("channels", "convolve_sampled", {"weights": np.zeros((1, (1 << 16) + 1), np.float32)}),
        ("channels", "convolve_sampled_backward", {"weights": np.zeros(((1 << 16) + 1, 1), np.float32)}),
        ("expected", "convolve_halved_backward", {"weights": calls.windows.T.copy()}),
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
        assert message in str(refused.value), (name, list(changed))
    calls.memory.check()


def test_arguments_have_to_be_named_and_known() -> None:
    calls = Calls()
    for name, (method, positional, named) in calls.calls.items():
        function = getattr(calls.trainer, method)
        for missing in named:
            with pytest.raises(TypeError):
                function(*positional, **{k: v for k, v in named.items() if k != missing})
        with pytest.raises(TypeError):
            function(*positional, *named.values())
        with pytest.raises(TypeError):
            calls.call(name, bias=np.zeros(OUT, np.float32))
