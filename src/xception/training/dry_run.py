"""What a run would be and cost: the resolved recipe, the model, and the memory and time to expect."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xception.data.loader import Batch
from xception.models import registry
from xception.training.features import obstacle
from xception.training.memory import forget_peak, peak_bytes
from xception.training.optimizers import build_optimizer
from xception.training.prepare import Plan
from xception.training.recipe import flat_values
from xception.training.step import computing, has_towers, step_config, train_step
from xception.training.trainable import set_trainable

_TRIAL_SECONDS = 20.0
# What an image more in the batch takes, as a multiple of its activations: a few of their gradients and the kernels'
# working memory come on top. Measured on a CPU: Xception 1.4, the small one and Inception v3 1.5.
_WORKING_SHARE = 1.45
# What an image takes that only goes forward, as a share of a step on it.
_FORWARD_SHARE = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """Memory in bytes (of the whole process, or of the GPU; `activation_bytes` of it for one batch), seconds."""

    parameters: int
    memory_bytes: int
    activation_bytes: int
    images_per_second: float
    seconds: float


def expect(plan: Plan) -> Expectation:
    """Measure a few steps on random images, and extrapolate their memory and time to the whole run.

    The activations are counted: every tensor that autograd keeps in a forward pass on the meta device. The time
    is that of the steps alone; reading the images comes on top where it cannot keep up.
    """
    recipe = plan.recipe
    model = plan.build_model()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch_size = min(recipe.batch_size, len(plan.train))
    activations = _activation_bytes(plan, batch_size)
    with computing(recipe):
        rate, tried, memory = _measure(plan, model, batch_size)
    memory += int(_WORKING_SHARE * activations * (batch_size - tried) / batch_size)
    memory += sum(p.numel() * p.element_size() for p in model.parameters())  # the Polyak average
    return Expectation(
        parameters=parameters,
        memory_bytes=memory,
        activation_bytes=activations,
        images_per_second=rate,
        seconds=passes(plan, model, batch_size) / rate,
    )


def passes(plan: Plan, model: nn.Module, batch_size: int) -> float:
    """Images that go through the network in the whole run, in units of what `_measure` measures.

    Forward passes alone count for less, and the head's own epochs, once it has the trunk's features, for nothing.
    """
    recipe = plan.recipe
    head = recipe.head_only_epochs
    train, val = len(plan.train) // batch_size * batch_size, 0 if plan.val is None else len(plan.val)
    forward = 1.0 if head == recipe.epochs else _FORWARD_SHARE
    passes_of_head = 1 if head and recipe.cache_features and obstacle(plan, model) is None else head
    return (passes_of_head * (train + val) + (recipe.epochs - head) * val) * forward + (recipe.epochs - head) * train


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

    set_trainable(model, plan.recipe, head_only=plan.recipe.head_only_epochs == plan.recipe.epochs)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if plan.recipe.loss.auxiliary_weight and has_towers(model):
            model.forward_with_auxiliary(images)  # type: ignore[operator]
        else:
            model(images)
    share = 1 if plan.precision == "fp32" else 2
    return sum(t.untyped_storage().nbytes() for t in kept.values()) // share


def _measure(plan: Plan, model: nn.Module, batch_size: int) -> tuple[float, int, int]:
    """Images per second, images a step, and peak memory of real steps on as many images as let one end soon."""
    recipe = plan.recipe
    model = model.to(plan.device)
    set_trainable(model, recipe, head_only=recipe.head_only_epochs == recipe.epochs)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, recipe.optimizer)
    scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.precision == "fp16")
    config = step_config(plan)
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
    forget_peak(plan.device)
    times = [seconds(n)]
    while len(times) < 4 and sum(times) < _TRIAL_SECONDS:
        times.append(seconds(n))
    return n / min(times), n, peak_bytes(plan.device)
