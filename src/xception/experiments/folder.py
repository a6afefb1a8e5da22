"""The folder of an experiment or a search: one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from xception.errors import ConfigError
from xception.weights.files import reason, remove_leftovers, shown


@contextlib.contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Keep `folder` for this process. Raises `ConfigError` where another one has it or it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"cannot make the folder {shown(folder)}: {reason(error)}") from error
    with lock, _no_empty_folder(folder):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process is at work in {shown(folder)}") from None
        remove_leftovers(folder)  # of writers that were killed
        yield


@contextlib.contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """Where nothing was written, because it could not begin, nothing is left behind."""
    try:
        yield
    finally:
        if [path.name for path in folder.iterdir()] == [".lock"]:
            with contextlib.suppress(OSError):
                (folder / ".lock").unlink()
                folder.rmdir()
