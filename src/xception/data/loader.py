"""Batches: a split, preprocessed, augmented, in an order, from this process or from workers, always the same ones.

A sample with its augmentation is a pure function of (seed, epoch, index), mixing of a batch one of (seed, epoch, the
indices in it). Batch size, number of workers, where an epoch is entered, and torch's own random state make no
difference, and that state is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from xception.data.augment import Augment, SampleAugmenter, isolated_rng, mix_batch
from xception.data.preprocess import Preprocess
from xception.data.sampling import (
    Indices,
    balanced_order,
    batch_seed,
    epoch_order,
    occurrences,
    sample_seed,
)
from xception.data.split import ArraySplit, BadImage, Split
from xception.data.workers import WorkerPool
from xception.errors import ConfigError, DataError, ImageError

__all__ = ["BadImage", "Batch", "Loader"]

_MAX_CACHE_BYTES = 1 << 30  # of fitted images; more is fitted again each time
_FIT_AT_ONCE = 1024


class Batch(NamedTuple):
    """What one step works on; N is smaller than the batch size where samples were bad, and may be 0."""

    images: torch.Tensor
    """float32 N C H W."""
    targets: torch.Tensor
    """int64 N; float32 N K for multi-label data, or after mixup or CutMix."""
    indices: torch.Tensor
    """int64 N: which samples of the split these are."""
    bad: tuple[BadImage, ...]
    """Samples of this batch that could not be decoded and are not in it."""


class Loader:
    """Goes through a split in batches, epoch by epoch.

    Args:
        split: The samples.
        preprocess: How images become inputs.
        num_classes: K, for targets that are vectors.
        multi_label: Whether targets are sets of classes.
        batch_size: Samples a batch.
        augment: Random changes, for training.
        seed: Of order and augmentation, 0 or more.
        shuffle: A new order every epoch, instead of the split's own.
        balanced: Draw every class equally often, in random order; an epoch still has as many draws as samples.
            Single-label data only.
        drop_last: Leave out a last batch that is not full.
        workers: Processes that decode and augment; 0 does it here. Batches are the same for any number.

    Raises:
        ConfigError: A value out of its range.
        DataError: No samples, or targets that do not fit.
    """

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        *,
        num_classes: int,
        multi_label: bool = False,
        batch_size: int,
        augment: Augment | None = None,
        seed: int = 0,
        shuffle: bool = False,
        balanced: bool = False,
        drop_last: bool = False,
        workers: int = 0,
    ) -> None:
        for name, value, least in (
            ("num_classes", num_classes, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("workers", workers, 0),
        ):
            if type(value) is not int or not least <= value < 2**63:
                raise ConfigError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if balanced and multi_label:
            raise ConfigError("balanced: not defined for multi-label data")
        if len(split) == 0:
            raise DataError("expected at least one sample, got an empty split")
        self.split = split
        self.preprocess = preprocess
        self.num_classes = num_classes
        self.multi_label = multi_label
        self.batch_size = batch_size
        self.augment = augment or Augment()
        self.seed = seed
        self.shuffle = shuffle
        self.balanced = balanced
        self.drop_last = drop_last
        self.workers = workers
        self._targets = (_LabelSets if multi_label else _Labels)(split, num_classes)
        self._maker = _BatchMaker(split, preprocess, self.augment, seed)
        self._pool: WorkerPool[_Job, _Made] | None = None

    def __len__(self) -> int:
        """Batches an epoch."""
        samples = len(self.split)
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from `start_batch` on: the very ones that the whole epoch ends with.

        Raises:
            ConfigError: A number below 0, or a start behind the end.
            DataError: The workers keep dying.
        """
        if type(epoch) is not int or not 0 <= epoch < 2**63:
            raise ConfigError(f"epoch: expected a whole number of at least 0, got {epoch!r}")
        if type(start_batch) is not int or not 0 <= start_batch <= len(self):
            raise ConfigError(f"start_batch: expected 0 to {len(self)}, got {start_batch!r}")
        return self._batches(epoch, start_batch)

    def close(self) -> None:
        """End the workers, if there are any."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def order(self, epoch: int) -> Indices:
        """The samples of an epoch by their numbers, batch after batch, before a last batch is left out."""
        if self.balanced:
            return balanced_order(self.split.targets, seed=self.seed, epoch=epoch)  # type: ignore[arg-type]
        return epoch_order(len(self.split), seed=self.seed, epoch=epoch, shuffle=self.shuffle)

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        order = self.order(epoch)
        draws = occurrences(order)
        places = (slice(b * self.batch_size, (b + 1) * self.batch_size) for b in range(start_batch, len(self)))
        jobs = (_Job(epoch, order[place], draws[place]) for place in places)
        self._maker.prepare()
        for made in self._map(jobs):
            yield self._finish(epoch, made)

    def _map(self, jobs: Iterator[_Job]) -> Iterator[_Made]:
        if self.workers == 0:
            return map(self._maker, jobs)
        if self._pool is None:
            self._pool = WorkerPool(_InWorker(self._maker), self.workers)
        return self._pool.map(jobs)

    def _finish(self, epoch: int, made: _Made) -> Batch:
        indices = torch.from_numpy(made.indices)
        images = self.preprocess.normalize(torch.from_numpy(made.images))
        targets = self._targets.of(indices)
        if self.augment.mixes:
            images, targets = mix_batch(
                self.augment,
                images,
                targets,
                num_classes=self.num_classes,
                seed=batch_seed(self.seed, epoch, made.indices),
            )
        return Batch(images, targets, indices, made.bad)


class _Labels:
    """The class index of each sample."""

    def __init__(self, split: Split, num_classes: int) -> None:
        with _well_formed(split, "class indices"):
            array = np.asarray(split.targets, np.int64).reshape(len(split))
        _check_range(array, num_classes)
        self._classes = torch.from_numpy(array)

    def of(self, indices: torch.Tensor) -> torch.Tensor:
        """int64 N."""
        return self._classes[indices]


class _LabelSets:
    """The labels of each sample, one behind the other: as vectors of zeros and ones those of 14,000 images and 17,000
    classes would take a gigabyte."""

    def __init__(self, split: Split, num_classes: int) -> None:
        sets: Any = split.targets
        with _well_formed(split, "tuples of class indices"):
            flat = np.fromiter((label for target in sets for label in target), np.int64)
            lengths = np.fromiter((len(target) for target in sets), np.int64, len(sets))
        _check_range(flat, num_classes)
        self._flat = torch.from_numpy(flat)
        self._lengths = torch.from_numpy(lengths)
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._num_classes = num_classes

    def of(self, indices: torch.Tensor) -> torch.Tensor:
        """float32 N K of zeros and ones."""
        lengths = self._lengths[indices]
        rows = torch.arange(len(indices)).repeat_interleave(lengths)
        within = torch.arange(len(rows)) - (lengths.cumsum(0) - lengths)[rows]
        vectors = torch.zeros(len(indices), self._num_classes)
        vectors[rows, self._flat[self._starts[indices][rows] + within]] = 1
        return vectors


@contextmanager
def _well_formed(split: Split, kind: str) -> Iterator[None]:
    if len(split.targets) != len(split):
        raise DataError(f"expected a target for each of {len(split)} samples, got {len(split.targets)}")
    try:
        yield
    except (TypeError, ValueError) as error:
        raise DataError(f"expected targets that are {kind}: {error}") from error


def _check_range(labels: npt.NDArray[np.int64], num_classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size:
        raise DataError(f"expected targets from 0 to {num_classes - 1}, got {wrong[0]}")


class _Job(NamedTuple):
    """One batch to make: where in the data, and each sample's number of earlier draws in the epoch."""

    epoch: int
    indices: Indices
    draws: Indices


