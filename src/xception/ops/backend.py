"""What this machine can do, and which path the operations take.

Two choices are kept apart. The *backend* is compiled kernels (`native`) or plain PyTorch (`reference`): `auto`
takes the kernels where they are, `set_backend` and `use_backend` force either. The *instruction set* is what the
kernels use of the processor: everything it offers, capped by the environment variable `XCEPTION_MAX_ISA`.

Torch-free, and no `typing`, `dataclasses` or `logging` either: the command line imports this module at its start.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES

from xception.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType
    from typing import Literal

    from xception._native import Crews as Crews
    from xception._native import Network as Network
    from xception._native import Optimiser as Optimiser
    from xception._native import UnitTrainer as UnitTrainer

    Backend = Literal["native", "reference"]
    Precision = Literal["fp32", "bf16", "fp16"]
    NetworkPrecision = Literal["fp32", "bf16", "fp16", "int8"]
    BackendChoice = Literal["auto", "native", "reference"]

CAP_VARIABLE = "XCEPTION_MAX_ISA"

# Weakest first; a cap removes all that come after it.
_X86_LEVELS: tuple[str, ...] = ("scalar", "avx2", "avx512", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16")
_ARM_LEVELS: tuple[str, ...] = ("scalar", "neon")
_OTHER_LEVELS: tuple[str, ...] = ("scalar",)

# Features that make no level of their own: the kernels of that level use them where they are.
_PART_OF = {"avx512_vnni": "avx512", "avx512_bf16": "avx512"}

# The interface of the extension that this version of the package works with: `kInterface` in bindings.cpp.
_INTERFACE = 11


def _load_native() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason why there is none."""
    try:
        import xception._native as native
    except ModuleNotFoundError as error:
        if error.name != "xception._native":
            return None, f"the compiled extension does not load ({_first_line(error)})"
        return None, _why_missing()
    except ImportError as error:
        return None, f"the compiled extension does not load ({_first_line(error)})"
    found = getattr(native, "INTERFACE", None)
    if found != _INTERFACE:
        return None, (
            f"the compiled extension is not of this version (its interface is {found}, "
            f"{_INTERFACE} is expected): install the package again"
        )
    return native, ""


def _why_missing() -> str:
    for folder in sys.modules["xception"].__path__:  # two folders in an editable install
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            is_extension = name.startswith("_native.") and name.endswith((".so", ".pyd"))
            if is_extension and name.removeprefix("_native") not in EXTENSION_SUFFIXES:
                return f"the compiled extension is for another Python ({name})"
    return "the compiled extension is missing (no C++ compiler at install time?)"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_native, _why_not_native = _load_native()
_process_choice: BackendChoice = "auto"
_scoped_choice: ContextVar[BackendChoice | None] = ContextVar("xception_backend", default=None)
_said: dict[str, object] = {}


# ---------------------------------------------------------------------------------------------------- backend


def native_available() -> bool:
    """Whether the compiled extension is installed and loads."""
    return _native is not None


def set_backend(choice: BackendChoice) -> None:
    """Choose the backend for the whole process: `auto`, `native` or `reference`.

    Raises ConfigError for another word, and for `native` where the extension is missing.
    """
    global _process_choice
    _process_choice = _checked(choice)


@contextmanager
def use_backend(choice: BackendChoice) -> Iterator[None]:
    """Choose the backend inside a `with` block, in this thread (or asyncio task) only.

    Raises ConfigError like `set_backend`.
    """
    token = _scoped_choice.set(_checked(choice))
    try:
        yield
    finally:
        _scoped_choice.reset(token)


def active_backend() -> Backend:
    """The path the operations take now. Where `auto` has to fall back, this says so, once a process."""
    choice = _scoped_choice.get() or _process_choice
    if choice != "auto":
        return choice
    if _native is not None:
        return "native"
    say_once(f"running on plain PyTorch: {_why_not_native}")
    return "reference"


def _checked(choice: BackendChoice) -> BackendChoice:
    if choice not in ("auto", "native", "reference"):
        raise ConfigError(f"expected the backend 'auto', 'native' or 'reference', got {choice!r}")
    if choice == "native" and _native is None:
        raise ConfigError(f"the backend 'native' cannot be used: {_why_not_native}")
    return choice


def say_once(message: str) -> None:
    """Warn of something, the same thing once a process."""
    # setdefault is atomic: of many threads exactly one finds its own token, and no lock can be caught by a fork.
    token = object()
    if _said.setdefault(message, token) is token:
        import logging

        logging.getLogger("xception").warning("xception: %s", message)


# -------------------------------------------------------------------------------------------- instruction sets


def cpu_name() -> str:
    """The processor's own name, such as "AMD EPYC"; the architecture's where it does not tell."""
    return (_native.cpu_name() if _native is not None else "") or _architecture()


def detected_features() -> tuple[str, ...]:
    """The instruction sets that the processor and the operating system offer, weakest first.

    Empty without the extension, which does the asking. AMX is listed only once Linux has permitted the tiles.
    """
    if _native is None:
        return ()
    return tuple(name for name, usable in _native.cpu_features().items() if usable)


def cpu_features() -> tuple[str, ...]:
    """The detected instruction sets that the kernels may use: up to `XCEPTION_MAX_ISA`.

    Raises ConfigError where that variable holds no level of this architecture.
    """
    allowed = _levels_up_to_cap()
    return tuple(name for name in detected_features() if _PART_OF.get(name, name) in allowed)


