"""Whole networks through the compiled executor: PyTorch's numbers, every level, any batch, size, layout and caller."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from covered_networks import COVERED, NARROW, images, model_of
from native_levels import LEVELS, network
from torch import Tensor, nn

import xception
from xception.errors import ConfigError
from xception.inference.compiled import CompiledModel, compile_model
from xception.inference.lowering import lower
from xception.ops.backend import kernel_level, use_backend

pytest.importorskip("xception._native")

MODES: tuple[Any, ...] = ("throughput", "latency")
# The relative difference that half precision may make over a whole network of random weights.
NETWORK_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 6e-3}


def close(found: Tensor, expected: Tensor, kind: str = "fp32") -> None:
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=NETWORK_TOLERANCE[kind] * scale)


@pytest.mark.parametrize("case", COVERED)
def test_covered_networks(case: str) -> None:
    name, options, size = COVERED[case]
    model = model_of(name, options)
    compiled = xception.compile(model, num_threads=2)
    assert (compiled.backend, compiled.reason) == ("native", None)
    for count, width in ((1, size), (3, size + 6)):
        x = images(model, count, size, width)
        with torch.no_grad():
            features = model.forward_features(x)  # type: ignore[operator]
            close(compiled(x), model(x))
            close(compiled(x, "features"), features)
            pooled = features.amax((2, 3)) if options.get("pooling") == "max" else features.mean((2, 3))
            close(compiled(x, "pooled"), pooled)


@pytest.mark.parametrize(("level", "kind"), LEVELS)
@pytest.mark.parametrize(
    "case", ["the paper's, narrow", "small", "aligned", "pre-activated", "pointwise first", "segments"]
)
def test_every_level(level: str, kind: str, case: str) -> None:
    name, options, size = COVERED[case]
    model = model_of(name, options)
    x = images(model, 3, size, size + 1)
    with torch.no_grad():
        expected = model(x)
    for threads in (1, 2):
        net = network(level, kind, x.shape[1], threads)
        value = lower(model, net).logits
        assert value is not None
        output = np.full((3, *net.shape(value, size, size + 1)), np.nan, np.float32)
        net.run(np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy()), value, output)
        close(torch.from_numpy(output)[:, 0, 0], expected, kind)


# Plain code takes its time for them.
QUICK_LEVELS = [pair for pair in LEVELS if pair[0] != "scalar"] or LEVELS[:1]


@pytest.mark.parametrize(("level", "kind"), QUICK_LEVELS)
@pytest.mark.parametrize("case", ["xception", "pointwise first", "segments", "xception41", "xception41p"])
def test_large_maps(case: str, level: str, kind: str) -> None:
    """Of a size at which layers are computed a few rows at a time, together; alone and shared by threads alike."""
    aligned = case.startswith("xception4")
    options: dict[str, Any] = {"middle_modules": 1, "num_classes": 5} if aligned else NARROW
    other = {"pointwise first": {"order": "pointwise_depthwise"}, "segments": {"segments": 5}}.get(case, {})
    model = model_of(case if aligned else "xception", {**options, **other})
    x = images(model, 2, 233, 290)
    with torch.no_grad():
        expected = model(x)
    batch = np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
    results, arenas = [], []
    for threads, latency in ((1, False), (3, True)):
        net = network(level, kind, 3, threads, latency)
        value = lower(model, net).logits
        assert value is not None
        output = np.full((2, *net.shape(value, 233, 290)), np.nan, np.float32)
        net.run(batch, value, output)
        results.append(torch.from_numpy(output)[:, 0, 0])
        arenas.append(net.arena_bytes)
        close(results[-1], expected, kind)
    assert torch.equal(results[0], results[1])
    largest = 116 * 144 * 64 * (4 if kind == "fp32" else 2)  # one map of the first module
    assert arenas[0] < (5.5 if level.startswith("amx") else 4) * largest  # on tiles there are two matrices


def test_what_is_not_covered_runs_in_torch_and_says_so(without_openvino: None) -> None:
    model = model_of("inception_v1", {"num_classes": 5})
    reason = "InceptionV1 is no Xception"
    compiled = xception.compile(model)
    assert (compiled.backend, compiled.reason) == ("torch", f"{reason}; openvino is not installed")
    assert reason in repr(compiled)
    x = images(model, 2, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)  # type: ignore[operator]
        close(compiled(x), model(x))
        close(compiled(x, "features"), features)
        close(compiled(x, "pooled"), features.mean((2, 3)))
    with pytest.raises(ConfigError, match=reason):
        xception.compile(model, backend="native")


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed."""
    monkeypatch.setitem(sys.modules, "openvino", None)


