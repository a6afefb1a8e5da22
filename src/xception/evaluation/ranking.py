"""Figures that depend on the order of scores alone; equal scores are treated in a way that is stated and fixed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """The place of each sample's target among its scores: N K, N -> int64 N, 0 for the best.

    A target stands behind all strictly greater scores and behind equal scores of lower class index: exactly
    one class has each place, so a network that scores all classes alike is right for class 0 only.
    """
    own = scores.gather(1, targets.unsqueeze(1))
    classes = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > own) | ((scores == own) & (classes < targets.unsqueeze(1)))
    return ahead.sum(dim=1)


def best_classes(scores: Tensor) -> Tensor:
    """The class with the greatest score, the lowest index among equals: N K -> int64 N.

    `Tensor.argmax` leaves open which of several maxima it returns.
    """
    classes = torch.arange(scores.shape[1], device=scores.device)
    is_best = scores == scores.amax(dim=1, keepdim=True)
    return torch.where(is_best, classes, scores.shape[1]).amin(dim=1)


def area_under_curve(scores: NDArray[np.float64], positives: NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve: the chance that a positive outscores a negative, equal scores counting half.

    Exact, from the ranks (Mann-Whitney U): scores N, positives N. None without a positive or a negative.
    """
    num_positives = int(positives.sum())
    num_negatives = len(positives) - num_positives
    if num_positives == 0 or num_negatives == 0:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    middle_ranks = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(middle_ranks[place][positives].sum())
    return (rank_sum - num_positives * (num_positives + 1) / 2) / (num_positives * num_negatives)


def average_precision(scores: NDArray[np.float32], positives: NDArray[np.bool_]) -> float | None:
    """Sum over distinct scores, from the highest, of (gain in recall) x (precision down to that score).

    Samples with equal scores are taken together, so their order does not matter. None without a positive.
    """
    num_positives = int(positives.sum())
    if num_positives == 0:
        return None
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last_of_equals = np.append(ordered[1:] != ordered[:-1], True)
    found = np.cumsum(positives[order])[last_of_equals]
    taken = np.flatnonzero(last_of_equals) + 1
    gains = np.diff(found, prepend=0)
    return float((gains * (found / taken)).sum() / num_positives)
