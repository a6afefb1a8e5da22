"""The trainer's bindings: no memory but the arrays' own is read or written, and what is not asked for stays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from trainer_calls import SIZES, Calls, Guarded, bf16, float32, levels, native

RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(("level", "kind"), levels())
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_calls_stay_inside_and_do_not_read_what_they_write(level: str, kind: str, threads: int) -> None:
    found = []
    for fill in (0xFF, 0x00):  # as floats: NaN, and zeros
        calls = Calls(level, kind, threads, fill)
        names = ("input", "filters", "weights", "gradient", "pooled_gradient", "residual", "beside", "windows")
        given = {k: getattr(calls, k).copy() for k in names}
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is fenced as on Linux")
def test_nothing_outside_is_even_read(run_python: RunPython) -> None:
    """In a process of its own, which such a read would end."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from trainer_calls import Calls, Fenced, levels
for level, kind in levels():
    for threads in (1, 2):
        for before in (False, True):
            calls = Calls(level, kind, threads, memory=Fenced(before=before))
            for name in calls.calls:
                print(level, kind, threads, before, name, flush=True)
                calls.call(name)
print("clean")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr
    assert done.stdout.endswith("clean\n")
    one_more = "import numpy as np; m = calls.memory; print(np.lib.stride_tricks.as_strided(m.array(5), (6,)))"
    assert run_python(code + one_more.replace("m = calls.memory", "m = Fenced()")).returncode != 0


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


