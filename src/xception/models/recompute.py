"""Gradient checkpointing: trade a second forward pass for the memory of the activations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, whose activations are computed again in the backward pass instead of being kept.

    Gradients are the same, and batch normalisation's running statistics are updated once, by the first pass.
    Without gradients it is the plain call.
    """
    if not torch.is_grad_enabled():
        y: Tensor = module(x)
        return y
    if torch.compiler.is_compiling():  # the compiler recomputes operations, not module calls: nothing runs twice
        z: Tensor = checkpoint(module, x, use_reentrant=False)
        return z

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), scratch_buffers(module)

    out: Tensor = checkpoint(module, x, use_reentrant=False, context_fn=contexts)
    return out


@contextmanager
def scratch_buffers(module: nn.Module) -> Iterator[None]:
    """Let `module` work on copies of its buffers, which are dropped at the end.

    The recomputation must see the very tensors of the first pass (the same number of them is saved), and must
    not update the running statistics again.
    """
    kept = [(part, dict(part._buffers)) for part in module.modules() if part._buffers]
    try:
        for part, buffers in kept:
            part._buffers.update({k: None if v is None else v.clone() for k, v in buffers.items()})
        yield
    finally:
        for part, buffers in kept:
            part._buffers.update(buffers)


class Flow(nn.Sequential):
    """Modules one after the other, `passes` times over; `checkpointing` recomputes each in backward."""

    def __init__(self, modules: dict[str, nn.Module], *, checkpointing: bool = False, passes: int = 1) -> None:
        super().__init__(OrderedDict(modules))
        self.checkpointing = checkpointing
        self.passes = passes

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.passes):
            for module in self:
                x = recomputed(module, x) if self.checkpointing else module(x)
        return x