def test_torch_runs_any_kind_of_weights_and_pools_as_the_network_does() -> None:
    model = model_of("xception", {**NARROW, "pooling": "max"})
    x = images(model, 2, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)  # type: ignore[operator]
        expected = model(x)
    compiled = xception.compile(model, backend="torch")
    assert (compiled.backend, compiled.reason) == ("torch", "asked for")
    close(compiled(x, "pooled"), features.amax((2, 3)))
    close(compiled(x), expected)
    for backend in ("torch", "native"):
        close(xception.compile(model.to(torch.float64), backend=backend)(x), expected)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    return model_of("xception", NARROW)


def test_layouts_and_kinds_of_images(narrow: nn.Module) -> None:
    compiled = xception.compile(narrow, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x = images(narrow, 2, 64, 70)
    expected = compiled(x)
    last = x.permute(0, 2, 3, 1)
    same = [x.numpy(), last, last.contiguous(), last.numpy(), x.to(memory_format=torch.channels_last)]
    wide = torch.zeros(2, 3, 64, 140)
    wide[:, :, :, ::2] = x
    for other in (*same, wide[:, :, :, ::2]):
        assert torch.equal(compiled(other), expected)
    pixels = torch.randint(0, 256, (2, 3, 64, 70), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    close(compiled(pixels), compiled((pixels.float() / 255 - mean) / std))
    assert torch.equal(compiled(pixels), compiled(pixels.permute(0, 2, 3, 1).numpy()))
    assert compiled(x[:0]).shape == (0, 7)


def test_the_input_and_the_model_are_left_alone(narrow: nn.Module) -> None:
    model = model_of("xception", NARROW).train()
    x = images(model, 2, 64, 64)
    before = x.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    compiled = xception.compile(model)
    result = compiled(x)
    assert model.training
    assert torch.equal(x, before[0])
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(compiled(x), result)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", ["the paper's, narrow", "pre-activated", "pointwise first", "segments"])
def test_numbers_depend_on_nothing_but_the_image(case: str, precision: Any) -> None:
    """To the last bit: in either mode, with any number of threads, in a batch of any size; odd images too."""
    name, options, _ = COVERED[case]
    model = model_of(name, options)
    one = xception.compile(model, precision, num_threads=1)
    every = [xception.compile(model, precision, num_threads=n, mode=mode) for n in (1, 2, 3) for mode in MODES]
    for height, width in ((64, 64), (45, 37)):
        x = images(model, 9, height, width)
        expected = torch.cat([one(x[i : i + 1]) for i in range(9)])
        features = one(x, "features")
        for compiled in every:
            for count in (0, 1, 2, 5, 9):
                assert torch.equal(compiled(x[:count]), expected[:count])
            assert torch.equal(compiled(x, "features"), features)
            assert compiled(x[:0], "pooled").shape == (0, features.shape[1])


@pytest.mark.parametrize(("level", "kind"), QUICK_LEVELS)
@pytest.mark.parametrize("case", ["the paper's, narrow", "pre-activated", "pointwise first", "segments"])
def test_what_is_not_finite_stays_in_its_image(case: str, level: str, kind: str) -> None:
    """And is seen in its scores, however many images go through the layers together."""
    name, options, size = COVERED[case]
    model = model_of(name, options)
    x = images(model, 3, size, size).permute(0, 2, 3, 1).numpy().copy()
    net = network(level, kind, 3, 1)
    value = lower(model, net).logits
    assert value is not None

    def logits(batch: Any) -> Any:
        output = np.full((len(batch), *net.shape(value, size, size)), 7.0, np.float32)
        net.run(np.ascontiguousarray(batch), value, output)
        return output[:, 0, 0]

    expected = logits(x)
    assert np.isfinite(expected).all()
    for bad in (np.nan, np.inf, -np.inf):
        spoiled = x.copy()
        spoiled[1, 20, 30] = bad
        found = logits(spoiled)
        assert not np.isfinite(found[1]).any()
        assert np.array_equal(found[[0, 2]], expected[[0, 2]])


def test_many_threads_at_once(narrow: nn.Module) -> None:
    compiled = xception.compile(narrow, num_threads=2)
    inputs = [images(narrow, 1 + i % 3, 40, 40 + i) for i in range(8)]
    expected = [compiled(x) for x in inputs]

    def calls(i: int) -> bool:
        return all(torch.equal(compiled(inputs[(i + k) % 8]), expected[(i + k) % 8]) for k in range(60))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(calls, range(8)))


@pytest.mark.slow
def test_a_thousand_calls_of_each_of_eight_threads(narrow: nn.Module) -> None:
    compiled = xception.compile(narrow, num_threads=2)
    x = images(narrow, 2, 40, 40)
    expected = compiled(x)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: torch.equal(compiled(x), expected), range(8000)))


