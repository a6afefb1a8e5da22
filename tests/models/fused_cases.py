"""Narrow networks, and a step of training on both paths; what the compiled one computed is counted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xception.models.xception import Xception, XceptionConfig
from xception.ops import backend, units

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
# In the order of the network: two modules of the entry flow, two of the middle, the exit's, and two units behind it.
MODULES = 7


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def narrow(**options: Any) -> Xception:
    model = Xception(XceptionConfig(**{**NARROW, **options}))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # not 1 and 0, which would hide what is mistaken for what
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch(size: int = 48, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (count,), generator=generator)
    return torch.randn(count, 3, size, size, generator=generator), labels


@contextmanager
def counted() -> Iterator[mock.Mock]:
    with mock.patch.object(units, "_trainer", wraps=units._trainer) as taken:
        yield taken


class Step:
    """One step's loss, gradients and buffers, of a copy of the model; and how often the compiled path was taken."""

    def __init__(self, model: nn.Module, choice: str, *, bf16: bool = False, double: bool = False) -> None:
        model = copy.deepcopy(model)
        x, labels = batch()
        if double:
            model, x = model.double(), x.double()
        with backend.use_backend(choice), counted() as taken:  # type: ignore[arg-type]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(x), labels)
            self.forward_calls = taken.call_count
            loss.backward()
            self.calls = taken.call_count
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


def both(model: nn.Module, expected: int | None = MODULES) -> Step:
    """The step by either path, which agree; the compiled one computed so many modules."""
    found, right = Step(model, "native"), Step(model, "reference")
    assert right.calls == 0
    if expected is not None:
        assert (found.forward_calls, found.calls) == (expected, 2 * expected)
    same(found, right)
    return found


def first_unit(model: Xception) -> Any:
    return model.middle_flow[0].units[1]


def parts(model: Xception) -> dict[str, nn.Module]:
    block: Any = model.entry_flow.block2
    unit = block.units[0]
    return {
        "unit": unit,
        "conv": unit.conv,
        "norm": unit.norm,
        "units": block.units,
        "pool": block.pool,
    }


def narrow_like(model: Xception) -> Xception:
    other = Xception(model.config)
    other.load_state_dict(model.state_dict())
    return other
