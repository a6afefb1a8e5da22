"""Networks that are out of the ordinary: hooks, other parts, ablations."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_cases import (
    HOOKS,
    NOTHING,
    WHOLE,
    Parts,
    Step,
    batch,
    both,
    both_in_place,
    change,
    counted,
    first_unit,
    narrow,
    narrow_like,
    native,
    same,
    seed,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from xception.models.xception import Xception
from xception.ops import backend

__all__ = ["seed"]  # a fixture
pytestmark = native

# ----------------------------------------------------------------------------------------- parts of other kinds


# Not the convolutions' parts, whose weights SeparableConv2d reads without calling them.
PARTS = ("unit", "conv", "norm", "units", "pool")


def parts(model: Xception) -> dict[str, nn.Module]:
    block: Any = model.entry_flow.block2
    unit = block.units[0]
    return {"unit": unit, "conv": unit.conv, "norm": unit.norm, "units": block.units, "pool": block.pool}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_called(part: str, kind: str) -> None:
    """Of the module that has one, the parts are called; what the hook changes counts."""
    model = narrow()
    called: list[str] = []
    getattr(parts(model)[part], f"register_{kind}_hook")(change(kind, called))
    found = Step(model, "native")
    assert called == [kind]
    right = Step(model, "reference")
    # That module's other units are computed by themselves, and its shortcut is called.
    assert found.forward == Parts(modules=WHOLE.modules - 1 + (2 if part in ("units", "pool") else 1), shortcuts=2)
    assert (found.backward, right.backward) == (found.forward.backward, 0)
    same(found, right)


@pytest.mark.parametrize("part", ["block", "flow", "stem", "model"])
def test_hooks_around_modules_are_no_hindrance(part: str) -> None:
    model = narrow()
    flow: Any = model.entry_flow
    called: list[str] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        called.append(part)
        return output * 2

    {"block": flow.block2, "flow": flow, "stem": flow.stem, "model": model}[part].register_forward_hook(note)
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
            with backend.use_backend(choice):
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
        torch.autograd.backward(F.cross_entropy(model(x), labels))
    assert (taken.forward, taken.backward) == (WHOLE, WHOLE.backward)
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
    flow: Any = model.middle_flow
    flow[0].units[1] = nn.Identity()


def _other_unit(model: Xception) -> None:
    flow: Any = model.middle_flow
    flow[0].units[1] = nn.Sequential(nn.ReLU(), nn.Conv2d(12, 12, 1))


def _one_more(model: Xception) -> None:
    flow: Any = model.middle_flow
    flow[0].units.append(nn.Flatten(0, 0))


def _pool(model: Xception) -> None:
    flow: Any = model.entry_flow
    flow.block2.pool = nn.AvgPool2d(3, 2, padding=1)


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


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_out_of_the_ordinary_is_called_part_by_part(name: str) -> None:
    model = narrow()
    before = Step(model, "reference")
    alone, spoil = CHANGES[name]
    spoil(model)
    taken = both_in_place(model)
    # (A derived unit may call its base's forward, which may be computed in one go, or not.)
    more = taken.forward.modules - (WHOLE.modules - 1 + alone)
    assert 0 <= more <= int(name == "derived unit")
    assert (taken.forward.stem, taken.forward.shortcuts) == (2, 3 - (name == "another pool"))
    assert taken.backward == taken.forward.backward
    after = Step(model, "reference") if name in ("another pool", "two dilations", "no norm") else None
    assert after is None or abs(float(after.loss - before.loss)) > 1e-5


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
    both(narrow(**options), Parts(modules=0, shortcuts=0))


def test_synchronised_normalisation_takes_its_modules() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(narrow()).eval()  # type: ignore[no-untyped-call]
    both(model, NOTHING)


def test_float64_takes_the_definition() -> None:
    found = Step(narrow(), "native", double=True)
    assert (found.recomputed, found.backward) == (NOTHING, 0)
    right = Step(narrow(), "reference", double=True)
    assert found.loss.dtype == torch.float64
    assert found.tensors().keys() == right.tensors().keys()
