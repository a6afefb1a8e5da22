"""What may be done with operations that train: any layout, numbers that are not finite, threads, forks, other types."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conv_cases import FIXED_CONVOLUTIONS, ConvCase, conv_data
from torch import Tensor
from trainer_cases import (
    MAP_TYPES,
    MAPS,
    Data,
    at_every_level,
    at_level,
    autocast,
    distance,
    is_running,
    leaves,
    native,
    results,
    right_of,
    run,
    run_native,
    threads,
    watched,
)
from unit_cases import FIXED, Case, data_for

from xception.ops import backend

pytestmark = native


def case_data(case: Case | ConvCase, kind: str = "fp32") -> Data:
    return data_for(case, kind) if isinstance(case, Case) else conv_data(case, kind)


OPERATIONS: dict[str, Case | ConvCase] = {
    "units": Case(channels=6, widths=(7, 6), height=8, width=8, shortcut="tensor"),
    "halving": Case(channels=6, widths=(7, 6), height=8, width=8, shortcut="convolution", pool="same"),
    "convolution": ConvCase(channels=6, out=7, height=8, width=8, stride=2, padding=1, output_relu=True),
    "pixels": ConvCase(channels=6, out=7, height=8, width=8, kernel=1),
}
of_each = pytest.mark.parametrize("operation", OPERATIONS)
of_both_types = pytest.mark.parametrize("kind", ["fp32", "bf16"])


@of_each
def test_what_takes_the_definition(operation: str) -> None:
    data = case_data(OPERATIONS[operation])
    frozen = replace(data, norms={part: norm | {"gathers": False} for part, norm in data.norms.items()})
    with watched() as taken:
        run(data.operation, data, torch.float64)
        empty = data.having({name: data.tensors[name][:0] for name in MAPS if name in data.tensors})
        size = data.call(data.operation, leaves(empty)).shape
        assert size == (0, *data.gradient.shape[1:])
        with torch.no_grad():  # nothing is gathered, and no gradient wanted
            found = frozen.call(data.operation, leaves(frozen))
            assert torch.equal(found, frozen.call(data.definition, leaves(frozen)))
        found = frozen.call(data.operation, leaves(frozen, wanted=frozenset()))
        assert not found.requires_grad
        with torch.autocast("cpu", torch.float16):
            run(data.operation, data)
        with backend.use_backend("reference"):
            run(data.operation, data)
        assert taken.call_count == 0
        run(data.operation, data)
        assert taken.call_count >= 2


@of_each
def test_tensors_of_different_types_are_the_definitions_matter(operation: str) -> None:
    """Which refuses them, but for a shortcut that is added."""
    data = case_data(OPERATIONS[operation])
    for name in data.tensors:
        outcomes = []
        for function in (data.operation, data.definition):
            tensors = leaves(data)
            tensors[name] = tensors[name].detach().double()
            try:
                outcomes.append(str(data.call(function, tensors).dtype))
            except RuntimeError as refused:
                outcomes.append(str(refused))
        assert outcomes[0] == outcomes[1], name
        assert (outcomes[1] == "torch.float64") == (name == "shortcut")


# ------------------------------------------------------------------------------------------- layouts and memory


def laid(x: Tensor, layout: str) -> Tensor:
    """The same numbers, lying otherwise; of vectors the strided ones only."""
    if layout == "strided":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if x.dim() < 4 or layout == "contiguous":
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "turned":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "swapped":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    assert layout == "sliced"
    return torch.cat([torch.full_like(x[:, :1], torch.nan), x, x], 1)[:, 1 : x.shape[1] + 1]


LAYOUTS = ("contiguous", "channels_last", "turned", "strided", "swapped", "sliced")


@of_both_types
@pytest.mark.parametrize("layout", LAYOUTS)
@of_each
def test_any_layout_of_maps_gives_the_same_bits(operation: str, layout: str, kind: str) -> None:
    data = case_data(OPERATIONS[operation], kind)
    right = run_native(data, backend.training_level(kind), kind)  # type: ignore[arg-type]
    tensors = leaves(data, maps=MAP_TYPES[kind])
    for name in MAPS:
        if name in tensors:
            tensors[name] = laid(tensors[name].detach(), layout).requires_grad_()
    with autocast(kind):
        y = data.call(data.operation, tensors)
    torch.autograd.backward(y, laid(data.gradient.to(y.dtype), layout))
    for name, value in results(y, tensors).items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@of_each
def test_any_layout_of_weights_gives_the_same_bits(operation: str, layout: str) -> None:
    data = case_data(OPERATIONS[operation])
    right = run_native(data, backend.training_level("fp32"), "fp32")
    for name in [name for name in data.tensors if name not in MAPS]:
        tensors = leaves(data)
        tensors[name] = laid(tensors[name].detach(), layout).requires_grad_(not is_running(name))
        y = data.call(data.operation, tensors)
        torch.autograd.backward(y, data.gradient)
        for other, value in results(y, tensors).items():
            assert torch.equal(value, right[other]), (name, other)


@of_both_types
@of_each
def test_a_gradient_without_memory_of_its_own(operation: str, kind: str) -> None:
    """As that of a sum is: one number, seen as a map."""
    data = case_data(OPERATIONS[operation], kind)
    data = replace(data, gradient=torch.ones(data.gradient.shape))
    right = run_native(data, backend.training_level(kind), kind)  # type: ignore[arg-type]
    tensors = leaves(data, maps=MAP_TYPES[kind])
    with autocast(kind):
        y = data.call(data.operation, tensors)
    torch.autograd.backward(y.sum())
    for name, value in results(y, tensors).items():
        assert torch.equal(value, right[name]), name


BETWEEN: dict[str, Case | ConvCase] = {
    **{name: FIXED[name] for name in ("relu", "pool", "dense", "strips", "projecting", "wide shortcut")},
    **{name: FIXED_CONVOLUTIONS[name] for name in ("stem", "padded stem", "every third", "five", "strips")},
    "of whole vectors": FIXED_CONVOLUTIONS["runs of whole vectors"],
    "one image": ConvCase(images=1, channels=7, height=5, width=5, out=9, output_relu=True),
}


@at_every_level
@pytest.mark.parametrize("case", BETWEEN)
def test_nothing_outside_is_read_or_written(case: str, level: str, kind: str) -> None:
    """Every tensor that is given lies between NaN, and none is changed."""
    data = case_data(BETWEEN[case], kind)
    right = run_native(data, level, kind)
    held: list[tuple[Tensor, Tensor]] = []

    def between(values: Tensor) -> Tensor:
        around = torch.full((values.numel() + 256,), torch.nan, dtype=values.dtype)
        inside = around[128:-128]
        inside.copy_(values.reshape(-1))
        held.append((around, around.clone()))
        return inside.view(values.shape)

    def between_rows(values: Tensor) -> Tensor:
        return between(values.to(MAP_TYPES[kind]).permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)

    tensors = {}
    for name, value in data.tensors.items():
        if is_running(name):  # which are changed
            tensors[name] = value.clone()
        else:
            tensors[name] = (between_rows if name in MAPS else between)(value).requires_grad_()
    with at_level(level), autocast(kind):
        y = data.call(data.operation, tensors)
        torch.autograd.backward(y, between_rows(data.gradient))
    for name, value in results(y, tensors).items():
        assert torch.equal(value, right[name]), name
    assert len(held) == len(data.trained()) + 1
    for around, before in held:
        assert torch.equal(around.isnan(), before.isnan())
        assert torch.equal(around.nan_to_num(), before.nan_to_num())


ENDS: dict[str, Case | ConvCase] = {
    "linear": Case(channels=3, widths=(5, 18), height=9, width=11, input_relu=False),
    "relu": Case(channels=3, widths=(5, 18), height=9, width=11, input_relu=False, output_relu=True),
    "shortcut": Case(channels=3, widths=(5, 18), height=9, width=11, input_relu=False, shortcut="tensor"),
    "pool": Case(channels=3, widths=(5, 18), height=9, width=11, input_relu=False, pool="same"),
    "projection": Case(channels=3, widths=(5, 18), height=9, width=11, pool="same", shortcut="convolution"),
    "convolution": ConvCase(channels=3, out=18, height=9, width=11, padding=1),
    "convolution, relu": ConvCase(channels=3, out=33, height=9, width=11, stride=2, output_relu=True),
    "pixels": ConvCase(channels=3, out=5, height=9, width=11, kernel=1, stride=2),
}


@at_every_level
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("end", ENDS)
def test_what_is_not_finite_is_carried(level: str, kind: str, value: float, gathers: bool, end: str) -> None:
    """To the output where the definition has it, and nowhere else; so to the loss."""
    case = replace(ENDS[end], gathers=gathers)
    if isinstance(case, Case):
        case = replace(case, shortcut_gathers=gathers)
    data = case_data(case, kind)
    data.tensors["x"][1, 2, 4, 6] = value
    right = data.call(data.definition, leaves(data, torch.float64))
    tensors = leaves(data)
    with at_level(level) as taken, autocast(kind):
        found = data.call(data.operation, tensors)
    assert taken.call_count == 1
    assert not right.isfinite().all()
    assert torch.equal(found.isfinite(), right.isfinite())
    assert torch.equal(found.isnan(), right.isnan())
    loss = found.float().square().mean()
    assert not loss.isfinite()
    torch.autograd.backward(loss)
    gradient = tensors["x"].grad
    assert gradient is not None
    assert not gradient.isfinite().all()


@at_every_level
def test_what_no_window_reads_does_not_matter(level: str, kind: str) -> None:
    """Pixels between those that a shortcut takes, and behind the last window."""
    for case, rows, columns in (
        (ConvCase(channels=3, height=9, width=11, kernel=1, stride=2), slice(1, None, 2), slice(None)),
        (ConvCase(channels=3, height=9, width=11, kernel=1, stride=2), slice(None), slice(1, None, 2)),
        (ConvCase(channels=3, height=8, width=9, stride=2), slice(7, 8), slice(None)),
        (ConvCase(channels=3, height=9, width=8, kernel=2, stride=3), slice(2, None, 3), slice(None)),
    ):
        data = conv_data(case, kind)
        right = run_native(data, level, kind)
        data.tensors["x"][:, :, rows, columns] = torch.nan
        found = run_native(data, level, kind)
        for name, value in right.items():
            assert torch.equal(found[name], value), name
        assert right["x"].any()
        assert not right["x"][:, :, rows, columns].any()


# ---------------------------------------------------------------------------------------- repetition and threads


REPEATED: dict[str, Case | ConvCase] = {
    "units": Case(images=5, channels=33, height=11, width=10, widths=(20, 33), shortcut="input"),
    "halving": Case(images=5, channels=17, height=11, width=10, widths=(20, 33), shortcut="convolution", pool="same"),
    "convolution": ConvCase(images=5, channels=17, height=11, width=10, out=40, padding=1, output_relu=True),
    "pixels": ConvCase(images=5, channels=33, height=11, width=10, out=40, kernel=1, stride=2),
}


@at_every_level
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", REPEATED)
def test_results_repeat_bit_for_bit(case: str, level: str, kind: str, count: int) -> None:
    data = case_data(REPEATED[case], kind)
    right = right_of(data)
    with threads(count):
        first = run_native(data, level, kind)
        run_native(case_data(replace(REPEATED[case], images=7, height=20), kind), level, kind)  # larger workspaces
        again = run_native(data, level, kind)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        off = distance(value, right[name])
        assert off <= (1e-5 if kind == "fp32" else 0.3) * float(right[name].norm()), name


SHARED: dict[str, Case | ConvCase] = {
    "an image": Case(images=1, channels=33, height=23, width=10, widths=(20, 33), shortcut="input"),
    "dilated": Case(images=3, channels=17, height=19, width=7, widths=(33, 20), dilation=3, shortcut="tensor"),
    "halving": Case(images=1, channels=40, height=21, width=10, widths=(70,), shortcut="convolution", pool="same"),
    "flat": Case(images=2, channels=9, height=1, width=30, widths=(17, 9)),
    "stem": ConvCase(images=1, channels=20, height=21, width=12, out=40, stride=2, padding=1, output_relu=True),
    "pixels": ConvCase(images=3, channels=33, height=11, width=10, out=40, kernel=1, stride=2),
}


@at_every_level
@pytest.mark.parametrize("count", [2, 5, 16])
@pytest.mark.parametrize("case", SHARED)
def test_few_images_are_shared_by_rows(case: str, level: str, kind: str, count: int) -> None:
    """More threads than images, or not a multiple: the numbers are those of one thread but for the order of sums."""
    data = case_data(SHARED[case], kind)
    with threads(1):
        alone = run_native(data, level, kind)
    with threads(count):
        together = run_native(data, level, kind)
    for name, value in alone.items():
        off = distance(together[name], value)
        assert off <= (1e-5 if kind == "fp32" else 1e-2) * float(value.double().norm()), name


@of_both_types
def test_many_threads(kind: str) -> None:
    """Calls from several at once, of operations of several sizes."""
    some: tuple[Case | ConvCase, ...] = (
        Case(channels=9, widths=(17, 9), shortcut="input"),
        Case(channels=20, height=12, widths=(33,), pool="same", shortcut="convolution"),
        ConvCase(channels=3, out=17, height=20, stride=2, output_relu=True),
    )
    level = backend.training_level(kind)  # type: ignore[arg-type]
    given = [case_data(case, kind) for case in some]
    right = [run_native(data, level, kind) for data in given]

    def same(i: int) -> bool:
        data = given[i % 3]
        with autocast(kind):
            found = run(data.operation, data, maps=MAP_TYPES[kind])
        return all(torch.equal(found[name], value) for name, value in right[i % 3].items())

    with watched() as taken, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, range(240)))
    assert taken.call_count >= 480


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use() -> None:
    code = """
import os, torch
from xception.ops import convolutions, units
from xception.ops.reference import Convolution, Unit
torch.manual_seed(0)
x = torch.randn(4, 20, 9, 9)
weights = [torch.randn(20, 1, 3, 3), torch.randn(24, 20, 1, 1), torch.randn(24, 20, 1, 1), torch.randn(7, 24, 3, 3)]
def work():
    ours = [w.clone().requires_grad_() for w in weights]
    y = units.separable_units(x, [Unit(depthwise=ours[0], pointwise=ours[1])], shortcut=Convolution(weight=ours[2]))
    assert 'SeparableUnits' in str(y.grad_fn)
    y = convolutions.normalised_conv2d(y, Convolution(weight=ours[3]))
    assert 'NormalisedConv' in str(y.grad_fn)
    torch.autograd.backward(y.square().sum())
    return [y.detach(), *(w.grad for w in ours)]
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
