"""The update of weights and of their running average: PyTorch's own, or all of it in one pass of compiled code.

PyTorch's optimiser, with its state, stays what it is either way, so that a run may change from one path to the other
and checkpoints know neither. SGD and the average agree bit for bit where PyTorch's kernels have fused multiply-adds
(AVX2 and up); RMSprop and AdamW to units in the last place, since PyTorch's square root is not correctly rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from xception.ops.backend import active_backend, say_once
from xception.ops.steps import Arrays, Rows, Unsuitable
from xception.training.optimizers import PolyakAverage, RMSpropTF


@torch.no_grad()
def update(
    optimizer: Optimizer, average: PolyakAverage | None = None, number: int = 0, *, gradient_scale: float = 1.0
) -> None:
    """One update of every parameter that has a gradient, and then of `average`, number `number` (from 0).

    Gradients count `gradient_scale` times. Where the backend is native and the optimiser is one of `build_optimizer`
    on float32 weights in the CPU's memory, the compiled path is taken, which leaves the gradients as they are; else
    PyTorch's, and where the backend would have allowed the other, the log says once why it could not be taken.
    """
    if active_backend() == "native":
        try:
            _Compiled(optimizer, average, number, gradient_scale)()
            return
        except Unsuitable as why:
            say_once(f"the optimiser's steps run on plain PyTorch: {why}")
    if gradient_scale != 1.0:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, gradient_scale)
    optimizer.step()
    if average is not None:
        average.update(number)


class _Step(NamedTuple):
    rows: Rows
    coefficients: dict[str, Any]


class _Compiled:
    """An update, prepared: the constructor raises `Unsuitable` before anything was changed."""

    def __init__(self, optimizer: Optimizer, average: PolyakAverage | None, number: int, gradient_scale: float) -> None:
        self._after: list[Callable[[], None]] = []
        self._averaged: dict[Tensor, Tensor] = {} if average is None else average.of_parameters
        share = 0.0 if average is None else average.share(number)
        prepare = _RULES.get(type(optimizer))
        if prepare is None:
            raise Unsuitable(f"there are no compiled steps of {type(optimizer).__name__}")
        if _has_hooks(optimizer):
            raise Unsuitable("there are hooks around the optimiser's step")
        self._steps: list[_Step] = []
        taken: set[Tensor] = set()
        for group in optimizer.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            if not learning:
                continue
            for arrays, coefficients in prepare(self, optimizer, group, learning):
                coefficients |= {"scale": gradient_scale, "share": share}
                self._steps.append(_Step(Rows(arrays), coefficients))
            taken.update(self._averaged[p] for p in learning if p in self._averaged)
        if average is not None:
            rest = [Arrays(weight=w, average=a) for a, w in average.floating if a not in taken]
            self._steps.append(_Step(Rows(rest), {"rule": "average", "share": share}))
            self._after.append(average.copy_counts)

    def __call__(self) -> None:
        for step in self._steps:
            step.rows.step(**step.coefficients)
        for do in self._after:
            do()

    # ---- the rules: for each set of parameters that share them, the arrays and the coefficients ---------------------

    def sgd(self, optimizer: Optimizer, group: dict[str, Any], learning: list[Tensor]) -> Iterator[_Prepared]:
        _require_plain(group, "maximize", "differentiable", "fused", "foreach", "dampening")
        momentum, decay = group["momentum"], group["weight_decay"]
        coefficients = {
            "rule": "sgd",
            "momentum": momentum != 0,
            "nesterov": group["nesterov"],
            "decays": decay != 0,
            "rate": _number(group["lr"]),
            "decay": _number(decay),
            "first": momentum,
        }
        if not momentum:
            yield [self._arrays(p) for p in learning], coefficients
            return
        buffers = {p: optimizer.state.get(p, {}).get("momentum_buffer") for p in learning}
        old = [self._arrays(p, first=buffer) for p, buffer in buffers.items() if buffer is not None]
        new = {p: torch.empty_like(p) for p, buffer in buffers.items() if buffer is None}
        yield old, dict(coefficients)
        yield [self._arrays(p, first=buffer) for p, buffer in new.items()], coefficients | {"begins": True}

        def keep() -> None:
            for p, buffer in new.items():
                optimizer.state[p]["momentum_buffer"] = buffer

        self._after.append(keep)

    def rmsprop(self, optimizer: Optimizer, group: dict[str, Any], learning: list[Tensor]) -> Iterator[_Prepared]:
        assert isinstance(optimizer, RMSpropTF)
        optimizer.begin(learning)
        states = [optimizer.state[p] for p in learning]
        arrays = [
            self._arrays(p, first=s["momentum"], second=s["square"]) for p, s in zip(learning, states, strict=True)
        ]
        yield (
            arrays,
            {
                "rule": "rmsprop",
                "decays": group["weight_decay"] != 0,
                "rate": _number(group["lr"]),
                "decay": _number(group["weight_decay"]),
                "first": group["momentum"],
                "second": group["rho"],
                "rest": 1 - group["rho"],
                "epsilon": group["epsilon"],
            },
        )

    def adamw(self, optimizer: Optimizer, group: dict[str, Any], learning: list[Tensor]) -> Iterator[_Prepared]:
        _require_plain(group, "maximize", "differentiable", "fused", "foreach", "amsgrad", "capturable")
        rate, decay = _number(group["lr"]), _number(group["weight_decay"])
        beta1, beta2 = map(_number, group["betas"])
        by_step: dict[float, list[Arrays]] = {}
        for p in learning:
            state = optimizer.state[p]
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            arrays = self._arrays(p, first=state["exp_avg"], second=state["exp_avg_sq"])
            by_step.setdefault(float(state["step"]) + 1, []).append(arrays)
        self._after.append(lambda: torch._foreach_add_([optimizer.state[p]["step"] for p in learning], 1))
        for step, together in by_step.items():
            yield (
                together,
                {
                    "rule": "adamw",
                    "decays": decay != 0,
                    "rate": rate / (1 - beta1**step),
                    "decay": 1 - rate * decay,
                    "first": 1 - beta1,
                    "second": beta2,
                    "rest": 1 - beta2,
                    "epsilon": group["eps"],
                    "correction": (1 - beta2**step) ** 0.5,
                },
            )

    def _arrays(self, p: Tensor, **gathered: Tensor) -> Arrays:
        return Arrays(weight=p, gradient=p.grad, average=self._averaged.get(p), **gathered)


_Prepared = tuple[list[Arrays], dict[str, Any]]
_RULES: dict[type, Callable[[_Compiled, Optimizer, dict[str, Any], list[Tensor]], Iterator[_Prepared]]] = {
    torch.optim.SGD: _Compiled.sgd,
    torch.optim.AdamW: _Compiled.adamw,
    RMSpropTF: _Compiled.rmsprop,
}


def _has_hooks(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


def _require_plain(group: dict[str, Any], *options: str) -> None:
    """`Unsuitable` where an option is set that the compiled steps do not have."""
    for option in options:
        if group.get(option):
            raise Unsuitable(f"its option {option} is set")


def _number(value: Any) -> float:
    if isinstance(value, Tensor):
        raise Unsuitable("a tensor as one of its numbers")
    return float(value)
