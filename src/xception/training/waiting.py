"""How much of an epoch the network waits for its images."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Waiting(Generic[T]):
    """Goes through `things` once, and knows how long it took them to come.

    Without workers that is the whole time of reading and preparing them, which nothing else is done in.
    """

    def __init__(self, things: Iterable[T]) -> None:
        self._things = iter(things)
        self._began = time.monotonic()
        self.seconds = 0.0
        """Waited so far."""

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began = time.monotonic()
        try:
            return next(self._things)
        finally:
            self.seconds += time.monotonic() - began

    @property
    def share(self) -> float:
        """Of the time since this was made, 0 to 1."""
        return min(1.0, self.seconds / max(time.monotonic() - self._began, 1e-9))
