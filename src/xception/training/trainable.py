"""Which parameters of a network learn, and how the statistics of its batch normalisation move."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from xception.training.optimizers import head_module
from xception.training.recipe import Recipe


def set_trainable(model: nn.Module, recipe: Recipe, *, head_only: bool) -> None:
    """Training mode for what learns; the statistics of a trunk that is frozen, or kept, stay as they are."""
    model.train()
    head = set(head_module(model).modules())
    model.requires_grad_(not head_only)
    head_module(model).requires_grad_(True)
    if head_only or recipe.norm_statistics == "frozen":
        for module in batch_norms(model):
            if module not in head:
                module.eval()


def batch_norms(model: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    """Every batch normalisation in `model`."""
    return (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def smallest_batch(model: nn.Module, recipe: Recipe) -> int:
    """Images that a step needs: batch normalisation that learns can say nothing about a single one."""
    head = set(head_module(model).modules())
    return 2 if any(recipe.norm_statistics == "update" or m in head for m in batch_norms(model)) else 1


def norm_share(recipe: Recipe, step: int, *, trained: bool) -> float:
    """The share of batch number `step` (from 0) in the running statistics of batch norm.

    The statistics start at mean 0 and variance 1, which says nothing: the first batches are averaged evenly
    (shares 1, 1/2, 1/3, ...), so that nothing of that start is left. In a short run it would still outweigh
    the true variances many times over. Statistics of a `trained` network are a better start, and are kept.
    """
    return recipe.norm_momentum if trained else max(recipe.norm_momentum, 1 / (step + 1))