def available_levels() -> tuple[str, ...]:
    """The levels the kernels can run at on this machine, weakest first, `scalar` among them; none without them.

    Raises ConfigError like `cpu_features`.
    """
    usable = cpu_features()
    if _native is None:
        return ()
    return tuple(level for level in _levels_up_to_cap() if level == "scalar" or level in usable)


# The kernels by precision, strongest first, and the feature that each needs.
_KERNELS = {
    "fp32": ("amx_bf16", "avx512", "avx2"),  # on tiles of bf16 in pieces that sum to the float
    "bf16": ("amx_bf16", "avx512_fp16", "avx512_bf16", "avx512", "avx2"),
    "fp16": ("amx_fp16", "avx512_fp16", "avx512", "avx2"),
    # Beside activations in bf16, or half precision.
    "int8": ("amx_bf16", "avx512_fp16", "avx512_bf16", "avx512_vnni", "avx512", "avx2"),
}


def kernel_level(precision: NetworkPrecision) -> str:
    """The strongest kernels for this precision that the machine has and `XCEPTION_MAX_ISA` allows.

    Raises ConfigError like `cpu_features`.
    """
    return _kernel_level(precision, os.environ.get(CAP_VARIABLE))


@lru_cache  # asked for by every operation of every step
def _kernel_level(precision: NetworkPrecision, cap: str | None) -> str:
    features = cpu_features()  # of that cap
    return next((level for level in _KERNELS[precision] if level in features), "scalar")


def training_level(precision: Precision) -> str:
    """The fastest kernels to train with in this precision, otherwise like `kernel_level`.

    Gradients are too small for half precision. Processors that have its arithmetic do pairs of bf16 at half of the rate
    of floats, so products are of floats there: 1.6 times the images a second (docs/log.md).
    """
    level = kernel_level(precision)
    return "avx512" if level == "avx512_fp16" else level


def vector_level() -> str:
    """The strongest kernels without products, such as an optimiser's steps; raises ConfigError like `cpu_features`."""
    features = cpu_features()
    return next((level for level in ("avx512", "avx2") if level in features), "scalar")


def fast_precision() -> Precision:
    """The faster of fp32 and bf16 to train in: the latter where the processor has instructions for it and
    `XCEPTION_MAX_ISA` allows them.

    Raises ConfigError like `cpu_features`.
    """
    return "bf16" if "avx512_bf16" in cpu_features() else "fp32"


def new_crews(threads: int) -> Crews:
    """Threads, and the memory that they run in, for networks that share them; raises like `new_network`."""
    if _native is None:
        raise ConfigError(f"the backend 'native' cannot be used: {_why_not_native}")
    crews: Crews = _native.Crews(threads)
    return crews


def new_network(
    precision: NetworkPrecision, channels: int, threads: int, *, latency: bool = False, crews: Crews | None = None
) -> Network:
    """An empty network of the compiled executor, for the strongest kernels; see `_native.pyi`.

    One of "int8" holds bf16, and multiplies bytes in those layers that are given `steps`. `crews` of as many threads
    are shared with other networks.

    Raises ConfigError where the extension is missing, and like `cpu_features`.
    """
    if _native is None:
        raise ConfigError(f"the backend 'native' cannot be used: {_why_not_native}")
    held = "bf16" if precision == "int8" else precision
    crews = new_crews(threads) if crews is None else crews
    network: Network = _native.Network(kernel_level(precision), held, channels, crews, latency=latency)
    return network


def new_unit_trainer(
    level: str, precision: Precision, threads: int, openmp: tuple[int, int, int] = (0, 0, 0)
) -> UnitTrainer:
    """What trains separable units with these kernels; see `_native.pyi`.

    `openmp` are the addresses of an OpenMP runtime's entry points, whose threads it shall share; see `ops.openmp`.

    Raises ConfigError where the extension is missing.
    """
    if _native is None:
        raise ConfigError(f"the backend 'native' cannot be used: {_why_not_native}")
    trainer: UnitTrainer = _native.UnitTrainer(level, precision, threads, openmp)
    return trainer


def new_optimiser(threads: int) -> Optimiser:
    """The compiled steps of optimisers, on so many threads, for the strongest level; see `_native.pyi`.

    Raises ConfigError like `new_network`.
    """
    if _native is None:
        raise ConfigError(f"the backend 'native' cannot be used: {_why_not_native}")
    optimiser: Optimiser = _native.Optimiser(vector_level(), threads)
    return optimiser


def describe() -> str:
    """One line for people, such as "native: avx2, avx512 (AMD EPYC)". Raises ConfigError like `cpu_features`."""
    features = cpu_features()
    if _native is None:
        return f"plain PyTorch: {_why_not_native}"
    cap = os.environ.get(CAP_VARIABLE)
    machine = f"{cpu_name()}; {CAP_VARIABLE}={cap}" if cap else cpu_name()
    return f"native: {', '.join(features) or 'scalar'} ({machine})"


def _levels_up_to_cap() -> tuple[str, ...]:
    machine = _architecture().lower()
    if machine in ("x86_64", "amd64", "i386", "i686"):
        levels = _X86_LEVELS
    elif machine.startswith(("arm", "aarch64")):
        levels = _ARM_LEVELS
    else:
        levels = _OTHER_LEVELS
    cap = os.environ.get(CAP_VARIABLE)
    if not cap:
        return levels
    if cap not in levels:
        raise ConfigError(f"expected {CAP_VARIABLE} to be one of {', '.join(levels)} on {machine}, got {cap!r}")
    return levels[: levels.index(cap) + 1]


def _architecture() -> str:
    import platform  # not at the top: 6 ms that most commands can spare

    return platform.machine() or "unknown processor"
