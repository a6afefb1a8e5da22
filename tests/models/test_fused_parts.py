"""Networks that are out of the ordinary: hooks, other parts, ablations."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_cases import MODULES, Step, batch, both, counted, first_unit, narrow, narrow_like, native, parts, same, seed
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from xception.models.xception import Xception
from xception.ops import backend

__all__ = ["seed"]  # a fixture
pytestmark = native

# ----------------------------------------------------------------------------------------- parts of other kinds


# Not the convolutions' parts, whose weights SeparableConv2d reads without calling them.
PARTS = ("unit", "conv", "norm", "units", "pool")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_are_called(part: str, kind: str) -> None:
    """Of the module that has one, the parts are called; what the hook changes counts."""
    model = narrow()
    called: list[str] = []

    def change(module: nn.Module, *values: Any) -> Any:
        called.append(kind)
        last = values[0] if kind.endswith("pre") else values[-1]
        if kind == "forward":
            return last * 0.5
        if kind == "full_backward":
            last = values[0]
        return tuple(None if v is None else v * 0.5 for v in last)

    getattr(parts(model)[part], f"register_{kind}_hook")(change)
    found = Step(model, "native")
    assert called == [kind]
    right = Step(model, "reference")
    # That module's other units are computed by themselves.
    fused = MODULES - 1 + (2 if part in ("units", "pool") else 1)
    assert (found.calls, right.calls) == (2 * fused, 0)
    same(found, right)


@pytest.mark.parametrize("part", ["block", "shortcut", "flow", "model"])
def test_hooks_around_modules_are_no_hindrance(part: str) -> None:
    model = narrow()
    block: Any = model.entry_flow.block2
    called: list[str] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        called.append(part)
        return output * 2

    {"block": block, "shortcut": block.shortcut, "flow": model.entry_flow, "model": model}[part].register_forward_hook(
        note
    )
    both(model)
    assert called == [part] * 2


def test_hooks_on_all_modules_are_called() -> None:
    """Those that PyTorch keeps for every module of the process."""
    model = narrow()
    names = {module: name for name, module in model.named_modules()}
    seen: dict[str, list[str]] = {}
    for choice in ("native", "reference"):
        seen[choice] = []

        def note(module: nn.Module, inputs: Any, output: Any, seen: list[str] = seen[choice]) -> None:
            seen.append(names[module])

        handle = nn.modules.module.register_module_forward_hook(note)
        try:
            with backend.use_backend(choice):  # type: ignore[arg-type]
                model(batch()[0])
        finally:
            handle.remove()
    assert "middle_flow.0.units.1.norm" in seen["reference"]
    assert seen["native"] == seen["reference"]


def test_hooks_on_parameters() -> None:
    """Autograd's own, which change a gradient or learn that it is there."""
    model = narrow()
    unit = first_unit(model)
    arrived: list[str] = []
    unit.conv.pointwise.weight.register_hook(lambda gradient: gradient * 3)
    unit.norm.weight.register_post_accumulate_grad_hook(lambda p: arrived.append("norm"))
    x, labels = batch()
    plain = Step(narrow_like(model), "native")
    with backend.use_backend("native"), counted() as taken:
        F.cross_entropy(model(x), labels).backward()
    assert taken.call_count == 2 * MODULES
    assert arrived == ["norm"]
    name = "middle_flow.0.units.1.conv.pointwise.weight"
    gradient = plain.gradients[name]
    assert gradient is not None
    torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient * 3)


def replace_norm(make: Callable[[nn.BatchNorm2d], nn.Module]) -> Callable[[Xception], None]:
    def change(model: Xception) -> None:
        unit = first_unit(model)
        unit.norm = make(unit.norm)

    return change


def _weight_norm(model: Xception) -> None:
    parametrizations.weight_norm(first_unit(model).conv.pointwise)


def _spectral_norm(model: Xception) -> None:
    parametrizations.spectral_norm(first_unit(model).conv.depthwise)


