"""MAP@k: mean average precision of the top k guesses, each class's contribution weighted by its importance.

The paper evaluates its multi-label network by the mean average precision of the top 100 guesses, MAP@100, and weighs
the contribution of each class by how common, and so presumably important, it is in social media images (section 4.1).
It gives no formula; this is ours, the usual MAP@k where all classes weigh the same. For an image with R > 0 labels let
m = min(R, k), and for one of its labels c let P(c) be the share of true labels among the guesses down to and including
c, or 0 where c is not among the k best guesses. Then

    MAP@k = sum over images of (1 / m) sum over its labels c of w(c) P(c)
          / sum over images of (1 / m) sum of the m greatest w(c) of its labels

so that every label that could have been found counts with its class's weight, an image with many labels counts as much
as one with few, and a perfect network has 1.

- *Ties*: equal scores rank by class index, the lower first, as everywhere in this package.
- *Images without labels* have no average precision: they are in neither sum.
- *Classes without weight* (0) contribute nothing, and an image whose labels all have none is in neither sum; but they
  are guesses like any others, and right where the image has them: the figure changes by little when a weight is little.
- *k above the number of classes*: all classes are ranked.
- *Scores*: infinite ones have their place in the order. NaN has none and is refused; `evaluate` leaves such samples out
  beforehand and names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from xception.errors import ConfigError, DataError

_BLOCK = 1 << 20  # scores ranked at a time, so that memory does not depend on the batch


def top_classes(scores: Tensor, k: int) -> Tensor:
    """The classes of the min(k, K) greatest scores, best first, equal ones by index: N K -> int64 N k.

    `Tensor.topk` leaves open which of several equal scores it takes; here only its last value counts, and of the
    classes that have it the first are taken.
    """
    k = min(k, scores.shape[1])
    last = scores.topk(k, dim=1).values[:, -1:]
    above, equal = scores > last, scores == last
    chosen = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
    classes = chosen.nonzero()[:, 1].view(len(scores), k)  # ascending in each row, which the stable sort keeps
    order = scores.gather(1, classes).sort(dim=1, descending=True, stable=True).indices
    return classes.gather(1, order)


def average_precisions(
    scores: Tensor, positive: Tensor, weights: Tensor | None = None, *, k: int = 100
) -> tuple[Tensor, Tensor]:
    """What each image adds to the two sums of MAP@k: scores and labels (bool) N K, weights K -> float64 N, N.

    ``gained.sum() / possible.sum()`` is MAP@k; an image without labels, or with labels of no weight, has 0 and 0. For
    confidence intervals draw images again, not labels.

    Raises:
        ConfigError: Shapes that do not fit, k below 1, or weights below 0 or not finite.
        DataError: A score that is NaN.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1; got {k}")
    if scores.dim() != 2 or scores.shape[1] < 1 or scores.shape != positive.shape:
        raise ConfigError(
            f"expected scores and labels of the same N x K; got {_shape(scores)} scores, {_shape(positive)} labels"
        )
    if weights is None:
        weights = scores.new_ones(scores.shape[1], dtype=torch.float64)
    if weights.shape != scores.shape[1:] or not (weights.isfinite() & (weights >= 0)).all():
        raise ConfigError(f"expected {scores.shape[1]} weights, finite and 0 or more; got {_shape(weights)}")
    weights = weights.to(scores.device, torch.float64)
    pieces = [_block(s, p, weights, k) for s, p in _blocks(scores, positive)]
    if not pieces:
        return weights.new_zeros(0), weights.new_zeros(0)
    gained, possible = zip(*pieces, strict=True)
    return torch.cat(gained), torch.cat(possible)


def _blocks(scores: Tensor, positive: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, _BLOCK // scores.shape[1])
    for start in range(0, len(scores), rows):
        yield scores[start : start + rows], positive[start : start + rows].bool()


def _block(scores: Tensor, positive: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if scores.isnan().any():
        raise DataError("a score is NaN, which has no place in an order")
    guesses = top_classes(scores, k)
    hits = positive.gather(1, guesses)
    places = torch.arange(1, guesses.shape[1] + 1, device=scores.device, dtype=torch.float64)
    precision = hits.cumsum(dim=1) / places
    findable = positive.sum(dim=1).clamp(max=guesses.shape[1])
    gained = (hits * weights[guesses] * precision).sum(dim=1)
    heaviest = (positive * weights).topk(guesses.shape[1], dim=1).values  # 0 behind an image's last label
    share = findable.clamp(min=1)
    return gained / share, heaviest.sum(dim=1) / share


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "no"


class MeanAveragePrecision:
    """MAP@k gathered batch by batch; keeps two sums, whatever the number of images.

    Args:
        weights: One a class, 0 or more; None weighs all alike. Only their ratios matter.
        k: Guesses an image.
    """

    def __init__(self, weights: Sequence[float] | None = None, *, k: int = 100) -> None:
        self._weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self._k = k
        self._gained = self._possible = 0.0

    def add(self, scores: Tensor, positive: Tensor) -> None:
        """Add images: scores N K, and which labels each has, N K; raises as `average_precisions` does."""
        gained, possible = average_precisions(scores, positive, self._weights, k=self._k)
        self._gained += float(gained.sum())
        self._possible += float(possible.sum())

    def result(self) -> float | None:
        """The figure, 0 to 1; None where no image had a label of any weight."""
        return self._gained / self._possible if self._possible else None
