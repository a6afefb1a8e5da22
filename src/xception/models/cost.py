"""What a network costs, stage by stage, measured by running its shape without its numbers.

Multiply-adds are those of convolutions and linear layers, the paper's unit (half of a "FLOP" count);
normalisation, activations, pooling and the products inside attention are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_DRAWS = frozenset({"normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_"})


@dataclass(frozen=True)
class StageCost:
    """One stage of a network, for one image.

    `name` is the module's; `output_shape` is N C H W or N K with N = 1, and None for a stage that a plain
    forward pass does not run, such as an auxiliary tower; `parameters` are trainable elements.
    """

    name: str
    output_shape: tuple[int, ...] | None
    parameters: int
    multiply_adds: int


def without_storage(build: Callable[[], nn.Module]) -> nn.Module:
    """The network that `build` makes, on PyTorch's meta device: names and shapes, no memory, no random draws."""
    try:
        with torch.device("meta"), _WithoutDraws():
            return build()
    except NotImplementedError:  # some library networks read tensors' values while they are built
        return build().to("meta")


def count_parameters(model: nn.Module) -> int:
    """Trainable elements, each shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_statistics(model: nn.Module) -> int:
    """Elements of batch normalisation's running means and variances."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return sum(
        statistic.numel()
        for norm in norms
        for statistic in (norm.running_mean, norm.running_var)
        if statistic is not None
    )


def stage_costs(model: nn.Module, shape: tuple[int, int, int, int]) -> list[StageCost]:
    """The costs of `model`'s stages for an input of `shape`, N C H W; their sums are the network's.

    A stage is an outermost module that is called and is more than a sequence. Stages without parameters and
    multiply-adds are listed where they change the shape. `model` must be on the meta device, and is left in
    evaluation mode.
    """
    run = _Run(model, shape)
    stages: list[StageCost] = []
    seen: set[nn.Parameter] = set()
    for name, module in run.stages():
        parameters = 0
        for parameter in module.parameters():
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                parameters += parameter.numel()
        multiply_adds = run.multiply_adds[name]
        if parameters or multiply_adds or name in run.reshaping:
            stages.append(StageCost(name, run.shapes.get(name), parameters, multiply_adds))
    return stages


class _Run:
    """One forward pass on the meta device, watched: which modules were called, what they gave and cost."""

    def __init__(self, model: nn.Module, shape: tuple[int, int, int, int]) -> None:
        self.model = model
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the outermost modules' outputs
        self.reshaping: set[str] = set()  # those whose output has another shape than their input
        self.multiply_adds: Counter[str] = Counter()
        self._stack: list[str] = []
        hooks = []
        for name, module in model.named_modules():
            if name and not isinstance(module, nn.Sequential):
                hooks.append(module.register_forward_pre_hook(self._enter(name)))
                hooks.append(module.register_forward_hook(self._leave(name)))
        try:
            # With gradients on, attention takes its plain path, whose parts can be counted.
            with torch.enable_grad(), _MultiplyAdds(self._count):
                model.eval()(torch.empty(shape, device="meta"))
        finally:
            for hook in hooks:
                hook.remove()

    def stages(self) -> list[tuple[str, nn.Module]]:
        """The outermost modules that were called, and whole parts that were not called at all, in order."""
        return list(self._outermost("", self.model))

    def _outermost(self, name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        if name in self.shapes:
            return [(name, module)]
        prefix = f"{name}." if name else ""
        if name and not any(called.startswith(prefix) for called in self.shapes):
            return [(name, module)]
        return [
            stage
            for child_name, child in module.named_children()
            for stage in self._outermost(prefix + child_name, child)
        ]

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._stack.append(name)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            assert self._stack.pop() == name
            if not self._stack and isinstance(output, Tensor):
                self.shapes[name] = tuple(output.shape)
                if inputs and isinstance(inputs[0], Tensor) and inputs[0].shape != output.shape:
                    self.reshaping.add(name)

        return hook

    def _count(self, multiply_adds: int) -> None:
        self.multiply_adds[self._stack[0] if self._stack else ""] += multiply_adds


class _MultiplyAdds(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reports the multiply-adds of each convolution and of each linear layer's matrix product."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.report = report

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is torch.ops.aten.convolution.default:
            weight = args[1]  # C' C/groups k k
            self.report(output.numel() * weight[0].numel())
        elif func is torch.ops.aten.addmm.default:
            self.report(args[1].numel() * args[2].shape[1])
        elif func is torch.ops.aten.mm.default:
            self.report(args[0].numel() * args[1].shape[1])
        return output


class _WithoutDraws(TorchFunctionMode):
    """Skips the random fillings of new tensors: without storage there is nothing to fill, and it takes seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
