"""What a run changes, and a checkpoint holds: the weights, their average, what the optimiser has gathered."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xception.errors import ConfigError
from xception.training import checkpoint as checkpoints
from xception.training.checkpoint import Checkpoint, Progress
from xception.training.optimizers import PolyakAverage, build_optimizer, head_module
from xception.training.prepare import Plan
from xception.training.trainable import smallest_batch


class TrainingState:
    """The network of a run with all that decides its next update.

    `compiled` is `model`, through torch.compile where the recipe says so; `head` is a part of it, and `head_average`
    one of `average`: the same tensors, to be updated alone where the trunk does not change.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None] = lambda _: None) -> None:
        recipe = plan.recipe
        self.model = plan.build_model(say).to(plan.device)
        self.smallest_batch = smallest_batch(self.model, recipe)
        batch_size = min(recipe.batch_size, len(plan.train))
        if batch_size < self.smallest_batch:
            raise ConfigError(
                f"batch_size must be at least {self.smallest_batch} for {plan.model}, whose batch normalisation "
                f"cannot learn from a single image; got {batch_size}"
            )
        if recipe.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.head = head_module(self.model)
        average = copy.deepcopy(self.model)
        self.average = PolyakAverage(self.model, average, recipe.polyak_decay)
        self.head_average = PolyakAverage(self.head, head_module(average), recipe.polyak_decay)
        self.compiled: nn.Module = torch.compile(self.model) if recipe.compile else self.model  # type: ignore[assignment]
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.precision == "fp16")
        self.progress = Progress()

    def averaged(self) -> nn.Module:
        """The network with the weights that are evaluated and kept."""
        return averaged(self.average)

    def broken(self) -> str | None:
        """The name of a tensor that is no longer finite, after which nothing could follow."""
        return checkpoints.not_finite(checkpoints.run_state(self.model, self.average, self.optimizer))

    def save(self, folder: Path, *, run: dict[str, Any], metrics: bytes) -> Path:
        """Write a checkpoint (`checkpoint.save_checkpoint`)."""
        return checkpoints.save_checkpoint(
            folder,
            model=self.model,
            average=self.average,
            optimizer=self.optimizer,
            scaler=self.scaler,
            progress=self.progress,
            run=run,
            metrics=metrics,
        )

    def restore(self, found: Checkpoint) -> None:
        """Become what `found` holds."""
        checkpoints.restore(found, model=self.model, average=self.average, optimizer=self.optimizer, scaler=self.scaler)
        self.progress = found.progress


def averaged(average: PolyakAverage) -> nn.Module:
    """What `average` holds now: without a decay, the weights themselves."""
    if not average.decay:
        average.copy()
    return average.average
