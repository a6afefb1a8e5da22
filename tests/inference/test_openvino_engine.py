"""Networks in OpenVINO: PyTorch's numbers in the precision that was asked for, and an honest word where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xception
from xception.errors import ConfigError, MissingPackageError
from xception.inference.openvino_engine import OpenVinoEngine
from xception.ops import backend as machine

openvino = pytest.importorskip("openvino")

CAPABLE = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
NARROW: dict[str, Any] = {
    "entry_widths": (24, 40), "middle_modules": 1, "exit_widths": (50, 60), "num_classes": 7, "input_size": 48,
}  # fmt: skip


def model_of(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = xception.create_model(name, **options).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith("running_mean"):
            tensor.normal_(0, 0.1)
    return model


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def properties(compiled: Any, *names: str) -> list[Any]:
    assert isinstance(compiled._engine, OpenVinoEngine)
    ((network, _),) = compiled._engine._requests.values()
    return [network.get_property(name) for name in names]


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    return model_of("xception", **NARROW)


@pytest.fixture(scope="module")
def compiled(narrow: nn.Module) -> Any:
    return xception.compile(narrow, backend="openvino", num_threads=1)


def test_every_output_of_any_batch_and_size(narrow: nn.Module, compiled: Any) -> None:
    assert (compiled.backend, compiled.reason, compiled.level) == ("openvino", "asked for", None)
    assert repr(compiled) == "CompiledModel(fp32, throughput, 1 threads, openvino: asked for)"
    for count, height, width in ((1, 48, 48), (5, 48, 48), (0, 48, 48), (2, 53, 60)):  # TensorFlow's padding: odd, even
        x = torch.randn(count, 3, height, width)
        with torch.no_grad():
            features = narrow.forward_features(x)  # type: ignore[operator]
            if count == 0:
                assert compiled(x).shape == (0, 7)
                assert compiled(x, "features").shape == features.shape
                continue
            close(compiled(x), narrow(x))
            close(compiled(x, "features"), features)
            close(compiled(x, "pooled"), features.mean((2, 3)))
        assert torch.equal(compiled(x.permute(0, 2, 3, 1).numpy()), compiled(x))
        assert torch.equal(compiled(x), torch.cat([compiled(image[None]) for image in x]))
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    assert torch.allclose(compiled(pixels), compiled(pixels.float() / 127.5 - 1), rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="at least 32x32 pixels, got 20x48"):
        compiled(torch.randn(1, 3, 20, 48))


def test_the_last_sizes_are_kept(narrow: nn.Module) -> None:
    compiled = xception.compile(narrow, backend="openvino", num_threads=1)
    engine: Any = compiled._engine
    for size in (33, 34, 35, 48, 36):
        compiled(torch.zeros(1, 3, size, size))
    assert list(engine._requests) == [(34, 34), (35, 35), (48, 48), (36, 36)]


@pytest.mark.parametrize(("mode", "hint"), [("throughput", "THROUGHPUT"), ("latency", "LATENCY")])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_was_asked_for_is_what_it_runs_with(
    narrow: nn.Module, compiled: Any, mode: Any, hint: str, threads: int
) -> None:
    found = xception.compile(narrow, backend="openvino", mode=mode, num_threads=threads)
    chosen, count, precision = properties(
        found, "PERFORMANCE_HINT", "INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT"
    )
    assert (getattr(chosen, "name", chosen), count, precision.get_type_name()) == (hint, threads, "f32")
    x = torch.randn(3, 3, 48, 48)
    close(found(x), compiled(x))


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 5e-2), ("fp16", 6e-3)])
def test_half_precision_or_a_reason(narrow: nn.Module, compiled: Any, precision: Any, tolerance: float) -> None:
    x = torch.randn(2, 3, 48, 48)
    if precision.upper() in CAPABLE:
        found = xception.compile(narrow, precision, backend="openvino", num_threads=1)
        close(found(x), compiled(x), tolerance)
        assert not torch.allclose(found(x), compiled(x), rtol=0, atol=1e-4 * float(compiled(x).abs().max()))
        return
    with pytest.raises(ConfigError, match=f"OpenVINO has no {precision} on this machine"):
        xception.compile(narrow, precision, backend="openvino")
    other = model_of("inception_v1", num_classes=5, input_size=32)
    found = xception.compile(other, precision)
    assert (found.backend, found.reason) == (
        "torch",
        f"InceptionV1 is no Xception; OpenVINO has no {precision} on this machine",
    )


def test_fp32_is_float32(narrow: nn.Module, compiled: Any) -> None:
    """On machines with matrix units for it OpenVINO takes bf16 by itself: a hundred times this error."""
    x = torch.randn(4, 3, 48, 48)
    with torch.no_grad():
        expected = narrow.double()(x.double()).float()
        narrow.float()
    close(compiled(x), expected, 2e-6)


@pytest.mark.parametrize("name", ["inception_v1", "inception_v3", "mobilenet_v2"])
def test_other_families(name: str) -> None:
    size = 75 if name == "inception_v3" else 64
    model = model_of(name, num_classes=5, input_size=size)
    compiled = xception.compile(model, num_threads=1)
    assert compiled.backend == "openvino"
    assert str(compiled.reason).endswith("is no Xception")
    x = torch.randn(2, 3, size, size)
    plain = xception.compile(model, backend="torch")
    with torch.no_grad():
        close(compiled(x), model(x))
    for output in ("features", "pooled"):
        close(compiled(x, output), plain(x, output))  # type: ignore[arg-type]


def test_on_machines_without_the_compiled_executor(monkeypatch: pytest.MonkeyPatch, narrow: nn.Module) -> None:
    monkeypatch.setattr(machine, "_native", None)
    monkeypatch.setattr(machine, "_why_not_native", "the compiled extension is missing")
    found = xception.compile(narrow, num_threads=1)
    assert (found.backend, found.reason) == ("openvino", "the compiled extension is missing")
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        close(found(x), narrow(x))


def test_the_reference_backend_is_pytorch(narrow: nn.Module) -> None:
    with machine.use_backend("reference"):
        found = xception.compile(model_of("inception_v1", num_classes=5))
    assert (found.backend, found.reason) == ("torch", "the backend is set to 'reference'")


def test_without_openvino(monkeypatch: pytest.MonkeyPatch, narrow: nn.Module) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackageError) as error:
        xception.compile(narrow, backend="openvino")
    assert str(error.value) == "the backend 'openvino' needs openvino: pip install 'xception[openvino]'"


def test_weights_are_copied_and_the_model_is_left_alone() -> None:
    model = model_of("xception", **NARROW).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled = xception.compile(model, backend="openvino", num_threads=1)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    x = torch.randn(1, 3, 48, 48)
    result = compiled(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(compiled(x), result)
    compiled(torch.randn(1, 3, 40, 40))  # converted now, of the copy
    assert float(compiled(torch.randn(1, 3, 40, 40)).abs().max()) > 0


def test_what_it_cannot_express_runs_in_torch(narrow: nn.Module) -> None:
    class Moody(type(narrow)):  # type: ignore[misc]
        def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
            logits: Tensor = super().forward_head(features, pre_logits)
            return logits if logits.sum() > 0 else -logits  # depends on the data

    model = model_of("xception", **NARROW)
    model.__class__ = Moody
    compiled = xception.compile(model)
    assert compiled.backend == "torch"
    assert str(compiled.reason).startswith("Moody is no Xception; OpenVINO cannot run this network at 48x48 pixels: ")
    assert "\n" not in str(compiled.reason)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        close(compiled(x), model(x))
    with pytest.raises(ConfigError, match="OpenVINO cannot run this network"):
        xception.compile(model, backend="openvino")


def test_a_size_that_it_cannot_run(caplog: pytest.LogCaptureFixture) -> None:
    """Its pools take no window beyond the padded map."""
    model = model_of("inception_v1", num_classes=5, input_size=64)
    x = torch.randn(2, 3, 33, 33)
    reason = "OpenVINO cannot run this network at 33x33 pixels: aten.max_pool2d_with_indices.default"
    with pytest.raises(ConfigError, match=reason):
        xception.compile(model, backend="openvino")(x)
    compiled = xception.compile(model)
    assert compiled.backend == "openvino"
    with torch.no_grad():
        for size in (33, 64):
            x = torch.randn(2, 3, size, size)
            close(compiled(x), model(x))
            assert (compiled.backend, compiled.reason) == ("torch", f"InceptionV1 is no Xception; {reason}")
    assert [r.getMessage() for r in caplog.records if r.name == "xception" and r.levelname == "WARNING"] == [
        f"xception: the network runs on torch from now on: {reason}"
    ]


_FORK = """
import os, torch, xception
torch.manual_seed(0)
model = xception.create_model("xception_small").eval()
compiled = xception.compile(model, backend="openvino", num_threads=2)
x = torch.randn(3, 3, 28, 28)
expected = compiled(x)
for _ in range(2):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(compiled(x), expected) for _ in range(3)) else 1)
    assert os.waitpid(child, 0)[1] == 0
assert torch.equal(compiled(x), expected)
print("well")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_a_fork() -> None:
    done = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, timeout=120)
    assert done.stdout == "well\n", done.stderr


def test_many_threads_at_once(compiled: Any) -> None:
    inputs = [torch.randn(1 + i % 3, 3, 48, 48) for i in range(4)]
    expected = [compiled(x) for x in inputs]

    def calls(i: int) -> bool:
        return all(torch.equal(compiled(inputs[(i + k) % 4]), expected[(i + k) % 4]) for k in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(calls, range(8)))
