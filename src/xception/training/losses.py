"""The loss of a batch, for one label an image (softmax) or several (sigmoid)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def classification_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    multi_label: bool,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The **sum** over the batch, as a scalar: batches of different sizes then add up to the mean of them all.

    `logits` is N K; `targets` int64 N, or float N K (several labels, or labels mixed by mixup and cutmix).
    One label: cross entropy with targets smoothed to (1 - s) y + s / K (Szegedy et al. 2016, section 7).
    Several: binary cross entropy summed over classes, targets smoothed to (1 - s) y + s / 2, divided by K so that
    its size does not grow with the number of classes. `class_weights` (K) multiply each class's term.
    """
    logits = logits.float()
    num_classes = logits.shape[1]
    if multi_label:
        smooth = targets.float() * (1 - label_smoothing) + label_smoothing / 2
        terms = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none")
        if class_weights is not None:
            terms = terms * class_weights
        return terms.sum() / num_classes
    if targets.dtype == torch.int64:
        # Weighted smoothing as torch has it would also weigh the smoothed part's classes; one-hot keeps one rule.
        if class_weights is None:
            return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
        targets = F.one_hot(targets, num_classes).float()
    smooth = targets * (1 - label_smoothing) + label_smoothing / num_classes
    if class_weights is not None:
        smooth = smooth * (targets @ class_weights)[:, None]
    return -(smooth * F.log_softmax(logits, dim=1)).sum()


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """Weights N / (K n_k), which make every class count the same; a class without images gets 0."""
    n = torch.tensor(counts, dtype=torch.float64)
    weights = torch.where(n > 0, n.sum() / (len(counts) * n.clamp(min=1)), torch.zeros_like(n))
    return weights.float()