CONVOLUTIONS = {
    "convolve": ("conv_gradient", "windows_gradient"),
    "convolve_halved": ("halved_gradient", "halved_windows_gradient"),
    "convolve_sampled": ("sampled_gradient", "sampled_weights_gradient"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_what_is_not_asked_for_of_a_convolution(name: str) -> None:
    """Either gradient alone is what it is beside the other; an added one is the sum."""
    calls = Calls(threads=2)
    for call in calls.calls:
        calls.call(call)
    of_input, of_weights = (getattr(calls, k) for k in CONVOLUTIONS[name])
    right = calls.results()
    before = calls.results()
    for wanted, array in (("weight_gradient", of_weights), ("input_gradient", of_input)):
        array[...] = np.nan
        calls.call(f"{name}_backward", **{k: None for k in ("weight_gradient", "input_gradient") if k != wanted})
        assert all(np.array_equal(value, before[k]) for k, value in calls.results().items())
    calls.call(f"{name}_backward", input_gradient=None, weight_gradient=None)
    assert all(np.array_equal(value, before[k]) for k, value in calls.results().items())
    of_input[...] = calls.beside
    calls.call(f"{name}_backward", adds=True)
    np.testing.assert_allclose(of_input, calls.beside + right[CONVOLUTIONS[name][0]], rtol=1e-6, atol=1e-6)
    calls.memory.check()


# Windows that no caller of ours has: padding on two sides only, or more of it, fewer windows than there is room for.
WINDOWS = {
    "zeros behind only": {"output": (3, 7, 9), "kernel": 3, "stride": 1, "pad_top": 0, "pad_left": 0},
    "zeros before only": {"output": (3, 7, 9), "kernel": 3, "stride": 1, "pad_top": 2, "pad_left": 2},
    "lopsided": {"output": (3, 4, 5), "kernel": 3, "stride": 2, "pad_top": 0, "pad_left": 1},
    "wide": {"output": (3, 12, 14), "kernel": 6, "stride": 1, "pad_top": 5, "pad_left": 5},
    "few": {"output": (3, 2, 1), "kernel": 2, "stride": 2, "pad_top": 0, "pad_left": 1},
    "one": {"output": (3, 1, 1), "kernel": 1, "stride": 16, "pad_top": 0, "pad_left": 0},
    "far apart": {"output": (3, 2, 3), "kernel": 4, "stride": 5, "pad_top": 3, "pad_left": 2},
    "larger than the map": {"output": (3, 4, 5), "kernel": 16, "stride": 2, "pad_top": 4, "pad_left": 7},
}


@pytest.mark.parametrize(("level", "kind"), levels())
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_of_any_kind(name: str, level: str, kind: str) -> None:
    """Whole numbers, which every type holds: the same as PyTorch's, of a padded map, to the bit."""
    window: dict[str, Any] = WINDOWS[name]
    kernel, stride = window["kernel"], window["stride"]
    numbers = np.random.default_rng(0)
    x, weights = (numbers.integers(-1, 2, shape).astype(np.float32) for shape in ((*SIZES, 3), (7, kernel**2 * 3)))
    gradient = numbers.integers(-1, 2, (*window["output"], 7)).astype(np.float32)
    if kernel == 16:  # else sums become too large for bfloat16
        weights *= numbers.integers(0, 16, weights.shape) == 0
        gradient *= numbers.integers(0, 4, gradient.shape) == 0
    memory = Guarded()
    trainer = native.UnitTrainer(level, kind, 2)
    type_of_maps, convert = (np.float32, lambda v: v) if kind == "fp32" else (np.int16, bf16)
    given = memory.array(x.shape, type_of_maps, convert(x))
    z = memory.array(trainer.blocked_bytes(7, window["output"]), np.uint8)
    mean, variance = memory.array(7), memory.array(7)
    trainer.convolve(SIZES, given, **window, weights=weights, z=z, mean=mean, variance=variance)
    output = memory.array((*window["output"], 7), type_of_maps)
    ones, zeros = np.ones(7, np.float32), np.zeros(7, np.float32)
    trainer.finish(
        window["output"], 7, z=z, scale=ones, shift=zeros, relu=False, residual=None, residual_scale=None,
        residual_shift=None, output=output,
    )  # fmt: skip
    of_x, of_weights = memory.array(x.shape, type_of_maps), memory.array(weights.shape)
    trainer.convolve_backward(
        SIZES, given, **window, weights=weights, z=z, gradient=convert(gradient), out_scale=None, out_shift=None,
        out_relu=False, factors=np.stack([ones, zeros, zeros]), input_gradient=of_x, adds=False,
        weight_gradient=of_weights,
    )  # fmt: skip
    memory.check()

    top, left = window["pad_top"], window["pad_left"]
    ends = [(count - 1) * stride + kernel for count in window["output"][1:]]  # of the last windows, in the padded map
    leaf, filters = (torch.from_numpy(v).requires_grad_() for v in (x, weights))
    padded = F.pad(leaf.permute(0, 3, 1, 2), (left, max(ends[1] - left - 9, 0), top, max(ends[0] - top - 7, 0)))
    right = F.conv2d(
        padded[:, :, : ends[0], : ends[1]], filters.view(7, kernel, kernel, 3).permute(0, 3, 1, 2), stride=stride
    ).permute(0, 2, 3, 1)
    torch.autograd.backward(right, torch.from_numpy(gradient))
    assert leaf.grad is not None
    assert filters.grad is not None
    z_right = right.detach().numpy()
    assert np.abs(z_right).max() <= 256
    assert leaf.grad.abs().max() <= 256
    assert np.array_equal(float32(output), z_right)
    assert np.array_equal(float32(of_x), leaf.grad.numpy())
    assert np.array_equal(of_weights, filters.grad.numpy())
    flat = z_right.reshape(-1, 7).astype(np.float64)
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(variance, flat.var(0), rtol=1e-5, atol=1e-6)


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
from xception.ops import trainer, units
from xception.ops.reference import Unit
x = torch.randn(2, 4, 5, 5, requires_grad=True)
y = units.separable_units(x, [Unit(depthwise=torch.randn(4, 1, 3, 3), pointwise=torch.randn(6, 4, 1, 1))])
y.sum().backward()
print(trainer.trainer.cache_info().currsize)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
