"""What learns when, from what, and at which rate: the head alone for some epochs, then the whole network."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from xception.data.loader import Batch, Loader
from xception.training.features import FeatureLoader, Features, compute_features, obstacle
from xception.training.optimizers import PolyakAverage, rate_factor
from xception.training.prepare import Plan
from xception.training.progress import Reporter
from xception.training.recipe import Recipe
from xception.training.state import TrainingState
from xception.training.trainable import batch_norms
from xception.training.trouble import note_bad


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Epochs in which the same part of the network learns from the same kind of input.

    `network` reads what the loaders give, and `average` is its running average: the whole and images, or the head
    and the trunk's features.
    """

    epochs: int
    """The phase is over when so many epochs of the run are done."""
    head_only: bool
    network: nn.Module
    average: PolyakAverage
    loader: Loader | FeatureLoader
    val_loader: Loader | FeatureLoader | None

    @property
    def on_features(self) -> bool:
        """Whether the trunk is not run."""
        return isinstance(self.loader, FeatureLoader)

    @cached_property
    def norms(self) -> list[nn.modules.batchnorm._BatchNorm]:
        """Every batch normalisation in `network`."""
        return list(batch_norms(self.network))


def whole_phase(plan: Plan, state: TrainingState, loader: Loader, val_loader: Loader | None) -> Phase:
    """All that is left after the head's own epochs: the whole network learns from images."""
    return Phase(
        epochs=plan.recipe.epochs,
        head_only=False,
        network=state.compiled,
        average=state.average,
        loader=loader,
        val_loader=val_loader,
    )


def head_phase(
    plan: Plan,
    state: TrainingState,
    loader: Loader,
    val_loader: Loader | None,
    *,
    reporter: Reporter,
    check: Callable[[], None],
) -> Phase:
    """The head's own epochs: from features that are computed here and now, or else from images like the rest.

    `check` is called after each batch, and may raise.
    """
    on_images = replace(
        whole_phase(plan, state, loader, val_loader), epochs=plan.recipe.head_only_epochs, head_only=True
    )
    if not plan.recipe.cache_features:
        return on_images
    if (why := obstacle(plan, state.model)) is not None:
        reporter.say(f"the trunk's features cannot be kept and are computed anew in each epoch: {why}")
        return on_images

    def features(images: Loader, title: str) -> Features:
        reporter.begin(title, len(images), images=len(images.split))

        def done(batch: Batch) -> None:
            if images is not val_loader:
                note_bad(plan, state.progress, batch, reporter.say)
            reporter.advance(images.batch_size)
            check()

        # The average, which is always in eval mode: while the trunk is frozen, its trunk is the model's bit for bit.
        found = compute_features(state.averaged(), plan, images, done=done)
        reporter.end()
        return found

    began, parts = time.monotonic(), 1 if val_loader is None else 2
    with contextlib.closing(plan.evaluation_loader(plan.train)) as images:
        train = FeatureLoader(loader, features(images, f"features 1/{parts}"))
    val = None if val_loader is None else FeatureLoader(val_loader, features(val_loader, f"features 2/{parts}"))
    reporter.say(
        f"the trunk's features of all images, without augmentation, took {time.monotonic() - began:,.0f} s; "
        f"the head's own epochs ({on_images.epochs}) learn from them"
    )
    return replace(on_images, network=state.head, average=state.head_average, loader=train, val_loader=val)


def learning_rate(recipe: Recipe, phase: Phase, *, epoch: int, batches: int) -> float:
    """The rate of the step after `batches` batches of `epoch` (from 0).

    The head's own phase runs at a constant rate and the schedule begins after it, unless nothing comes after it.
    """
    before = recipe.head_only_epochs if recipe.head_only_epochs < recipe.epochs else 0
    if epoch < before:
        return recipe.optimizer.learning_rate
    per_epoch = len(phase.loader) * phase.loader.batch_size
    samples = (epoch - before) * per_epoch + batches * phase.loader.batch_size
    return recipe.optimizer.learning_rate * rate_factor(
        recipe.schedule, samples, samples_per_epoch=per_epoch, epochs=recipe.epochs - before
    )


def step_seed(recipe: Recipe, step: int) -> int:
    """Decides dropout in update number `step`."""
    return (recipe.seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63
