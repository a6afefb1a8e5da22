"""Update rules, the learning rate over time, and the Polyak average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from xception.training.recipe import OptimizerConfig, ScheduleConfig


class RMSpropTF(Optimizer):
    """RMSprop as TensorFlow of 2016 had it (`tf.train.RMSPropOptimizer`), which the paper's JFT runs used.

    With gradient g, mean square s (starting at **1**) and momentum buffer m::

        s <- rho s + (1 - rho) g^2
        m <- momentum m + lr g / sqrt(s + epsilon)        (epsilon **inside** the root, lr **inside** the buffer)
        w <- w - m

    `torch.optim.RMSprop` differs in each of the three marked points.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        rho: float = 0.9,
        momentum: float = 0.9,
        epsilon: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "rho": rho,
            "momentum": momentum,
            "epsilon": epsilon,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def begin(self, params: Iterable[Tensor]) -> None:
        """Give those of `params` that have none the state to start from."""
        for p in params:
            if not self.state[p]:
                self.state[p]["square"] = torch.ones_like(p)
                self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            self.begin(params)
            grads = [p.grad for p in params]
            squares = [self.state[p]["square"] for p in params]
            momenta = [self.state[p]["momentum"] for p in params]
            if group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            torch._foreach_mul_(squares, group["rho"])
            torch._foreach_addcmul_(squares, grads, grads, value=1 - group["rho"])
            root = torch._foreach_add(squares, group["epsilon"])
            torch._foreach_sqrt_(root)
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_addcdiv_(momenta, grads, root, value=group["lr"])
            torch._foreach_sub_(params, momenta)
        return loss


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimiser over all of `model`'s parameters, in groups with and without decay, of trunk and head.

    Each group carries ``scale``: its learning rate as a share of the schedule's (`set_rate`). Biases and batch
    normalisation are never decayed. Parameters without a gradient (a frozen trunk) are left alone by each rule.
    """
    head = head_parameters(model)
    depthwise = {
        id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1 and m.groups == m.in_channels
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for p in model.parameters():
        decayed = p.dim() > 1 and (config.decay_depthwise or id(p) not in depthwise)
        groups.setdefault((decayed, id(p) in head), []).append(p)
    parameters = [
        {
            "params": params,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "scale": 1.0 if in_head else config.trunk_factor,
        }
        for (decayed, in_head), params in groups.items()
    ]
    lr = config.learning_rate
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=config.momentum, nesterov=config.nesterov)
    if config.optimizer == "rmsprop":
        rho, epsilon = _given(config.rho, 0.9), _given(config.epsilon, 1.0)
        return RMSpropTF(parameters, lr, rho=rho, momentum=config.momentum, epsilon=epsilon)
    beta2, epsilon = _given(config.rho, 0.999), _given(config.epsilon, 1e-8)
    return torch.optim.AdamW(parameters, lr, betas=(config.momentum, beta2), eps=epsilon)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def head_module(model: nn.Module) -> nn.Module:
    """The part that maps pooled features to logits: `classifier`, or what a comparison baseline calls it."""
    for name in ("classifier", "head", "fc", "last_linear"):
        part = getattr(model, name, None)
        if isinstance(part, nn.Module) and any(True for _ in part.parameters()):
            return part
    inner = getattr(model, "model", None)
    if isinstance(inner, nn.Module):
        return head_module(inner)
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def head_parameters(model: nn.Module) -> set[int]:
    """The ids of the head's parameters."""
    return {id(p) for p in head_module(model).parameters()}


def rate_factor(config: ScheduleConfig, samples: int, *, samples_per_epoch: int, epochs: float) -> float:
    """The learning rate after `samples` samples, as a share of the initial one: a pure function.

    Exponential: factor ^ floor(samples / interval) (no floor without `staircase`), the interval in samples or in
    epochs. Cosine: from 1 to `final_factor` over `epochs`. Warm-up multiplies by the share of it that is done,
    never by 0, so that the first step counts.
    """
    epoch = samples / samples_per_epoch
    if config.schedule == "exponential":
        interval = config.decay_samples or config.decay_epochs * samples_per_epoch
        steps = samples / interval
        factor = config.decay_factor ** (math.floor(steps) if config.staircase else steps)
    elif config.schedule == "cosine":
        done = min(1.0, epoch / epochs)
        factor = config.final_factor + (1 - config.final_factor) * 0.5 * (1 + math.cos(math.pi * done))
    else:
        factor = 1.0
    if epoch < config.warmup_epochs:
        factor *= max(epoch / config.warmup_epochs, 1e-3)
    return factor


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give each group its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


class PolyakAverage:
    """A running average of a model's weights and batch norm statistics: a <- a + (1 - d)(w - a).

    The decay is warmed up as TensorFlow's ``ExponentialMovingAverage(num_updates=t)`` does,
    d = min(decay, (1 + t) / (10 + t)), so that short runs are not dominated by the random start.
    `average` is a model of its own, which is evaluated and kept.
    """

    def __init__(self, model: nn.Module, average: nn.Module, decay: float) -> None:
        self.average = average.eval().requires_grad_(False)
        self.decay = decay
        averages, followed = average.state_dict(), model.state_dict()
        self._pairs = [(a, followed[name].detach()) for name, a in averages.items()]
        self.floating = [(a, w) for a, w in self._pairs if a.is_floating_point()]
        """The averages of weights and statistics, each with what it follows."""
        self.of_parameters: dict[Tensor, Tensor] = {p: averages[name] for name, p in model.named_parameters()}
        """Parameter -> its average, one of those in `floating`."""
        self.copy()

    @torch.no_grad()
    def copy(self) -> None:
        """Start (again) from the model's own weights."""
        for a, w in self._pairs:
            a.copy_(w)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update number `step` (from 0)."""
        torch._foreach_lerp_([a for a, _ in self.floating], [w for _, w in self.floating], self.share(step))
        self.copy_counts()

    def share(self, step: int) -> float:
        """What the weights count in update number `step`: 1 - d."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def copy_counts(self) -> None:
        """Take over what is no floating-point number and has no average: batch norm's counts."""
        for a, w in self._pairs:
            if not a.is_floating_point():
                a.copy_(w)
