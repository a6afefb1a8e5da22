"""The network that a file claims to hold, built without memory, so that the claim can be checked first."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from xception.errors import ConfigError, WeightsError
from xception.models.registry import build, build_without_storage, config_from_dict

# Far above any real network (widths, classes, repeats), and low enough that a loop over one ends quickly.
MAX_CONFIG_INTEGER = 1 << 20
MAX_CONFIG_ITEMS = 10_000


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What a file holds of `model`: parameters and persistent buffers, a shared one under its first name only."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """How large a network a config from a file may ask for: what the file declares to hold."""

    tensors: int
    elements: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Allowance:
        return cls(tensors=len(tensors), elements=sum(tensor.numel() for tensor in tensors.values()))


def build_skeleton(name: str, config: Mapping[str, Any], allowance: Allowance | None = None) -> nn.Module:
    """The network `name` with `config` on the meta device: names, shapes and dtypes, but no memory.

    With an `allowance` neither is trusted: the config's numbers are bounded, and building stops as soon as it
    registers clearly more than a network of that size can have, so that ``middle_modules=10**9`` costs
    milliseconds. The global random state is left as it was. Raises `WeightsError` for a name or config that
    gives no network.
    """
    if allowance is not None:
        _check_name(name)
        _check_bounds(config)
    try:
        with torch.random.fork_rng(devices=[]), _limited_construction(allowance):
            return build_without_storage(name, config_from_dict(name, dict(config)))
    except WeightsError:
        raise
    except ConfigError as error:
        raise WeightsError(f"no such network: {error}") from error
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # A foreign config can break a constructor in any way; which one does not matter to the reader.
        problem = str(error).partition("\n")[0][:200]
        raise WeightsError(f"the config of {name!r} gives no network: {problem}") from error


def materialise(skeleton: nn.Module, name: str, config: Mapping[str, Any]) -> nn.Module:
    """The same network on the CPU, its memory allocated but not filled.

    A network with tensors that its state dict does not know (constants computed by the constructor) has to
    be built for real, as its state dict cannot fill them; the global random state is left as it was.
    """
    expected = list(tensors_of(skeleton))
    if not _has_hidden_tensors(skeleton):
        # As `to_empty`, but for a way of PyTorch's to the tensors that has to load sympy.
        model: nn.Module = skeleton._apply(  # type: ignore[no-untyped-call]
            lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        )
        if list(tensors_of(model)) == expected:  # else a shared parameter came apart
            return model
    with torch.random.fork_rng(devices=[]):
        return build(name, config_from_dict(name, dict(config)))


def check_fit(
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    """Raise `WeightsError` unless both have the same names and shapes, and dtypes of the same kind.

    Any floating dtype may stand for any other (a network in half precision is the same network); integer
    dtypes must be equal.
    """
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing {_some(missing)}")
    if unexpected := [name for name in found if name not in expected]:
        problems.append(f"unexpected {_some(unexpected)}")
    for name, (want_dtype, want_shape) in expected.items():
        dtype, shape = found.get(name, (want_dtype, want_shape))
        if want_shape != shape:
            problems.append(f"{name}: expected shape {want_shape}, got {shape}")
        elif want_dtype != dtype and not (want_dtype.is_floating_point and dtype.is_floating_point):
            problems.append(f"{name}: expected {want_dtype}, got {dtype}")
    if problems:
        more = f" (and {len(problems) - 3} more problems)" if len(problems) > 3 else ""
        raise WeightsError("; ".join(problems[:3]) + more)


def signature(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> dtype and shape, the form that `check_fit` compares."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _some(names: list[str]) -> str:
    listed = ", ".join(repr(name[:80]) for name in names[:3])
    return listed + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_name(name: str) -> None:
    """Other libraries take names that mean a download or a folder (``hf-hub:...``): only plain ones pass."""
    if not re.fullmatch(r"[A-Za-z0-9_]+(/[A-Za-z0-9_.]+)?", name):
        raise WeightsError(f"{name[:80]!r} is not the name of a network")


def _check_bounds(value: object, where: str = "config") -> None:
    if isinstance(value, int) and abs(value) > MAX_CONFIG_INTEGER:
        raise WeightsError(f"{where[:80]} is out of range: at most {MAX_CONFIG_INTEGER:,} is accepted")
    if isinstance(value, dict | list | str) and len(value) > MAX_CONFIG_ITEMS:
        raise WeightsError(f"{where[:80]} is too long: at most {MAX_CONFIG_ITEMS:,} items are accepted")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_bounds(item, f"{where}.{key}")
    if isinstance(value, list):
        for item in value:
            _check_bounds(item, where)


@contextlib.contextmanager
def _limited_construction(allowance: Allowance | None) -> Iterator[None]:
    """Stop a constructor of this thread that registers too many tensors, elements or modules.

    A module holds a tensor or wraps one that does, activations aside, and a constructor may replace what it
    just made: 16 registrations a tensor and 4 times the elements are generous. A tensor is registered before
    it is filled, so the first one that is too much has cost no memory.
    """
    if allowance is None:
        yield
        return
    thread = threading.get_ident()
    registrations, elements = 64 + 16 * allowance.tensors, (1 << 20) + 4 * allowance.elements

    def on_registration(_owner: nn.Module, _name: str, part: object) -> None:
        nonlocal registrations, elements
        if threading.get_ident() != thread:
            return
        registrations -= 1
        elements -= part.numel() if isinstance(part, Tensor) else 0
        if registrations < 0 or elements < 0:
            raise WeightsError(
                f"its config asks for a larger network than its {allowance.tensors} tensors "
                f"of {allowance.elements:,} elements"
            )

    handles = [
        module_hooks.register_module_parameter_registration_hook(on_registration),
        module_hooks.register_module_buffer_registration_hook(on_registration),
        module_hooks.register_module_module_registration_hook(on_registration),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_hidden_tensors(model: nn.Module) -> bool:
    known = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    return any(
        isinstance(value, Tensor) and id(value) not in known
        for module in model.modules()
        for values in (module._parameters, module._buffers, vars(module))
        for value in values.values()
    )
