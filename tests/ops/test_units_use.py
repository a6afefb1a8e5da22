"""Which path units take, and what may be done with them: any layout, threads, forks, graphs that are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from unit_cases import (
    FIXED,
    LEVELS,
    PARAMETERS,
    Case,
    _leaves,
    at_every_level,
    at_level,
    data_for,
    distance,
    native,
    run,
    run_native,
    threads,
)

from xception.ops import backend, reference, units
from xception.ops.reference import Unit

# ----------------------------------------------------------------------------------------- which path is taken


@native
@pytest.mark.parametrize(("cap", "level"), [("scalar", "scalar"), ("avx2", "avx2"), ("avx512", "avx512")])
def test_the_cap_chooses_the_level(cap: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (level, "fp32") not in LEVELS:
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv(backend.CAP_VARIABLE, cap)
    data = data_for(Case())
    with mock.patch.object(units, "_trainer", wraps=units._trainer) as taken:
        run(units.separable_units, data)
        assert [call.args[:2] for call in taken.call_args_list] == [(level, "fp32")] * 2
        assert units._trainer(level, "fp32", torch.get_num_threads()).level == level


@native
def test_what_takes_the_definition() -> None:
    case = Case(gathers=False, shortcut="tensor")
    data = data_for(case)
    empty = replace(data, x=data.x[:0], shortcut=None)
    with mock.patch.object(units, "_trainer", wraps=units._trainer) as taken:
        run(units.separable_units, data, torch.float64)
        x, made, _ = _leaves(empty, frozenset(["0.pointwise"]))
        assert units.separable_units(x, [Unit(**u) for u in made]).shape == (0, 6, 7, 9)
        with torch.no_grad():  # nothing is gathered, and no gradient wanted
            x, made, shortcut = _leaves(data, frozenset(["x", "0.pointwise"]))
            found = units.separable_units(x, [Unit(**u) for u in made], shortcut=shortcut)  # type: ignore[arg-type]
            right = reference.separable_units(x, [Unit(**u) for u in made], shortcut=shortcut)  # type: ignore[arg-type]
        assert torch.equal(found, right)
        with torch.autocast("cpu", torch.float16):
            run(units.separable_units, data)
        with backend.use_backend("reference"):
            run(units.separable_units, data)
        x, made, _ = _leaves(data, frozenset(["x"]))
        half = [{k: v.bfloat16() if k in PARAMETERS[:2] else v for k, v in u.items()} for u in made]
        with torch.autocast("cpu", torch.bfloat16):
            assert units.separable_units(x, [Unit(**u) for u in half]).dtype == torch.bfloat16
        assert taken.call_count == 0
        run(units.separable_units, data)
        assert taken.call_count == 2


@native
def test_a_relu_behind_a_shortcut_or_a_pool_takes_the_definition() -> None:
    for case in (Case(output_relu=True, shortcut="tensor"), Case(output_relu=True, pool="same")):
        data = data_for(case)
        with mock.patch.object(units, "_trainer", wraps=units._trainer) as taken:
            found = run(units.separable_units, data)
        assert taken.call_count == 0
        right = run(reference.separable_units, data)
        assert all(torch.equal(found[k], right[k]) for k in right)


def test_one_pixel_has_no_variance() -> None:
    data = data_for(Case(images=1, height=1, width=1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(units.separable_units, data)


@native
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("shortcut", (2, 6, 9, 7)),  # as many numbers as the output, lying otherwise
        ("shortcut", (2, 6, 7, 8)),
        ("depthwise", (4, 1, 3, 3)),
        ("pointwise", (6, 4, 1, 1)),
        ("scale", (5,)),
        ("offset", (7,)),
        ("running_mean", (5,)),
        ("running_variance", (7,)),
    ],
)
@pytest.mark.parametrize("gathers", [False, True])
def test_wrong_sizes_are_refused(name: str, shape: tuple[int, ...], gathers: bool) -> None:
    data = data_for(Case(gathers=gathers, shortcut="tensor"))
    wrong = torch.ones(shape)
    data = replace(data, shortcut=wrong) if name == "shortcut" else replace(data, units=[data.units[0] | {name: wrong}])
    x, made, shortcut = _leaves(data, frozenset(["x"]))
    with pytest.raises((RuntimeError, ValueError)):
        units.separable_units(x, [Unit(**u) for u in made], shortcut=shortcut)  # type: ignore[arg-type]


@native
def test_second_derivatives_are_refused() -> None:
    x, made, _ = _leaves(data_for(Case()), frozenset(["x"]))
    (gradient,) = torch.autograd.grad(
        units.separable_units(x, [Unit(**u) for u in made]).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ------------------------------------------------------------------------------------------- layouts and memory


@native
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "turned", "strided", "expanded"])
def test_any_layout_gives_the_same_bits(layout: str, kind: str) -> None:
    data = data_for(Case(channels=6, widths=(7, 6), height=8, width=8, shortcut="tensor"), kind)
    level = backend.kernel_level(kind)  # type: ignore[arg-type]
    right = run_native(data, level, kind)

    def laid(x: Tensor) -> Tensor:
        if layout == "contiguous":
            return x.clone(memory_format=torch.contiguous_format)
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "turned":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        if layout == "strided":
            return x.repeat_interleave(2, dim=3)[..., ::2]
        return x.clone()

    maps = torch.bfloat16 if kind == "bf16" else torch.float32
    x = laid(data.x.to(maps)).requires_grad_()
    assert isinstance(data.shortcut, Tensor)
    _, made, _ = _leaves(data, frozenset(k for k in right if k[0].isdigit() and "running" not in k))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        y = units.separable_units(x, [Unit(**u) for u in made], shortcut=laid(data.shortcut.to(maps)))
    assert torch.equal(y, right["output"])
    if layout == "expanded":  # as the gradient of a sum is
        data = replace(data, gradient=torch.ones(()).expand(y.shape))
        right = run_native(data, level, kind)
        y.backward(data.gradient.to(maps).expand(y.shape))
    else:
        y.backward(laid(data.gradient.to(maps)))
    assert x.grad is not None
    assert torch.equal(x.grad, right["x"])
    for i, unit in enumerate(made):
        assert all(torch.equal(unit[k].grad, right[f"{i}.{k}"]) for k in PARAMETERS)


@native
@at_every_level
@pytest.mark.parametrize("case", [FIXED[i] for i in (2, 3, 4, 7)], ids=["relu", "pool", "dense", "strips"])
def test_nothing_outside_is_read_or_written(case: Case, level: str, kind: str) -> None:
    """Every input lies between NaN, and none is changed."""
    data = data_for(case, kind)
    right = run_native(data, level, kind)
    held: list[tuple[Tensor, Tensor]] = []

    def between(values: Tensor) -> Tensor:
        around = torch.full((values.numel() + 256,), torch.nan, dtype=values.dtype)
        inside = around[128:-128]
        inside.copy_(values.reshape(-1))
        held.append((around, around.clone()))
        return inside.view(values.shape)

    maps = torch.bfloat16 if kind == "bf16" else torch.float32

    def between_rows(values: Tensor) -> Tensor:
        return between(values.to(maps).permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)

    x = between_rows(data.x).requires_grad_()
    made = [{k: between(v).requires_grad_() if k in PARAMETERS else v for k, v in u.items()} for u in data.units]
    made = [u | {k: u[k].clone() for k in ("running_mean", "running_variance")} for u in made]
    shortcut = between_rows(data.shortcut).requires_grad_() if isinstance(data.shortcut, Tensor) else data.shortcut
    with at_level(level), torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        y = units.separable_units(x, [Unit(**u) for u in made], shortcut=shortcut, **data.options)  # type: ignore[arg-type]
        y.backward(between_rows(data.gradient))
    found = {"output": y.detach(), "x": x.grad}
    found |= {f"{i}.{k}": u[k].grad for i, u in enumerate(made) for k in PARAMETERS}
    found |= {"shortcut": shortcut.grad} if isinstance(shortcut, Tensor) else {}
    for k, value in found.items():
        assert torch.equal(value, right[k]), k  # type: ignore[arg-type]
    for around, before in held:
        assert torch.equal(around.isnan(), before.isnan())
        assert torch.equal(around.nan_to_num(), before.nan_to_num())


@native
@at_every_level
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("end", ["linear", "relu", "shortcut", "pool"])
def test_what_is_not_finite_is_carried(level: str, kind: str, value: float, gathers: bool, end: str) -> None:
    """To the output where the definition has it, and nowhere else; so to the loss."""
    case = Case(channels=3, widths=(5, 18), height=9, width=11, gathers=gathers, input_relu=False)
    case = replace(case, output_relu=end == "relu", pool="same" if end == "pool" else "none")
    data = data_for(replace(case, shortcut="tensor" if end == "shortcut" else "none"), kind)
    data.x[1, 2, 4, 6] = value
    made = [Unit(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in u.items()}) for u in data.units]
    double = [Unit(**{k: v.double() if isinstance(v, Tensor) else v for k, v in u.items()}) for u in data.units]
    shortcut = data.shortcut.double() if isinstance(data.shortcut, Tensor) else None
    right = reference.separable_units(data.x.double(), double, shortcut=shortcut, **data.options)
    with at_level(level) as taken, torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        found = units.separable_units(data.x.requires_grad_(), made, shortcut=data.shortcut, **data.options)  # type: ignore[arg-type]
    assert taken.call_count == 1
    assert not right.isfinite().all()
    assert torch.equal(found.isfinite(), right.isfinite())
    assert torch.equal(found.isnan(), right.isnan())
    loss = found.float().square().mean()
    assert not loss.isfinite()
    loss.backward()
    assert data.x.grad is not None
    assert not data.x.grad.isfinite().all()


# ------------------------------------------------------------------------------------ repetition, threads, graphs


@native
@at_every_level
@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_repeat_bit_for_bit(level: str, kind: str, count: int) -> None:
    case = Case(images=5, channels=33, height=11, width=10, widths=(20, 33), shortcut="input")
    data = data_for(case, kind)
    right = run(reference.separable_units, data, torch.float64)
    with threads(count):
        first = run_native(data, level, kind)
        run_native(data_for(replace(case, images=7, height=20), kind), level, kind)  # its workspace is larger
        again = run_native(data, level, kind)
    for k in first:
        assert torch.equal(first[k], again[k]), k
        assert distance(first[k], right[k]) <= (1e-5 if kind == "fp32" else 0.3) * float(right[k].norm()), k


@native
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_many_threads(kind: str) -> None:
    some = (
        Case(channels=9, widths=(17, 9), shortcut="input"),
        Case(channels=20, height=12, widths=(33,), pool="same"),
        Case(channels=3, widths=(5, 6, 7), output_relu=True),
    )
    level = backend.kernel_level(kind)  # type: ignore[arg-type]
    given_data = [data_for(case, kind) for case in some]
    maps = torch.bfloat16 if kind == "bf16" else None

    def once(i: int) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            return run(units.separable_units, given_data[i % 3], maps=maps)

    right = [run_native(data, level, kind) for data in given_data]

    def same(i: int) -> bool:
        found = once(i)
        return all(torch.equal(found[k], v) for k, v in right[i % 3].items())

    with mock.patch.object(units, "_trainer", wraps=units._trainer) as taken, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, range(240)))
    assert taken.call_count == 480


@native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use() -> None:
    code = """
