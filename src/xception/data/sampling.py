"""Order and randomness of training, as pure functions of numbers: nothing here keeps a state.

Orders come from NumPy's Philox counter generator (Salmon et al., SC 2011), whose stream NumPy guarantees not to change;
seeds from BLAKE2b, so that neighbouring epochs and samples have nothing in common.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def _hash(purpose: bytes, *numbers: int, data: bytes = b"", size: int = 8) -> int:
    message = struct.pack(f"<{len(numbers)}Q", *numbers) + data
    return int.from_bytes(hashlib.blake2b(message, digest_size=size, person=purpose).digest(), "little")


def sample_seed(seed: int, epoch: int, index: int, draw: int = 0) -> int:
    """64-bit seed of one sample's augmentation; `draw` counts how often the epoch has had it before."""
    return _hash(b"sample", seed, epoch, index, draw)


def batch_seed(seed: int, epoch: int, indices: Indices) -> int:
    """64-bit seed of what happens to a batch as a whole, a function of the samples in it."""
    return _hash(b"batch", seed, epoch, data=np.ascontiguousarray(indices, "<i8").tobytes())


def _permutation(count: int, generator: np.random.Philox) -> Indices:
    """A random order of 0..count-1, from raw numbers: NumPy promises that those never change, unlike its methods."""
    return np.argsort(np.asarray(generator.random_raw(count), np.uint64), kind="stable")


def epoch_order(count: int, *, seed: int, epoch: int, shuffle: bool) -> Indices:
    """The order in which an epoch goes through `count` samples."""
    if not shuffle:
        return np.arange(count)
    return _permutation(count, np.random.Philox(key=_hash(b"order", seed, epoch, size=16)))


def balanced_order(targets: Sequence[int], *, seed: int, epoch: int) -> Indices:
    """As many draws as there are samples, every class that occurs equally often (give or take one), in random order.

    A class goes through all of its samples before it repeats one.
    """
    labels = np.asarray(targets, np.int64)
    generator = np.random.Philox(key=_hash(b"balanced", seed, epoch, size=16))
    groups = np.split(by_class := np.argsort(labels, kind="stable"), np.flatnonzero(np.diff(labels[by_class])) + 1)
    drawn = []
    for position, which in enumerate(_permutation(len(groups), generator)):  # the first ones get the odd draws
        members = groups[which]
        wanted = len(labels) // len(groups) + (position < len(labels) % len(groups))
        rounds = [members[_permutation(len(members), generator)] for _ in range(-(-wanted // len(members)))]
        drawn.append(np.concatenate(rounds)[:wanted] if rounds else members[:0])
    order = np.concatenate(drawn)
    return order[_permutation(len(order), generator)]


def occurrences(order: Indices) -> Indices:
    """For each place in `order`, how often its sample came before: 0 for the first time."""
    by_sample = np.argsort(order, kind="stable")
    ordered = order[by_sample]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(order) else np.empty(0, np.int64)
    lengths = np.diff(np.r_[starts, len(order)])
    counts = np.empty(len(order), np.int64)
    counts[by_sample] = np.arange(len(order)) - np.repeat(starts, lengths)
    return counts
