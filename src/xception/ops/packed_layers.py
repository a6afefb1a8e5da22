"""Single layers of the executor, made of an operation's weights and kept from call to call."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xception.ops import backend

if TYPE_CHECKING:
    from xception.ops.backend import Crews, Network


@dataclass(frozen=True)
class _Kept:
    """A layer, and which weights it was made of."""

    weights: tuple[weakref.ref[Tensor] | None, ...]
    versions: tuple[int, ...]
    network: Network
    value: int

    def is_of(self, weights: tuple[Tensor | None, ...]) -> bool:
        same = all(w is None if ref is None else ref() is w for ref, w in zip(self.weights, weights, strict=True))
        return same and self.versions == _versions(weights)

    def is_lost(self) -> bool:
        return any(ref is not None and ref() is None for ref in self.weights)


class PackedLayers:
    """One layer of the executor for each set of weights, packed once and kept while the weights stay as they are.

    The keys are the tensors themselves, by identity; a version says whether one was updated in place. Nothing keeps a
    tensor alive, and what was made of one goes with it. The least recently used are dropped beyond `capacity`. All run
    in the same memory, which goes with the last of them.
    """

    def __init__(self, capacity: int = 256) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[Any, _Kept] = OrderedDict()
        self._crews: dict[int, Crews] = {}  # by the number of threads
        self._lock = threading.Lock()
        self._lost: deque[Any] = deque()  # keys of which a tensor is gone

    def __len__(self) -> int:
        return len(self._kept)

    def run(
        self,
        x: Tensor,
        weights: tuple[Tensor | None, ...],
        key: tuple[Any, ...],
        build: Any,
        beside: Tensor | None = None,
    ) -> Tensor:
        """The layer's result for `x`, N C H W with channels last."""
        network, value = self._find(x.shape[1], weights, key, build)
        images = _channels_last(x)
        result = np.empty((len(images), *network.shape(value, *images.shape[1:3])), np.float32)
        network.run(images, value, result, None if beside is None else _channels_last(beside))
        return torch.from_numpy(result).permute(0, 3, 1, 2)

    def _find(
        self, channels: int, weights: tuple[Tensor | None, ...], key: tuple[Any, ...], build: Any
    ) -> tuple[Network, int]:
        level, threads = backend.kernel_level("fp32"), torch.get_num_threads()
        full = (key, level, threads, *(None if w is None else id(w) for w in weights))
        with self._lock:
            self._drop_lost()
            found = self._kept.get(full)
            if found is not None and found.is_of(weights):
                self._kept.move_to_end(full)
                return found.network, found.value
            crews = self._crews.get(threads)
            if crews is None:
                crews = self._crews[threads] = backend.new_crews(threads)
        versions = _versions(weights)
        network = backend.new_network("fp32", channels, threads, crews=crews)
        value = build(network)

        def lost(_: Any) -> None:
            self._lost.append(full)
            if self._lock.acquire(blocking=False):  # a collector calls this anywhere, also where the lock is held
                try:
                    self._drop_lost()
                finally:
                    self._lock.release()

        references = tuple(None if w is None else weakref.ref(w, lost) for w in weights)
        with self._lock:
            self._kept[full] = _Kept(references, versions, network, value)
            self._kept.move_to_end(full)
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        return network, value

    def _drop_lost(self) -> None:
        while self._lost:
            full = self._lost.popleft()
            found = self._kept.get(full)
            if found is not None and found.is_lost():
                del self._kept[full]
        if not self._kept:
            self._crews.clear()


def _versions(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple(-1 if t is None or t.is_inference() else t._version for t in tensors)


def _channels_last(x: Tensor) -> Any:
    return np.ascontiguousarray(x.detach().permute(0, 2, 3, 1).numpy())


LAYERS = PackedLayers()