_FORK = """
import os, sys, torch, xception
torch.manual_seed(0)
model = xception.create_model("xception_small").eval()
compiled = xception.compile(model, num_threads=3)
x = torch.randn(7, 3, 28, 28)
expected = compiled(x)
for _ in range(3):
    child = os.fork()
    if child == 0:
        ok = torch.equal(compiled(x), expected)
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if torch.equal(compiled(x), expected) else 1)
        os._exit(0 if ok and os.waitpid(grandchild, 0)[1] == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
assert torch.equal(compiled(x), expected)
print("well")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_a_fork() -> None:
    done = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, timeout=120)
    assert done.stdout == "well\n", done.stderr


def test_hooks_and_foreign_modules_are_not_passed_over(without_openvino: None) -> None:
    def reason(model: nn.Module) -> str | None:
        found = xception.compile(model).reason
        return None if found is None else found.removesuffix("; openvino is not installed")

    model: Any = model_of("xception", NARROW)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        hook = getattr(model.middle_flow[0].units[1].conv, register)(lambda *_: None)
        assert reason(model) == "forward hooks"
        hook.remove()
    assert reason(model) is None
    pointwise = model.middle_flow[0].units[0].conv.pointwise
    nn.utils.parametrizations.weight_norm(pointwise)
    assert reason(model) == "a module of class ParametrizedConv2d"
    nn.utils.parametrize.remove_parametrizations(pointwise, "weight")
    assert reason(model) is None
    norm = model.exit_flow.block.units[0].norm
    model.exit_flow.block.units[0].norm = nn.GroupNorm(1, 56)
    assert reason(model) == "a module of class GroupNorm"
    model.exit_flow.block.units[0].norm = nn.BatchNorm2d(56, track_running_stats=False)
    assert reason(model) == "normalisation without statistics"
    model.exit_flow.block.units[0].norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    x = images(model, 1, 64, 64)
    with torch.no_grad():
        close(xception.compile(model, backend="native")(x), model(x))
        # A head of another kind runs in torch, behind features that do not.
        model.classifier.linear = nn.Sequential(nn.Linear(90, 8), nn.Tanh(), nn.Linear(8, 7))
        close(xception.compile(model, backend="native")(x), model(x))

    class Doubled(type(model)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = super().forward(x)
            return 2 * logits

    model.__class__ = Doubled
    assert reason(model) == "Doubled is no Xception"


def test_the_reference_backend_is_obeyed(narrow: nn.Module) -> None:
    with use_backend("reference"):
        compiled = xception.compile(narrow)
    assert (compiled.backend, compiled.reason) == ("torch", "the backend is set to 'reference'")


def test_cap(monkeypatch: pytest.MonkeyPatch, narrow: nn.Module) -> None:
    levels = {"scalar": "scalar", "avx2": "avx2", "avx512": "avx512"}
    x = images(narrow, 1, 64, 64)
    with torch.no_grad():
        expected = narrow(x)
    available = xception.compile(narrow).level
    for cap, level in levels.items():
        if (level, "fp32") in LEVELS:
            monkeypatch.setenv("XCEPTION_MAX_ISA", cap)
            compiled = xception.compile(narrow)
            assert compiled.level == level
            close(compiled(x), expected)
    assert available in levels.values()


def test_precision_is_its_error(narrow: nn.Module) -> None:
    """Half precision differs, and by no more than torch's own does."""
    x = images(narrow, 4, 75, 75)
    with torch.inference_mode():
        expected = narrow(x)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = narrow(x).float()
    ours = xception.compile(narrow, "bf16")(x)
    error, torchs = (float((y - expected).norm() / expected.norm()) for y in (ours, theirs))
    assert 0 < error < 1.1 * torchs
    finer = float((xception.compile(narrow, "fp16")(x) - expected).norm() / expected.norm())
    # Where bf16 is computed in half precision, the two are the same kernels.
    assert 0 < finer < error or (finer == error and kernel_level("bf16") == "avx512_fp16")


