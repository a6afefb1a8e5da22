"""One training step, as a function of its arguments: no clock, no globals, no random state of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from xception.data.loader import Batch
from xception.ops.backend import active_backend, training_level, use_backend
from xception.training.losses import balanced_weights, classification_loss
from xception.training.optimizers import PolyakAverage
from xception.training.prepare import Plan
from xception.training.recipe import Recipe
from xception.training.update import update

StepPart = Literal["forward", "backward", "optimiser"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What stays the same from step to step."""

    multi_label: bool
    label_smoothing: float
    class_weights: Tensor | None
    auxiliary_weight: float
    clip_norm: float
    precision: str
    device: torch.device
    channels_last: bool


def step_config(plan: Plan) -> StepConfig:
    """The steps of the run `plan`."""
    recipe = plan.recipe
    weights = None
    if recipe.loss.class_weights == "balanced":
        counts = [0] * len(plan.class_names)
        for target in plan.train.targets:
            for label in (target,) if isinstance(target, int) else target:
                counts[label] += 1
        weights = balanced_weights(counts).to(plan.device)
    return StepConfig(
        multi_label=plan.multi_label,
        label_smoothing=recipe.loss.label_smoothing,
        class_weights=weights,
        auxiliary_weight=recipe.loss.auxiliary_weight,
        clip_norm=recipe.optimizer.clip_norm,
        precision=plan.precision,
        device=plan.device,
        channels_last=recipe.channels_last,
    )


@dataclass(frozen=True)
class StepResult:
    """`loss` is the sum over `count` images; `applied` is False where the update was left out as non-finite.

    `correct` counts images whose most likely class is (one of) their label(s).
    """

    loss: float
    correct: int
    count: int
    gradient_norm: float
    applied: bool


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The arithmetic of forward passes; weights, sums and the loss stay fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


def computing(recipe: Recipe) -> AbstractContextManager[None]:
    """While steps of `recipe` are made: its backend, or, with `auto`, whatever was chosen outside.

    Raises `ConfigError` where it demands the compiled extension and there is none.
    """
    return nullcontext() if recipe.backend == "auto" else use_backend(recipe.backend)


def engine(plan: Plan) -> str:
    """What computes the steps of a run where separable units allow a choice, for people: "native, avx512"."""
    if plan.device.type != "cpu":
        return f"torch on {plan.device}"
    with computing(plan.recipe):
        if active_backend() == "reference" or plan.recipe.compile:
            return "torch"
        if plan.precision == "fp16":
            return "torch (the compiled extension trains in fp32 and bf16)"
        return f"native, {training_level(plan.precision)}"


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Sequence[Batch],
    *,
    seed: int,
    config: StepConfig,
    average: PolyakAverage | None = None,
    number: int = 0,
    done: Callable[[StepPart], None] = lambda part: None,
) -> StepResult:
    """One update from the mean gradient over all images of `batches`, after which `average` takes in the weights.

    It is update number `number` (from 0). `seed` decides dropout, so that a step can be repeated. Where the loss or
    the gradient is not finite, weights, optimiser, batch norm statistics and average are left exactly as they were,
    and `applied` is False. `done` is told each part of the step that is done.
    """
    count = sum(len(b.images) for b in batches)
    if count == 0:
        if average is not None:
            average.update(number)
        return StepResult(0.0, 0, 0, 0.0, True)
    torch.manual_seed(seed)
    statistics = [(b, b.clone()) for b in model.buffers()]
    optimizer.zero_grad(set_to_none=True)
    loss_sum, correct = 0.0, 0
    for batch in batches:
        if len(batch.images) == 0:
            continue
        loss, batch_correct = _forward(model, batch, config)
        done("forward")
        loss_sum += float(loss.detach())
        correct += batch_correct
        scaler.scale(loss / count).backward()  # type: ignore[no-untyped-call]
        done("backward")
    scaler.unscale_(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    finite = all(map(_is_finite, (loss_sum, norm)))
    if finite:
        clips = config.clip_norm > 0 and norm > config.clip_norm
        # Not by `scaler.step`, which would look for what is not finite once more.
        update(optimizer, average, number, gradient_scale=config.clip_norm / norm if clips else 1.0)
    else:
        with torch.no_grad():
            for buffer, before in statistics:
                buffer.copy_(before)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    done("optimiser")
    return StepResult(loss_sum, correct, count, norm, finite)


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _forward(model: nn.Module, batch: Batch, config: StepConfig) -> tuple[Tensor, int]:
    images = batch.images.to(config.device, non_blocking=True)
    targets = batch.targets.to(config.device, non_blocking=True)
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    auxiliary: list[Tensor] = []
    with autocast(config.precision, config.device):
        if config.auxiliary_weight and has_towers(model):
            logits, auxiliary = model.forward_with_auxiliary(images)  # type: ignore[operator]
        else:
            logits = model(images)

    def loss_of(out: Tensor) -> Tensor:
        return classification_loss(
            out,
            targets,
            multi_label=config.multi_label,
            label_smoothing=config.label_smoothing,
            class_weights=config.class_weights,
        )

    loss = loss_of(logits)
    for out in auxiliary:
        loss = loss + config.auxiliary_weight * loss_of(out)
    best = logits.detach().argmax(dim=1)
    labels = targets if targets.dim() == 1 else None
    hits = best == labels if labels is not None else targets.gather(1, best[:, None])[:, 0] >= 0.5
    return loss, int(hits.sum())


def has_towers(model: nn.Module) -> bool:
    """Whether `model` was built with auxiliary classifiers, which `forward_with_auxiliary` runs."""
    return bool(getattr(getattr(model, "config", None), "auxiliary", False))
