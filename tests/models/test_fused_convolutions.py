"""Stems and shortcuts: one operation where they are plain, else called; the units of a module stay one all the same."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_cases import (
    HOOKS,
    NOTHING,
    Parts,
    Step,
    batch,
    both,
    both_in_place,
    change,
    counted,
    narrow,
    native,
    same,
    seed,
    with_luck,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from xception.models.layers import ConvNorm
from xception.models.xception import Xception
from xception.ops import backend

__all__ = ["seed"]  # a fixture
pytestmark = native

WITHOUT_ONE_OF_THE_STEM = Parts(stem=1)
WITHOUT_A_SHORTCUT = Parts(shortcuts=2)
# Where the changed convolutions are, and what is left to the compiled path.
PLACES = {"stem": WITHOUT_ONE_OF_THE_STEM, "shortcut": WITHOUT_A_SHORTCUT}


def convolution_at(model: Xception, place: str) -> Any:
    """The stem's second one, whose input has a gradient; or a shortcut."""
    flow: Any = model.entry_flow
    return flow.stem.conv2 if place == "stem" else flow.block2.shortcut


# ---------------------------------------------------------------------------------------------------------- hooks


@with_luck
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("part", ["", "conv", "norm", "act"])
@pytest.mark.parametrize("place", PLACES)
def test_hooks_are_called(place: str, part: str, kind: str) -> None:
    """What they change counts; of the rest nothing is left to PyTorch."""
    model = narrow()
    called: list[str] = []
    module = convolution_at(model, place).get_submodule(part)
    getattr(module, f"register_{kind}_hook")(change(kind, called))
    found = Step(model, "native")
    assert called == [kind]
    assert (found.forward, found.backward) == (PLACES[place], PLACES[place].backward)
    right = Step(model, "reference")
    assert called == [kind] * 2
    same(found, right)


def test_hooks_on_an_identity_are_called() -> None:
    """A middle module's shortcut, which is no convolution."""
    model = narrow()
    called: list[str] = []
    shortcut: Any = model.middle_flow[0].shortcut
    assert type(shortcut) is nn.Identity
    shortcut.register_forward_hook(change("forward", called))
    both(model)
    assert called == ["forward"] * 2


@with_luck
def test_hooks_of_the_first_convolution() -> None:
    """Which reads the images."""
    for part in ("", "conv", "norm", "act"):
        model = narrow()
        called: list[str] = []
        stem: Any = model.entry_flow.stem
        stem.conv1.get_submodule(part).register_forward_hook(change("forward", called))
        both(model, WITHOUT_ONE_OF_THE_STEM)
        assert called == ["forward"] * 2


@with_luck
def test_hooks_with_their_keywords() -> None:
    for place, expected in PLACES.items():
        model = narrow()
        called: list[str] = []

        def note(module: nn.Module, inputs: Any, named: Any, output: Tensor, called: list[str] = called) -> Tensor:
            called.append("forward")
            return output + 1

        convolution_at(model, place).register_forward_hook(note, with_kwargs=True, always_call=True)
        both(model, expected)
        assert called == ["forward"] * 2


# ----------------------------------------------------------------------------------------- parts of other kinds

Change = Callable[[Any], None]


def set_conv(**options: Any) -> Change:
    """Another convolution of the same channels."""

    def apply(module: Any) -> None:
        conv = module.conv
        given: dict[str, Any] = {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding}
        given |= {"bias": False} | options
        module.conv = nn.Conv2d(conv.in_channels, conv.out_channels, **given)

    return apply


def set_norm(make: Callable[[int], nn.Module]) -> Change:
    def apply(module: Any) -> None:
        module.norm = make(module.norm.num_features)

    return apply


def set_act(act: nn.Module) -> Change:
    def apply(module: Any) -> None:
        module.act = act

    return apply


def parametrized(make: Callable[[nn.Module], Any]) -> Change:
    def apply(module: Any) -> None:
        make(module.conv)

    return apply


def _shifted(kind: type[nn.Module]) -> type[nn.Module]:
    class Shifted(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) + 0.5
            return y

    return Shifted


def derived(part: str) -> Change:
    def apply(module: Any) -> None:
        one = module.get_submodule(part)
        one.__class__ = _shifted(type(one))

    return apply


def replaced_forward(part: str) -> Change:
    def apply(module: Any) -> None:
        one = module.get_submodule(part)
        one.forward = types.MethodType(lambda self, x: type(self).forward(self, x) + 0.5, one)

    return apply


def _activation_first(module: Any) -> None:
    module.activation_first = True
    module.act = nn.ReLU()


