"""Operations that train in the compiled extension: their numbers, how they are run, and at which levels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from xception.ops import backend, convolutions, reference, trainer, units

native = pytest.mark.skipif(not backend.native_available(), reason="the extension is not built")

Function = Callable[..., Tensor]
OPERATIONS: dict[str, Function] = {
    "separable_units": units.separable_units,
    "normalised_conv2d": convolutions.normalised_conv2d,
}
MAPS = ("x", "shortcut")  # the tensors that are maps
MAP_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _levels() -> list[tuple[str, str]]:
    """Every (level, type) that trains on this machine; AMX by its emulation too."""
    features = backend.detected_features()
    found = [("scalar", "fp32"), ("scalar", "bf16")]
    for level in ("avx2", "avx512"):
        found += [(level, kind) for kind in ("fp32", "bf16") if level in features]
    needs = (("avx512_bf16", "avx512_bf16"), ("amx_emulated", "avx512"), ("amx_bf16", "amx_bf16"))
    found += [(level, "bf16") for level, feature in needs if feature in features]
    return found + [(level, "fp32") for level, feature in needs[1:] if feature in features]


LEVELS = _levels()
at_every_level = pytest.mark.parametrize(("level", "kind"), LEVELS)


@contextmanager
def watched() -> Iterator[mock.Mock]:
    """What is yielded counts how often the compiled kernels were asked for, and which."""
    with mock.patch.object(trainer, "trainer", wraps=trainer.trainer) as taken:
        yield taken


@contextmanager
def at_level(level: str) -> Iterator[mock.Mock]:
    """Train with these kernels, watched."""
    with (
        backend.use_backend("native"),
        mock.patch.object(backend, "training_level", return_value=level),
        mock.patch.object(backend, "kernel_level", return_value=level),
        watched() as taken,
    ):
        yield taken


def autocast(kind: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_running(name: str) -> bool:
    return name.endswith(("running_mean", "running_variance"))


@dataclass(frozen=True)
class Data:
    """A call's numbers, all of which float32 (maps: bfloat16, where that is asked for) holds exactly.

    `tensors` are named "x", "shortcut", or "part.field"; `norms` has the parts' other fields. `make` calls a function
    of the operation's signature with tensors, and with the parts' fields made of both.
    """

    name: str
    tensors: dict[str, Tensor]
    norms: dict[str, dict[str, Any]]
    gradient: Tensor
    make: Callable[[Function, dict[str, Tensor], dict[str, dict[str, Any]]], Tensor]

    @property
    def operation(self) -> Function:
        return OPERATIONS[self.name]

    @property
    def definition(self) -> Function:
        function: Function = getattr(reference, self.name)
        return function

    def call(self, function: Function, tensors: dict[str, Tensor]) -> Tensor:
        parts = {part: dict(fields) for part, fields in self.norms.items()}
        for name, tensor in tensors.items():
            part, _, field = name.partition(".")
            if field:
                parts[part][field] = tensor
        return self.make(function, tensors, parts)

    def having(self, changed: dict[str, Tensor | None]) -> Data:
        """With other tensors; None: without them."""
        tensors = {name: tensor for name, tensor in (self.tensors | changed).items() if tensor is not None}
        return replace(self, tensors=tensors)

    def trained(self) -> list[str]:
        """Names of the tensors that may have gradients."""
        return [name for name in self.tensors if not is_running(name)]


def leaves(
    data: Data,
    dtype: torch.dtype = torch.float32,
    maps: torch.dtype | None = None,
    wanted: frozenset[str] | None = None,
) -> dict[str, Tensor]:
    """Copies of its tensors, maps of their own type. Those `wanted` require gradients; None is all that may."""
    wanted = frozenset(data.trained()) if wanted is None else wanted
    found = {}
    for name, tensor in data.tensors.items():
        kind = maps if maps is not None and name in MAPS else dtype
        found[name] = tensor.detach().to(kind, copy=True).requires_grad_(name in wanted)
    return found


def results(y: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, gradients and running statistics, by name; all are there."""
    found = {"output": y.detach()}
    for name, tensor in tensors.items():
        value = tensor if is_running(name) else tensor.grad
        assert value is not None, name
        found[name] = value
    return found