class _Made(NamedTuple):
    """A batch before normalisation, small enough to travel."""

    images: npt.NDArray[np.uint8]
    indices: Indices
    bad: tuple[BadImage, ...]


class _BatchMaker:
    """Makes batches of uint8 N C H W; a pure function of the job."""

    def __init__(self, split: Split, preprocess: Preprocess, augment: Augment, seed: int) -> None:
        self._split = split
        self._preprocess = preprocess
        self._augment = augment
        self._seed = seed
        self._augmenter = SampleAugmenter(augment, preprocess) if augment.changes_samples else None
        self._fitted: torch.Tensor | None = None
        self._prepared = False

    def prepare(self) -> None:
        """For images in memory: everything before the augmentation, once and for all, if it fits."""
        if self._prepared:
            return
        self._prepared = True
        split = self._split
        height, width = self._preprocess.size
        cost = len(split) * self._preprocess.channels * height * width
        if not isinstance(split, ArraySplit) or self._augment.replaces_geometry or cost > _MAX_CACHE_BYTES:
            return
        pieces = []
        for start in range(0, len(split), _FIT_AT_ONCE):
            images = split.array[split.rows[start : start + _FIT_AT_ONCE]]
            count, rows, columns, channels = images.shape
            # Channels are converted pixel by pixel, so the images may stand on top of each other.
            tall = self._preprocess.convert(images.reshape(count * rows, columns, channels))
            stacked = tall.reshape(-1, count, rows, columns).transpose(0, 1).contiguous()
            fitted = self._preprocess.fit(stacked)
            pieces.append(self._augmenter.pad(fitted) if self._augmenter else fitted)
        self._fitted = torch.cat(pieces)

    def __call__(self, job: _Job) -> _Made:
        if self._augmenter is None and self._fitted is not None:
            return _Made(self._fitted[torch.from_numpy(job.indices)].numpy(), job.indices, ())
        images: list[torch.Tensor] = []
        kept: list[int] = []
        bad: list[BadImage] = []
        with isolated_rng() as reseed, _threads(1 if self._augmenter and self._augmenter.needs_one_thread else None):
            for index, draw in zip(job.indices.tolist(), job.draws.tolist(), strict=True):
                if self._augmenter is not None:
                    reseed(sample_seed(self._seed, job.epoch, index, draw))
                try:
                    images.append(self._sample(index))
                    kept.append(index)
                except ImageError as error:
                    bad.append(BadImage(self._split.keys[index], str(error)))
        shape = (0, self._preprocess.channels, *self._preprocess.size)
        stacked = torch.stack(images).numpy() if images else np.empty(shape, np.uint8)
        return _Made(stacked, np.asarray(kept, np.int64), tuple(bad))

    def _sample(self, index: int) -> torch.Tensor:
        if self._fitted is not None and self._augmenter is not None:
            return self._augmenter.from_padded(self._fitted[index])
        image = self._split.image(index)
        return self._augmenter(image) if self._augmenter else self._preprocess.geometry(image)


class _InWorker:
    """A batch maker as a worker runs it: on one thread, since there are several workers."""

    def __init__(self, maker: _BatchMaker) -> None:
        self._maker = maker

    def __call__(self, job: _Job) -> _Made:
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)
        return self._maker(job)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