CHANGES: dict[str, Change] = {
    "derived module": derived(""),
    "derived convolution": derived("conv"),
    "derived norm": derived("norm"),
    "derived activation": derived("act"),
    "forward of the module": replaced_forward(""),
    "forward of the convolution": replaced_forward("conv"),
    "forward of the norm": replaced_forward("norm"),
    "forward of the activation": replaced_forward("act"),
    "weight norm": parametrized(parametrizations.weight_norm),
    "spectral norm": parametrized(parametrizations.spectral_norm),
    "pruned": parametrized(lambda conv: prune.l1_unstructured(conv, "weight", 0.5)),  # type: ignore[no-untyped-call]
    "bias": set_conv(bias=True),
    "groups": set_conv(groups=2),
    "group norm": set_norm(lambda channels: nn.GroupNorm(2, channels)),
    "instance norm": set_norm(lambda channels: nn.InstanceNorm2d(channels, affine=True)),
    "no norm": set_norm(lambda channels: nn.Identity()),
    "another activation": set_act(nn.ELU()),
    "activation first": _activation_first,
}
OF_STEMS: dict[str, Change] = {
    "reflected padding": set_conv(padding_mode="reflect"),
    "circular padding": set_conv(padding_mode="circular"),
    "padding by name": set_conv(padding="same"),
    "dilation": set_conv(dilation=2, padding=2),
    "two strides": set_conv(stride=(1, 2)),
    "two paddings": set_conv(padding=(1, 0)),
    "not square": set_conv(kernel_size=(1, 3), padding=0),
    "padding as wide as the kernel": set_conv(padding=3),
}


@with_luck
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_out_of_the_ordinary_is_called(name: str, place: str) -> None:
    model = narrow()
    module = convolution_at(model, place)
    CHANGES[name](module)
    taken = both_in_place(model)
    assert (taken.forward, taken.backward) == (PLACES[place], PLACES[place].backward)


@with_luck
@pytest.mark.parametrize("name", OF_STEMS)
def test_windows_that_no_kernel_has_are_called(name: str) -> None:
    model = narrow()
    OF_STEMS[name](convolution_at(model, "stem"))
    taken = both_in_place(model)
    assert taken.forward == WITHOUT_ONE_OF_THE_STEM


# Convolutions that are no `ConvNorm`: the compiled path never asks them for parts that they do not have.
OTHERS: dict[str, Callable[[ConvNorm], nn.Module]] = {
    "a sequence": lambda old: nn.Sequential(old.conv, old.norm, old.act),
    "a convolution alone": lambda old: old.conv,
    "a wrapper": lambda old: nn.Sequential(old),
}


@with_luck
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OTHERS)
def test_other_modules(name: str, place: str) -> None:
    """In training; and in evaluation, with gradients or without."""
    model = narrow()
    other = OTHERS[name](convolution_at(model, place))
    flow: Any = model.entry_flow
    if place == "stem":
        flow.stem.conv2 = other
    else:
        flow.block2.shortcut = other
    both(model, PLACES[place])
    model.eval()
    both(model, PLACES[place])
    with torch.no_grad(), counted() as taken:
        found = {}
        for choice in ("native", "reference"):
            with backend.use_backend(choice):
                found[choice] = model(batch()[0])
    assert taken.forward == NOTHING
    assert torch.equal(found["native"], found["reference"])


# ------------------------------------------------------------------------------------------- convolutions that are


OF_SHORTCUTS: dict[str, Change] = {
    "three by three": set_conv(kernel_size=3, padding=1),
    "five by five": set_conv(kernel_size=5, padding=2),
    "two by two": set_conv(kernel_size=2),
}


@pytest.mark.parametrize("name", OF_SHORTCUTS)
def test_shortcuts_of_larger_windows(name: str) -> None:
    """Any plain convolution to the module's size is part of it."""
    model = narrow()
    OF_SHORTCUTS[name](convolution_at(model, "shortcut"))
    both(model)


def test_a_shortcut_with_a_relu_is_called() -> None:
    """The operation's has none."""
    model = narrow()
    set_act(nn.ReLU())(convolution_at(model, "shortcut"))
    both(model, WITHOUT_A_SHORTCUT)


def test_relus_in_place_are_plain() -> None:
    model = narrow()
    stem: Any = model.entry_flow.stem
    for module in (stem.conv1, stem.conv2):
        module.act = nn.ReLU(inplace=True)
    both(model)


def test_stems_without_relu() -> None:
    model = narrow()
    set_act(nn.Identity())(convolution_at(model, "stem"))
    both(model)


def test_a_shortcut_that_does_not_fit_is_refused_as_by_torch() -> None:
    for choice in ("native", "reference"):
        model = narrow()
        set_conv(stride=1)(convolution_at(model, "shortcut"))
        with backend.use_backend(choice), pytest.raises(RuntimeError, match="must match the size"):
            model(batch()[0])


def test_a_shortcut_of_one_pixel_is_refused_as_by_torch() -> None:
    """The units have four, the shortcut and the pool's output one."""
    for choice in ("native", "reference"):
        block: Any = narrow().entry_flow.block2
        with backend.use_backend(choice), pytest.raises(ValueError, match="more than 1 value per channel"):
            block(torch.randn(1, 8, 2, 2))


def test_modules_by_themselves() -> None:
    """A stem, and a block whose input wants a gradient, of odd sizes and one image."""
    model = narrow()
    flow: Any = model.entry_flow
    for module, x in ((flow.stem, torch.randn(1, 3, 31, 17)), (flow.block2, torch.randn(1, 8, 13, 6))):
        found = []
        for choice in ("native", "reference"):
            image = x.clone().requires_grad_()
            with backend.use_backend(choice), counted() as taken:
                y = module(image)
                torch.autograd.backward(y.square().sum())
            expected = Parts(1, 0, 1) if module is flow.block2 else Parts(0, 2, 0)
            assert taken.forward == (expected if choice == "native" else NOTHING)
            assert image.grad is not None
            found.append((y.detach(), image.grad))
        for one, other in zip(*found, strict=True):
            assert float((one - other).norm()) <= 2e-4 * float(other.norm())