import os, torch
from xception.ops import units
from xception.ops.reference import Unit
torch.manual_seed(0)
x, depthwise, pointwise = torch.randn(4, 20, 9, 9), torch.randn(20, 1, 3, 3), torch.randn(24, 20, 1, 1)
def work():
    weights = [depthwise.clone().requires_grad_(), pointwise.clone().requires_grad_()]
    y = units.separable_units(x, [Unit(depthwise=weights[0], pointwise=weights[1])])
    assert 'SeparableUnits' in str(y.grad_fn)
    y.square().sum().backward()
    return [y.detach(), *(w.grad for w in weights)]
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    right = work()
    for _ in range(2):
        child = os.fork()
        if child == 0:
            ok = False
            try:
                torch.set_num_threads(threads)
                ok = all(map(torch.equal, work(), right))
            finally:
                os._exit(0 if ok else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, threads
        assert all(map(torch.equal, work(), right))
print('right')
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@native
def test_gradients_accumulate_and_graphs_are_kept() -> None:
    data = data_for(Case(channels=6, widths=(7, 6), shortcut="input"))
    once = run(units.separable_units, data)
    names = frozenset(k for k in once if k != "output" and "running" not in k)
    x, made, _ = _leaves(data, names)

    def gradients() -> dict[str, Tensor]:
        return {"x": x.grad} | {f"{i}.{k}": u[k].grad for i, u in enumerate(made) for k in PARAMETERS}

    y = units.separable_units(x, [Unit(**u) for u in made], shortcut="input")
    y.backward(data.gradient, retain_graph=True)
    assert all(torch.equal(v, once[k]) for k, v in gradients().items())
    y.backward(data.gradient)
    assert all(torch.equal(v, once[k] * 2) for k, v in gradients().items())
    units.separable_units(x, [Unit(**u) for u in made], shortcut="input").backward(data.gradient)
    for k, v in gradients().items():
        torch.testing.assert_close(v, once[k] * 3)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(data.gradient)


@native
def test_weights_that_change_before_the_backward_pass_are_noticed() -> None:
    x, made, _ = _leaves(data_for(Case()), frozenset(["x", "0.pointwise"]))
    y = units.separable_units(x, [Unit(**u) for u in made])
    with torch.no_grad():
        made[0]["pointwise"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@native
def test_one_unit_twice() -> None:
    """Tied weights and statistics, as in a tied middle flow."""
    data = data_for(Case(channels=6, widths=(6,)))
    found: dict[str, Any] = {}
    for choice in ("native", "reference"):
        x, made, _ = _leaves(data, frozenset(["x", "0.depthwise", "0.pointwise", "0.scale", "0.offset"]))
        unit = Unit(**made[0])
        with backend.use_backend(choice):  # type: ignore[arg-type]
            y = units.separable_units(units.separable_units(x, [unit], shortcut="input"), [unit, unit])
        y.backward(data.gradient)
        found[choice] = [y.detach(), x.grad, *(made[0][k].grad for k in PARAMETERS)]
        found[choice] += [made[0][k] for k in ("running_mean", "running_variance")]
        assert ("SeparableUnits" in str(y.grad_fn)) == (choice == "native")
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@native
def test_float32_maps_under_autocast() -> None:
    """The input is rounded once; its gradient comes back in its own type."""
    data = data_for(Case(channels=17, widths=(9, 17), shortcut="input"), "bf16")
    level = backend.kernel_level("bf16")
    right = run_native(data, level, "bf16")
    with at_level(level) as taken, torch.autocast("cpu", torch.bfloat16):
        found = run(units.separable_units, data, maps=torch.float32)
    assert taken.call_count == 2
    assert found["x"].dtype == torch.float32
    assert all(torch.equal(found[k].float(), v.float()) for k, v in right.items())
