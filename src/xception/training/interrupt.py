"""SIGINT and SIGTERM as a flag that the loop reads between steps, so that nothing is left half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType


class Stopped(Exception):
    """Training was asked to stop and nothing is lost; `signal_number` says by whom."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """While entered, SIGINT and SIGTERM raise `Stopped`, or inside `deferred` only set `signal_number`.

    A second one acts as it always did. Outside the main thread Python has no signals, and nothing is changed.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._deferred = False
        self._before: dict[int, signal.Handlers | int | None] = {}

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Where stopping at once would lose something: whoever is inside looks at `signal_number` now and then."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal_number = number
        self._restore()
        if not self._deferred:
            raise Stopped(number, f"stopped by signal {number} before the first step; there is nothing to lose yet")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