def run(
    function: Function, data: Data, dtype: torch.dtype = torch.float32, maps: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Forward and backward; weights and statistics of `dtype`, maps of `maps`."""
    tensors = leaves(data, dtype, maps)
    y = data.call(function, tensors)
    torch.autograd.backward(y, data.gradient.to(y.dtype))
    return results(y, tensors)


def right_of(data: Data) -> dict[str, Tensor]:
    """By the definition, in float64."""
    return run(data.definition, data, torch.float64)


def run_native(data: Data, level: str, kind: str) -> dict[str, Tensor]:
    """By these kernels, which is made sure of."""
    with at_level(level) as taken, autocast(kind):
        found = run(data.operation, data, maps=MAP_TYPES[kind])
    assert taken.call_count >= 2  # forward and backward
    assert all(call == mock.call(level, kind, torch.get_num_threads()) for call in taken.call_args_list)
    assert found["output"].dtype == MAP_TYPES[kind]
    return found


def run_torch(data: Data, kind: str) -> dict[str, Tensor]:
    """By PyTorch, in the same precision."""
    with backend.use_backend("reference"), autocast(kind):
        return run(data.operation, data, maps=MAP_TYPES[kind])


def distance(found: Tensor, right: Tensor) -> float:
    assert found.shape == right.shape
    assert found.isfinite().all()
    return float((found.double() - right).norm())


def assert_errors_are_of_the_size_of_torchs_own(data: Data, level: str, kind: str) -> None:
    """Against float64: at most three times PyTorch's in the same precision, and a rounding or two of the result."""
    right = right_of(data)
    own, found = run_torch(data, kind), run_native(data, level, kind)
    floor = 1e-6 if kind == "fp32" else 4e-3
    for name, value in right.items():
        bound = 3 * distance(own[name], value) + floor * float(value.norm())
        assert distance(found[name], value) <= bound, name


def assert_takes_the_definition(data: Data) -> None:
    """The same bits, and no compiled kernel was asked for."""
    with watched() as taken:
        found = run(data.operation, data)
    assert taken.call_count == 0
    right = run(data.definition, data)
    for name, value in right.items():
        assert torch.equal(found[name], value), name


def assert_gradients_are_right(data: Data) -> None:
    """The definition's, by PyTorch's numerical check in float64."""
    names = data.trained()
    fixed = {name: tensor.double() for name, tensor in data.tensors.items()}
    wanted = [fixed[name].requires_grad_() for name in names]

    def call(*values: Tensor) -> Tensor:
        return data.call(data.definition, fixed | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(call, wanted)


# ------------------------------------------------------------------------------------------------------ numbers


class Numbers:
    """Numbers of a case, from its seed. `tame`: those of maps and of the first weights are whole, small ones."""

    def __init__(self, seed: int, kind: str, *, tame: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.kind, self.tame = kind, tame

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def whole(self, most: int, *shape: int) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=self.generator).float()

    def signs(self, *shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=self.generator).float() * 2 - 1

    def gradient(self, *shape: int) -> Tensor:
        values = self.normal(*shape)
        return values.bfloat16().float() if self.kind == "bf16" else values

    def input(self, *shape: int) -> Tensor:
        return self.whole(2, *shape) if self.tame else self.gradient(*shape)

    def weights(self, *shape: int) -> Tensor:
        return self.whole(1, *shape) if self.tame else self.normal(*shape) / (shape[1] * shape[2] * shape[3]) ** 0.5

    def norm(self, out: int, *, affine: bool, away: bool = False, spread: float = 1.0) -> dict[str, Tensor]:
        """`away`: normalised values are far from zero, so that a ReLU keeps or drops whole channels."""
        found = {}
        if away:
            found["scale"] = (torch.rand(out, generator=self.generator) * 0.2 + 0.1) * self.signs(out)
            found["offset"] = (torch.rand(out, generator=self.generator) + 1.5) * self.signs(out)
        elif affine:
            found["scale"] = torch.rand(out, generator=self.generator) + 0.5
            found["offset"] = self.normal(out) * 0.3
        found["running_mean"] = self.normal(out) * spread
        variance = torch.rand(out, generator=self.generator) + 0.5
        found["running_variance"] = variance * spread**2 * (9 if away else 1)
        return found


def named(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{field}": tensor for field, tensor in tensors.items()}