def _forward(model: Xception) -> None:
    norm = first_unit(model).norm
    norm.forward = types.MethodType(lambda self, x: type(self).forward(self, x) + 1, norm)


def _unit_subclass(model: Xception) -> None:
    unit = first_unit(model)

    class Shifted(type(unit)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) + 1
            return y

    unit.__class__ = Shifted


def _identity(model: Xception) -> None:
    model.middle_flow[0].units[1] = nn.Identity()


def _other_unit(model: Xception) -> None:
    model.middle_flow[0].units[1] = nn.Sequential(nn.ReLU(), nn.Conv2d(12, 12, 1))


def _one_more(model: Xception) -> None:
    model.middle_flow[0].units.append(nn.Flatten(0, 0))


def _pool(model: Xception) -> None:
    model.entry_flow.block2.pool = nn.AvgPool2d(3, 2, padding=1)


def _dilation(model: Xception) -> None:
    """Units of one module that differ in their dilation."""
    depthwise = first_unit(model).conv.depthwise
    depthwise.sampling = {**depthwise.sampling, "dilation": 2}


# And how many of that module's units are computed by themselves.
CHANGES: dict[str, tuple[int, Callable[[Xception], None]]] = {
    "group norm": (2, replace_norm(lambda norm: nn.GroupNorm(3, norm.num_features))),
    "no norm": (2, replace_norm(lambda norm: nn.Identity())),
    "instance norm": (2, replace_norm(lambda norm: nn.InstanceNorm2d(norm.num_features, affine=True))),
    "weight norm": (2, _weight_norm),
    "spectral norm": (2, _spectral_norm),
    "replaced forward": (2, _forward),
    "derived unit": (2, _unit_subclass),
    "identity for a unit": (2, _identity),
    "another module for a unit": (2, _other_unit),
    "one more module": (3, _one_more),
    "another pool": (2, _pool),
    "two dilations": (3, _dilation),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_out_of_the_ordinary_is_called_part_by_part(change: str) -> None:
    model = narrow()
    before = Step(model, "reference")
    alone, spoil = CHANGES[change]
    spoil(model)
    # Not by a deep copy, which some of these do not survive unchanged.
    with backend.use_backend("native"), counted() as taken:
        state = {k: v.clone() for k, v in model.state_dict().items()}
        x, labels = batch()
        found = F.cross_entropy(model(x), labels)
        # (A derived unit may call its base's forward, which may be computed in one go, or not.)
        assert 0 <= taken.call_count - (MODULES - 1 + alone) <= int(change == "derived unit")
        found.backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    model.zero_grad()
    model.load_state_dict(state)
    with backend.use_backend("reference"):
        right = F.cross_entropy(model(x), labels)
        right.backward()
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    assert abs(float(right.detach() - before.loss)) > 1e-5 or change in ("weight norm", "one more module")
    largest = max(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)
    for k, parameter in model.named_parameters():
        assert (gradients[k] is None) == (parameter.grad is None), k
        if parameter.grad is not None:
            off = float((gradients[k] - parameter.grad).norm())  # type: ignore[operator]
            assert off <= 5e-4 * (float(parameter.grad.norm()) + 1e-2 * largest), k


@pytest.mark.parametrize(
    "options",
    [
        {"order": "pointwise_depthwise"},
        {"intermediate_activation": "relu"},
        {"intermediate_activation": "elu"},
        {"segments": 1},
        {"segments": 3},
    ],
)
def test_ablations_take_their_modules(options: dict[str, Any]) -> None:
    both(narrow(**options), 0)


def test_synchronised_normalisation_takes_its_modules() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(narrow()).eval()
    both(model, 0)


def test_float64_takes_the_definition() -> None:
    found = Step(narrow(), "native", double=True)
    assert found.calls == 0
    right = Step(narrow(), "reference", double=True)
    assert found.loss.dtype == torch.float64
    assert found.tensors().keys() == right.tensors().keys()
