"""What may be asked of operations that train: any gradients, gradients of gradients, kept graphs, statistics alone."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from conv_cases import ConvCase, conv_data
from torch import Tensor
from torch.autograd import forward_ad
from trainer_cases import (
    MAP_TYPES,
    Data,
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
    watched,
)
from unit_cases import Case, data_for

from xception.ops import backend, reference, units
from xception.ops.reference import Unit

pytestmark = native

OPERATIONS = {
    "units": data_for(Case(channels=6, widths=(7, 6), shortcut="input")),
    "a unit and a shortcut": data_for(Case(widths=(6,), shortcut="convolution", pool="same")),
    "convolution": conv_data(ConvCase(stride=2, padding=1, output_relu=True)),
    "pixels": conv_data(ConvCase(kernel=1, stride=2)),
}
of_each = pytest.mark.parametrize("operation", OPERATIONS)


@pytest.mark.parametrize(
    "data",
    [
        data_for(Case(channels=6, widths=(6, 6), shortcut="input", height=4, width=5)),
        data_for(Case(channels=6, widths=(7, 5), shortcut="tensor", pool="same", height=4, width=5)),
        data_for(Case(channels=6, widths=(7, 5), output_relu=True, gathers=False, height=4, width=5)),
        data_for(Case(channels=6, shortcut="convolution", pool="same", height=4, width=5)),
        data_for(Case(channels=6, shortcut="convolution", shortcut_kernel=3, gathers=False, height=4, width=5)),
        conv_data(ConvCase(output_relu=True)),
        conv_data(ConvCase(stride=2, padding=1, gathers=False)),
        conv_data(ConvCase(kernel=1, stride=2)),
    ],
    ids=["input", "pool", "relu", "halving", "projecting", "convolution", "frozen", "pixels"],
)
def test_every_subset_of_gradients(data: Data) -> None:
    """What is wanted has the same bits whatever else is, and what is not has none."""
    everything, right = run(data.operation, data), right_of(data)
    names = data.trained()
    gathers = any(norm["gathers"] for norm in data.norms.values())
    for name in names:
        assert distance(everything[name], right[name]) <= 1e-5 * float(right[name].norm()), name
    for chosen in itertools.product((False, True), repeat=len(names)):
        wanted = frozenset(name for name, choice in zip(names, chosen, strict=True) if choice)
        tensors = leaves(data, wanted=wanted)
        with watched() as taken:
            y = data.call(data.operation, tensors)
        assert y.requires_grad == bool(wanted)
        if not wanted - {"shortcut"} and not gathers:
            assert taken.call_count == 0
            continue
        assert taken.call_count == 1
        torch.testing.assert_close(y.detach(), everything["output"], rtol=0, atol=0)
        if wanted:
            torch.autograd.backward(y, data.gradient)
        for name in names:
            gradient = tensors[name].grad
            assert (gradient is not None) == (name in wanted), (name, wanted)
            assert gradient is None or torch.equal(gradient, everything[name]), (name, wanted)


@of_each
def test_statistics_are_gathered_without_gradients(operation: str) -> None:
    data = OPERATIONS[operation]
    tensors = leaves(data, wanted=frozenset())
    with torch.no_grad(), at_level("scalar") as taken:
        y = data.call(data.operation, tensors)
    assert taken.call_count == 1
    assert y.grad_fn is None
    right = right_of(data)
    moved = [name for name in tensors if is_running(name)]
    assert len(moved) == 2 * len(data.norms)
    for name in moved:
        torch.testing.assert_close(tensors[name].double(), right[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(tensors[name], data.tensors[name])
    torch.testing.assert_close(y.double(), right["output"], rtol=1e-4, atol=1e-5)


@of_each
def test_gradients_accumulate_and_graphs_are_kept(operation: str) -> None:
    data = OPERATIONS[operation]
    once, tensors = run(data.operation, data), leaves(data)
    y = data.call(data.operation, tensors)
    torch.autograd.backward(y, data.gradient, retain_graph=True)
    for name, value in results(y, tensors).items():
        assert torch.equal(value, once[name]), name
    torch.autograd.backward(y, data.gradient)
    assert all(torch.equal(tensors[name].grad, once[name] * 2) for name in data.trained())  # type: ignore[arg-type]
    torch.autograd.backward(data.call(data.operation, tensors), data.gradient)
    for name in data.trained():
        torch.testing.assert_close(tensors[name].grad, once[name] * 3)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.backward(y, data.gradient)


@of_each
def test_what_changes_before_the_backward_pass_is_noticed(operation: str) -> None:
    data = OPERATIONS[operation]
    for name in data.trained():
        if name.endswith(("weight", "pointwise", "depthwise")) or name == "x":
            tensors = leaves(data)
            y = data.call(data.operation, tensors)
            with torch.no_grad():
                tensors[name].mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.backward(y.sum())


@of_each
def test_no_gradient_may_arrive(operation: str) -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    data = OPERATIONS[operation]
    tensors = leaves(data)
    y = data.call(data.operation, tensors)
    torch.autograd.backward(Stop.apply(y).sum())
    assert all(tensors[name].grad is None for name in data.trained())


@of_each
def test_float32_maps_under_autocast(operation: str) -> None:
    """The input is rounded once; its gradient comes back in its own type."""
    case = OPERATIONS[operation]
    data = case.having({"x": case.tensors["x"].bfloat16().float()})
    level = backend.training_level("bf16")
    right = run_native(data, level, "bf16")
    with at_level(level) as taken, autocast("bf16"):
        found = run(data.operation, data, maps=torch.float32)
    assert taken.call_count >= 2
    assert found["x"].dtype == torch.float32
    assert all(torch.equal(found[name].float(), value.float()) for name, value in right.items())


def test_one_unit_twice() -> None:
    """Tied weights and statistics, as in a tied middle flow."""
    data = data_for(Case(channels=6, widths=(6,)))

    def twice(x: Tensor, made: list[Unit], **_: Any) -> Tensor:
        return units.separable_units(units.separable_units(x, made, shortcut="input"), made * 2)

    found = run_native_as(twice, data)
    with backend.use_backend("reference"):
        right = run(twice, data)
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def run_native_as(function: Any, data: Data) -> dict[str, Tensor]:
    with at_level("scalar") as taken:
        found = run(function, data)
    assert taken.call_count >= 4
    return found


# ------------------------------------------------------------------------------------------ gradients of gradients


def second_order(data: Data, kind: str, choice: backend.BackendChoice) -> dict[str, Tensor]:
    """Gradients of the sum of all gradients' squares, and what they are of."""
    tensors = leaves(data, maps=MAP_TYPES[kind])
    with backend.use_backend(choice), autocast(kind), watched() as taken:
        y = data.call(data.operation, tensors)
        gradient = data.gradient.to(y.dtype, copy=True).requires_grad_()
        wanted = [tensors[name] for name in data.trained()]
        first = torch.autograd.grad(y, wanted, gradient, create_graph=True)
        total = torch.stack([each.float().square().sum() for each in first]).sum()
        second = torch.autograd.grad(total, [*wanted, gradient], allow_unused=True)
    assert taken.call_count == (1 if choice == "native" else 0)  # the forward pass
    found = {f"first of {name}": value.detach() for name, value in zip(data.trained(), first, strict=True)}
    names = [*data.trained(), "the gradient"]
    found |= {f"second of {name}": v for name, v in zip(names, second, strict=True) if v is not None}
    return found | {name: tensor for name, tensor in tensors.items() if is_running(name)}


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@of_each
def test_gradients_of_gradients_are_the_definitions(operation: str, kind: str) -> None:
    """To the bit, where the gradient that arrives is; running statistics move once."""
    data = OPERATIONS[operation]
    found, right = second_order(data, kind, "native"), second_order(data, kind, "reference")
    assert found.keys() == right.keys()
    assert any(name.startswith("second") for name in right)
    for name, value in right.items():
        if is_running(name):
            torch.testing.assert_close(found[name], value, rtol=1e-5 if kind == "fp32" else 1e-2, atol=1e-4)
        else:
            assert value.any() or name.endswith("offset"), name
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("gathers", [False, True])
@of_each
def test_gradients_of_gradients_of_some(operation: str, gathers: bool) -> None:
    """A penalty on the input's gradient, for each other tensor by itself; against float64."""
    data = OPERATIONS[operation]
    data = replace(data, norms={part: norm | {"gathers": gathers} for part, norm in data.norms.items()})
    for name in data.trained():
        found = {}
        for choice, dtype in (("native", torch.float32), ("reference", torch.float64)):
            tensors = leaves(data, dtype, wanted=frozenset(["x", name]))
            with backend.use_backend(choice):  # type: ignore[arg-type]
                y = data.call(data.operation, tensors)
                (slope,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
                torch.autograd.backward(slope.square().sum())
            found[choice] = tensors
        for each in {"x", name}:
            right, gradient = found["reference"][each].grad, found["native"][each].grad
            assert right is not None
            assert gradient is not None
            assert distance(gradient, right) <= 1e-4 * float(right.norm()) + 1e-5, (name, each)
        others = [tensor for each, tensor in found["native"].items() if each not in ("x", name)]
        assert all(tensor.grad is None for tensor in others)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PyTorch's own making
@of_each
def test_forward_mode_takes_the_definition(operation: str) -> None:
    """PyTorch's dual numbers, which its own operations carry."""
    data = OPERATIONS[operation]
    found = {}
    for function in (data.operation, data.definition):
        tensors = leaves(data)
        with forward_ad.dual_level():
            tensors["x"] = forward_ad.make_dual(tensors["x"].detach(), torch.ones_like(tensors["x"]))  # type: ignore[no-untyped-call]
            found[function] = forward_ad.unpack_dual(data.call(function, tensors)).tangent  # type: ignore[no-untyped-call]
    assert found[data.definition] is not None
    torch.testing.assert_close(found[data.operation], found[data.definition])


@of_each
def test_several_gradients_at_once(operation: str) -> None:
    """As `torch.autograd.functional.jacobian(vectorize=True)` asks for them."""
    data = OPERATIONS[operation]
    several = torch.stack([data.gradient, data.gradient * 2])
    found = {}
    for function in (data.operation, data.definition):
        tensors = leaves(data)
        y = data.call(function, tensors)
        (found[function],) = torch.autograd.grad(y, tensors["x"], several, is_grads_batched=True)
    torch.testing.assert_close(found[data.operation], found[data.definition], rtol=1e-4, atol=1e-5)


def test_reference_and_operations_have_one_signature() -> None:
    """Whoever calls the definition may call the operation."""
    for data in OPERATIONS.values():
        ours, definition = (inspect.signature(f).parameters for f in (data.operation, data.definition))
        assert list(ours) == list(definition)
        assert [p.default for p in ours.values()] == [p.default for p in definition.values()]
        assert data.definition.__module__ == reference.__name__
