"""The public operations: either path gives the definition's numbers and gradients; the operators are sound."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library

from xception.errors import ConfigError
from xception.ops import backend, packed_layers, reference, separable

native = pytest.mark.skipif(not backend.native_available(), reason="the extension is not built")


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    kernel, dilation = draw(st.sampled_from([1, 3, 3, 5])), draw(st.integers(1, 2))
    reach = (kernel - 1) * dilation + 1
    channels, out = draw(st.sampled_from([1, 3, 16, 40])), draw(st.sampled_from([1, 5, 32, 33]))
    padding: Any = draw(st.sampled_from(["same", 0, reach // 2]))
    stride = draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(draw(st.integers(1, 3)), channels, *(draw(st.integers(reach, reach + 9)) for _ in range(2)))
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    order = draw(st.sampled_from(reference.ORDERS))
    depthwise = normal(channels if order == "depthwise_pointwise" else out, 1, kernel, kernel)
    y = reference.depthwise_conv2d(x[:, :1], depthwise[:1], **options)
    return {
        "x": x,
        "depthwise": depthwise,
        "pointwise": normal(out, channels, 1, 1),
        "bias": normal(out) if draw(st.booleans()) else None,
        "residual": normal(len(x), out, *y.shape[2:]) if draw(st.booleans()) else None,
        **options,
        "order": order,
        "input_relu": draw(st.booleans()),
        "intermediate_activation": draw(st.sampled_from(reference.ACTIVATIONS)),
        "output_activation": draw(st.sampled_from(reference.ACTIVATIONS)),
    }


def single(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.float() if isinstance(v, Tensor) else v for k, v in call.items()}


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=2e-5 * scale)


@settings(max_examples=80)
@given(call=calls())
def test_separable(call: dict[str, Any]) -> None:
    expected = reference.separable_conv2d(**call)
    for layout in (torch.contiguous_format, torch.channels_last):
        arguments = single(call)
        arguments["x"] = arguments["x"].contiguous(memory_format=layout)
        for choice in ("auto", "reference"):
            with backend.use_backend(choice):  # type: ignore[arg-type]
                close(separable.separable_conv2d(**arguments), expected)


@settings(max_examples=60)
@given(call=calls(), multiplier=st.integers(1, 2))
def test_depthwise(call: dict[str, Any], multiplier: int) -> None:
    weight = call["depthwise"][:1].repeat_interleave(call["x"].shape[1] * multiplier, 0)
    weight = weight * torch.linspace(-1, 1, len(weight), dtype=torch.float64)[:, None, None, None]
    options = {k: call[k] for k in ("stride", "padding", "dilation")}
    expected = reference.depthwise_conv2d(call["x"], weight, **options)
    close(separable.depthwise_conv2d(call["x"].float(), weight.float(), **options), expected)


@settings(max_examples=20)
@given(call=calls())
def test_gradients(call: dict[str, Any]) -> None:
    """Through the functions (which take the definition) and through the operators (which compute it once more)."""
    names = [k for k, v in call.items() if isinstance(v, Tensor)]

    def gradients(function: Any) -> list[Tensor]:
        arguments = {k: v.clone().requires_grad_() if k in names else v for k, v in call.items()}
        return list(torch.autograd.grad(function(**arguments).square().sum(), [arguments[k] for k in names]))

    def operator(**arguments: Any) -> Tensor:
        padding = -1 if arguments["padding"] == "same" else arguments["padding"]
        a = {**arguments, "padding": padding}
        found: Tensor = torch.ops.xception.separable_conv2d(
            a["x"], a["depthwise"], a["pointwise"], a["bias"], a["residual"], a["stride"], padding, a["dilation"],
            a["order"], a["input_relu"], a["intermediate_activation"], a["output_activation"],
        )  # fmt: skip
        return found

    expected = gradients(reference.separable_conv2d)
    for function in (separable.separable_conv2d, operator):
        for found, right in zip(gradients(function), expected, strict=True):
            torch.testing.assert_close(found, right)


def test_the_operators_are_sound() -> None:
    """PyTorch's own checks of schema, fake implementation, autograd and tracing."""
    x, depthwise, pointwise = torch.randn(2, 8, 9, 7), torch.randn(8, 1, 3, 3), torch.randn(5, 8, 1, 1)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (x, depthwise, pointwise, None, None, 2, -1, 1, "depthwise_pointwise", True, "none", "relu")
    library.opcheck(torch.ops.xception.separable_conv2d.default, arguments, test_utils=tests)
    arguments = (x, depthwise, pointwise, torch.randn(5), torch.randn(2, 5, 9, 7), 1, 1, 1, "depthwise_pointwise")
    arguments += (False, "elu", "none")
    library.opcheck(torch.ops.xception.separable_conv2d.default, arguments, test_utils=tests)
    library.opcheck(torch.ops.xception.depthwise_conv2d.default, (x, depthwise, None, 1, 0, 2), test_utils=tests)


def test_compiled_graphs_see_one_node() -> None:
    depthwise, pointwise = torch.randn(4, 1, 3, 3), torch.randn(6, 4, 1, 1)
    graph = torch.export.export(_Module(depthwise, pointwise), (torch.randn(1, 4, 8, 8),)).graph
    assert [str(n.target) for n in graph.nodes if n.op == "call_function"] == ["xception.separable_conv2d.default"]