def test_wrong_use(narrow: nn.Module) -> None:
    for name, value, message in (
        ("precision", "int4", "precision must be one of fp32, bf16, fp16, int8; got 'int4'"),
        ("mode", "fast", "mode must be throughput or latency; got 'fast'"),
        ("backend", "gpu", "backend must be auto, native, openvino or torch; got 'gpu'"),
        ("num_threads", 0, "num_threads must be from 1 to 1024; got 0"),
        ("num_threads", 1.5, "num_threads must be from 1 to 1024; got 1.5"),
        ("mean", (0.5,), "mean must be a number for each of 3 channels"),
        ("std", (0.5, 0.5, 0.0), "std must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            compile_model(narrow, **{name: value})
    with pytest.raises(ConfigError, match="expected a network of the registry, got Linear"):
        compile_model(nn.Linear(2, 3))
    compiled: CompiledModel = xception.compile(narrow)
    x = images(narrow, 1, 64, 64)
    wrong: list[tuple[Any, str]] = [
        (x[0], r"expected images of N C H W or N H W C, got \(3, 64, 64\)"),
        ("image.jpg", "got str"),
        (None, "got NoneType"),
        (x[:, :2], r"expected images of 3 channels, got \(1, 2, 64, 64\)"),
        (x.double(), "expected images in float32 or uint8, got torch.float64"),
        (x[:, :, :20], "expected images of at least 32x32 pixels, got 20x64"),
    ]
    for bad, message in wrong:
        with pytest.raises(ConfigError, match=message):
            compiled(bad)
    with pytest.raises(ConfigError, match="output must be logits, features or pooled; got 'masks'"):
        compiled(x, "masks")  # type: ignore[arg-type]


def test_spawned_processes(narrow: nn.Module) -> None:
    """Nothing of the executor is inherited, and nothing has to be."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_small_sum) == pytest.approx(_small_sum(), rel=1e-5)


def _small_sum() -> float:
    model = model_of("xception_small", {})
    return float(xception.compile(model, num_threads=1)(torch.ones(1, 3, 28, 28)).sum())
