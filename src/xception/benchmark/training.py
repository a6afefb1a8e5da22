"""The benchmark of training: the same steps in every system, checked to agree, then timed in rounds like inference.

What a step is stands in `steps`. A step costs about three times the multiply-adds of a forward pass: those of the
activations' gradients and of the weights' come on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from xception.benchmark import inference
from xception.benchmark.case import TRAINING_BOUNDS, Mode, Precision, System
from xception.benchmark.systems import TRAINING_SYSTEMS

if TYPE_CHECKING:
    from xception.benchmark.networks import Work


@dataclass(frozen=True, kw_only=True)
class Settings(inference.Settings):
    """What to measure, as in inference; a visit is one step that is not counted and at least one that is.

    Raises `ConfigError` like the other.
    """

    batch: int = 16
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    modes: tuple[Mode, ...] = ("training",)
    systems: tuple[str, ...] = tuple(TRAINING_SYSTEMS)

    known_systems: ClassVar[Mapping[str, System]] = TRAINING_SYSTEMS
    known_precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "bf16")
    known_modes: ClassVar[tuple[Mode, ...]] = ("training",)


@dataclass(kw_only=True)
class Run(inference.Run):
    """A benchmark in progress, as in inference."""

    bounds: ClassVar[Mapping[Precision, float]] = TRAINING_BOUNDS
    compared: ClassVar[str] = "loss or gradient"

    def write(self, work: Work, folder: Path, files: set[str]) -> None:
        from xception.benchmark.steps import write_steps

        super().write(work, folder, files)
        write_steps(folder, work.batch, work.size)

    def operations(self, work: Work) -> float:
        return 3 * super().operations(work)