class _Module(torch.nn.Module):
    def __init__(self, depthwise: Tensor, pointwise: Tensor) -> None:
        super().__init__()
        self.register_buffer("depthwise", depthwise)
        self.register_buffer("pointwise", pointwise)

    def forward(self, x: Tensor) -> Tensor:
        return separable.separable_conv2d(x, self.depthwise, self.pointwise)  # type: ignore[arg-type]


@native
def test_packed_weights_follow_the_tensors() -> None:
    x, depthwise, pointwise = torch.randn(1, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(5, 8, 1, 1)
    for _ in range(3):
        close(separable.separable_conv2d(x, depthwise, pointwise), reference.separable_conv2d(x, depthwise, pointwise))
        pointwise.mul_(2)
        depthwise[0] = 7
    alive = []
    for i in range(600):  # new tensors may have the addresses of old ones
        pointwise = torch.randn(3, 8, 1, 1)
        if i % 2 == 0:  # more than are kept
            alive.append(pointwise)
        close(separable.separable_conv2d(x, depthwise, pointwise), reference.separable_conv2d(x, depthwise, pointwise))
    assert len(packed_layers.LAYERS) == 256


@native
def test_layers_go_with_their_weights() -> None:
    kept = packed_layers.LAYERS
    gc.collect()
    before = len(kept)
    x = torch.randn(1, 5, 7, 9)
    weights = [torch.randn(5, 1, 3, 3) for _ in range(4)]
    for _ in range(3):  # of three versions the last is kept
        for weight in weights:
            separable.depthwise_conv2d(x, weight)
            weight.mul_(2)
    assert len(kept) == before + 4
    del weight, weights[1:]
    gc.collect()
    assert len(kept) == before + 1
    close(separable.depthwise_conv2d(x, weights[0]), reference.depthwise_conv2d(x, weights[0]))


@native
def test_layers_share_their_memory() -> None:
    x = torch.randn(1, 32, 256, 256)  # 8 MB
    weights = [torch.randn(32, 1, 3, 3) for _ in range(40)]

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    with torch.inference_mode():
        for weight in weights[:4]:
            separable.depthwise_conv2d(x, weight)
        before = resident()
        for weight in weights:
            separable.depthwise_conv2d(x, weight)
    assert resident() - before < 150 << 20, "each of 36 layers has kept its own"


@native
def test_nothing_is_said_at_the_end() -> None:
    """Networks that are still kept when the process ends are no leak."""
    code = """
import torch
from xception.ops import packed_layers, separable
x, depthwise, pointwise = torch.randn(1, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(5, 8, 1, 1)
separable.separable_conv2d(x, depthwise, pointwise)
print(len(packed_layers.LAYERS))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("1\n", "")


@native
def test_imported_again() -> None:
    """By itself, as torch's operators are the process's own."""
    code = """
import importlib, sys, torch
from xception.ops import separable
x, weight = torch.ones(1, 4, 5, 5), torch.ones(4, 1, 3, 3)
importlib.reload(separable)
for name in [name for name in sys.modules if name.startswith("xception")]:
    del sys.modules[name]
again = importlib.import_module("xception.ops.separable")
assert again is not separable
again._depthwise.__globals__["_is_native"] = lambda *_: False
again._depthwise.__globals__["_depthwise_definition"] = lambda x, *_: x + 41
assert again.depthwise_conv2d(x, weight).eq(42).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_many_threads() -> None:
    x, depthwise = torch.randn(1, 16, 12, 12), torch.randn(16, 1, 3, 3)
    weights = [torch.randn(8, 16, 1, 1) for _ in range(6)]
    expected = [separable.separable_conv2d(x, depthwise, w) for w in weights]

    def right(i: int) -> bool:
        return torch.equal(separable.separable_conv2d(x, depthwise, weights[i % 6]), expected[i % 6])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(400)))


def test_other_kinds_take_the_definition() -> None:
    x, depthwise, pointwise = torch.randn(1, 4, 6, 6), torch.randn(4, 1, 3, 3), torch.randn(5, 4, 1, 1)
    for dtype in (torch.float64, torch.bfloat16):
        arguments = [t.to(dtype) for t in (x, depthwise, pointwise)]
        found = separable.separable_conv2d(*arguments)
        assert found.dtype == dtype
        assert torch.equal(found, reference.separable_conv2d(*arguments))
    first = separable.separable_conv2d(x, torch.randn(5, 1, 3, 3), pointwise, order="pointwise_depthwise")
    assert first.shape == (1, 5, 6, 6)
    assert separable.separable_conv2d(x[:0], depthwise, pointwise).shape == (0, 5, 6, 6)


def test_wrong_use() -> None:
    x, depthwise, pointwise = torch.randn(1, 4, 6, 6), torch.randn(4, 1, 3, 3), torch.randn(5, 4, 1, 1)
    for options, message in (
        ({"padding": "valid"}, "padding must be 'same' or a whole number of zeros; got 'valid'"),
        ({"order": "sideways"}, "order must be one of"),
        ({"output_activation": "gelu"}, "activation must be one of"),
        ({"residual": torch.zeros(1, 5, 5, 5)}, "expected a residual of"),
    ):
        with pytest.raises(ConfigError, match=message):
            separable.separable_conv2d(x, depthwise, pointwise, **options)
    with pytest.raises(ConfigError, match="expected depthwise weights of"):
        separable.depthwise_conv2d(x, torch.randn(3, 1, 3, 3))
