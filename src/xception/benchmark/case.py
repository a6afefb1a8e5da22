"""What is measured: one variant of one system on one network, and the agreement that its outputs must reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

Precision = Literal["fp32", "bf16", "fp16", "int8"]
Mode = Literal["throughput", "latency", "training"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8")
MODES: tuple[Mode, ...] = ("throughput", "latency")
"""Those of inference."""

# The largest relative error of the logits, |found - expected| / |expected| in the Euclidean norm over a batch, against
# PyTorch in fp32. Wide enough for every honest engine on weights drawn at random (bf16 seen: 0.03 for Xception, 0.13
# for Inception V3), too narrow for a wrong network, whose error is above 1.
ERROR_BOUNDS: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.25, "fp16": 0.05, "int8": 0.5}


# The same for the loss and the gradient's norm of a first step, and the loss of the second, each by itself.
TRAINING_BOUNDS: dict[Precision, float] = {"fp32": 5e-3, "bf16": 0.1}

Part = Literal["data", "forward", "backward", "optimiser"]
PARTS: tuple[Part, ...] = ("data", "forward", "backward", "optimiser")
"""Of a training step, in their order."""


class Unsupported(Exception):
    """This machine, or the installed release, cannot run a variant: it is left out, and no failure."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One variant of one system on one network: `batch` images of `size` pixels a side, on `threads` threads."""

    system: str
    variant: str
    precision: Precision
    mode: Mode
    model: str
    batch: int
    size: int
    threads: int

    def __str__(self) -> str:
        return f"{self.system} {self.variant}, {self.precision}, {self.mode}, {self.model}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A network that is ready: `call` runs it on `images` images, `logits` turns what a call returns into N x classes.

    Inputs are converted to the system's own layout and type before, so that `call` is the inference alone. `rate`
    measures images a second in about so many seconds, where the mean or median over calls is not what is wanted.

    In training a call makes the first two steps from the network's weights, and `logits` is their losses and norm
    (`steps.first_steps`); `rate` makes more of them. `shares` tells how the time of the last `rate` was divided.
    """

    call: Callable[[], Any]
    logits: Callable[[Any], NDArray[Any]] | None
    images: float
    rate: Callable[[float], float] | None = None
    shares: Callable[[], Mapping[Part, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run a system, and the packages and files that it needs besides the system's own."""

    name: str
    precision: Precision
    modes: tuple[Mode, ...] = MODES
    needs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class System:
    """A system to measure.

    needs: packages to import; they are not part of the memory that is reported.
    exports: packages that writing its file needs.
    files: what it reads of a network's folder (`networks` has their names).
    environment: variables that must be set before its packages are imported.
    load: from a case, the network's folder and images N C H W to the network, ready to run.
    """

    name: str
    needs: tuple[str, ...]
    exports: tuple[str, ...] = ()
    files: tuple[str, ...]
    variants: tuple[Variant, ...]
    load: Callable[[Case, Path, NDArray[Any]], Loaded]
    environment: Callable[[Case], dict[str, str]] = field(default=lambda case: {})
