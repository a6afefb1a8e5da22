"""What a frozen trunk makes of each image, computed once: while only the head learns, an epoch is over in moments.

An image is prepared as in evaluation and goes through the trunk as there, on a CPU by the compiled executor, so that it
has the same features in every epoch: what the head's own pooling makes of the trunk's output. They are kept as N C 1 1,
which pooling does not change, and the head runs on them as it is. Augmentation, also that of whole batches (mixup,
CutMix), is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xception.data.loader import BadImage, Batch, Loader
from xception.inference.runner import runner_beside_training
from xception.models.head import Classifier
from xception.training.memory import machine_bytes
from xception.training.optimizers import head_module
from xception.training.prepare import Plan
from xception.training.step import has_towers

MAX_BYTES = 2 << 30


class Features(NamedTuple):
    """The features of a split, in its order."""

    values: Tensor
    """N C, 0 where the image is bad; in the type that the trunk gives, since dropout is drawn in it."""
    targets: Tensor
    """int64 N, or float32 N K for multi-label data."""
    known: Tensor
    """bool N: whether the image could be read."""
    bad: dict[str, BadImage]
    """Those that could not, by their keys."""


class FeatureLoader:
    """Goes through the features of a split as `like` goes through its images: the same samples in the same batches."""

    def __init__(self, like: Loader, features: Features) -> None:
        self.split = like.split
        self.batch_size = like.batch_size
        self._like = like
        self._features = features

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._like)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from `start_batch` on, with features N C 1 1 for images."""
        features, keys, order = self._features, self.split.keys, self._like.order(epoch)
        for start in range(start_batch * self.batch_size, len(self) * self.batch_size, self.batch_size):
            indices = torch.from_numpy(order[start : start + self.batch_size])
            known = features.known[indices]
            bad = tuple(features.bad[keys[i]] for i in indices[~known].tolist())
            indices = indices[known]
            yield Batch(features.values[indices][:, :, None, None], features.targets[indices], indices, bad)


def obstacle(plan: Plan, model: nn.Module) -> str | None:
    """Why the features of this run cannot be kept; None where they can.

    That depends on the machine's memory, not on how much of it is free: a run that is resumed must do as before.
    """
    head = head_module(model)
    if not isinstance(head, Classifier) or has_towers(model):
        return f"{plan.model} is more than a trunk with one classifier on its pooled output"
    images = len(plan.train) + (0 if plan.val is None else len(plan.val))
    values = _width(head) + (len(plan.class_names) if plan.multi_label else 0)  # labels are kept as vectors
    needed, limit = 4 * images * values, min(MAX_BYTES, machine_bytes() // 4)
    if needed > limit:
        return f"those of {images:,} images take {needed / 2**20:,.0f} MiB, more than {limit / 2**20:,.0f} MiB"
    return None


def compute_features(network: nn.Module, plan: Plan, loader: Loader, *, done: Callable[[Batch], None]) -> Features:
    """The features of every image that `loader` gives in one epoch, in order; `done` is called after each batch.

    `network` ends in a `Classifier` and is in eval mode. The arithmetic is that of `evaluate_model`.
    """
    head = head_module(network)
    assert isinstance(head, Classifier)
    count = len(loader.split)
    values, known = torch.zeros(count, _width(head)), torch.zeros(count, dtype=torch.bool)
    targets = torch.zeros(count, loader.num_classes) if loader.multi_label else torch.zeros(count, dtype=torch.int64)
    bad: dict[str, BadImage] = {}
    runner = runner_beside_training(network, plan.precision)
    for batch in loader.epoch(0):
        bad.update({image.key: image for image in batch.bad})
        if len(batch.images):
            pooled = runner.pooled(batch.images)
            if not known.any():
                values = values.to(pooled.dtype)
            values[batch.indices], targets[batch.indices], known[batch.indices] = pooled, batch.targets, True
        done(batch)
    return Features(values, targets, known, bad)


def _width(head: Classifier) -> int:
    """Features an image."""
    return next(m.in_features for m in head.modules() if isinstance(m, nn.Linear))
