"""One process at a time: a lock that belongs to an open file, so that it goes with its process, however that ends."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_POLL_SECONDS = 0.1


@contextlib.contextmanager
def only_writer(lock: Path, *, patience: float, watch: Callable[[], int]) -> Iterator[bool]:
    """Whether this process (and thread) alone holds `lock` for the length of the block; waits for its turn.

    `watch` is called while another holds it, and gives a number that changes as the other makes progress; when it has
    not changed for `patience` seconds the wait is over, and the answer False: the other is stuck, or stopped. So it is
    where the file system has no locks. The file `lock` is made, and stays: to delete it would let two in. Raises
    OSError where it cannot be made.
    """
    with open(lock, "ab") as stream:
        yield _wait_for(stream.fileno(), patience, watch)


def _wait_for(descriptor: int, patience: float, watch: Callable[[], int]) -> bool:
    seen: int | None = None
    since = time.monotonic()
    while True:
        try:
            _lock(descriptor)
            return True
        except BlockingIOError:
            pass
        except OSError:
            return False
        if (now := watch()) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > patience:
            return False
        time.sleep(_POLL_SECONDS)


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:  # which is how Windows says that another holds it
            raise BlockingIOError(error.errno, error.strerror) from error

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
