"""What a run would be and cost: the resolved recipe, the model, and the memory and time to expect."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xception.data.loader import Batch
from xception.models import registry
from xception.training.optimizers import build_optimizer
from xception.training.prepare import Plan
from xception.training.recipe import flat_values
from xception.training.step import StepConfig, train_step

# Update rules keep this many tensors of the weights' size.
_STATE_TENSORS = {"sgd": 1, "rmsprop": 2, "adamw": 2}
_TRIAL_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """Memory in bytes (weights, gradients, optimiser, average, activations of one batch) and time in seconds."""

    parameters: int
    memory_bytes: int
    activation_bytes: int
    images_per_second: float
    seconds: float


def expect(plan: Plan) -> Expectation:
    """Measure a few steps on random images, and add up what the run will hold.

    The activations are counted, not guessed: every tensor that autograd keeps in a forward pass on the meta
    device. The time is that of the steps alone; reading the images comes on top where it cannot keep up.
    """
    recipe = plan.recipe
    model = plan.build_model()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    batch_size = min(recipe.batch_size, len(plan.train))
    activations = _activation_bytes(plan, batch_size)
    trained = _STATE_TENSORS[recipe.optimizer.optimizer]
    memory = weights * (2 + trained + 1) + activations
    rate = _images_per_second(plan, model, batch_size)
    steps_images = recipe.epochs * (len(plan.train) // batch_size) * batch_size
    evaluated = recipe.epochs * (0 if plan.val is None else len(plan.val)) / 3  # no backward pass
    return Expectation(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        memory_bytes=memory,
        activation_bytes=activations,
        images_per_second=rate,
        seconds=(steps_images + evaluated) / rate,
    )


def describe(plan: Plan, expectation: Expectation) -> dict[str, Any]:
    """Everything a dry run tells, JSON-safe: `recipe` maps each field to its value and where it comes from."""
    stated = set(plan.recipe.stated)
    known = plan.recipe.name in ("imagenet", "jft")
    return {
        "recipe": plan.recipe.name,
        "fields": {
            name: {
                "value": value,
                "source": ("paper" if name in stated else "our choice") if known else "recipe",
            }
            for name, value in flat_values(plan.recipe).items()
        },
        "model": plan.model,
        "config": registry.config_to_dict(plan.config),
        "preprocess": plan.preprocess.to_dict(),
        "data": plan.source.spec,
        "classes": len(plan.class_names),
        "images": {part: len(split) for part, split in plan.source.splits.items()},
        "parameters": expectation.parameters,
        "memory_bytes": expectation.memory_bytes,
        "activation_bytes": expectation.activation_bytes,
        "images_per_second": round(expectation.images_per_second, 2),
        "seconds": round(expectation.seconds, 1),
    }


def _activation_bytes(plan: Plan, batch_size: int) -> int:
    with torch.device("meta"):
        model = registry.build(plan.model, plan.config)
        images = torch.empty(batch_size, plan.preprocess.channels, *plan.preprocess.size)
    own = {id(p) for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(images)
    share = 1 if plan.recipe.precision == "fp32" else 2
    return sum(t.untyped_storage().nbytes() for t in kept.values()) // share


def _images_per_second(plan: Plan, model: nn.Module, batch_size: int) -> float:
    """Of real steps, on as many images as let a first step end soon."""
    recipe = plan.recipe
    model = model.to(plan.device).train()
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, recipe.optimizer)
    scaler = torch.amp.GradScaler(plan.device.type, enabled=recipe.precision == "fp16")
    config = StepConfig(
        multi_label=plan.multi_label,
        label_smoothing=0.0,
        class_weights=None,
        auxiliary_weight=recipe.loss.auxiliary_weight,
        clip_norm=0.0,
        precision=recipe.precision,
        device=plan.device,
        channels_last=recipe.channels_last,
    )
    classes = len(plan.class_names)

    def seconds(n: int) -> float:
        targets = torch.rand(n, classes).round() if plan.multi_label else torch.zeros(n, dtype=torch.int64)
        images = torch.rand(n, plan.preprocess.channels, *plan.preprocess.size)
        batch = Batch(images, targets, torch.arange(n), ())
        began = time.perf_counter()
        train_step(model, optimizer, scaler, [batch], seed=0, config=config)
        return time.perf_counter() - began

    n = min(2, batch_size)
    seconds(n)  # the first step also allocates and chooses kernels
    each = seconds(n) / n
    n = max(n, min(batch_size, int(_TRIAL_SECONDS / 4 / each)))
    times = [seconds(n)]
    while len(times) < 4 and sum(times) < _TRIAL_SECONDS:
        times.append(seconds(n))
    return n / min(times)
