"""The folder of a run: one process at a time, one run, described well enough to be resumed only as the same run."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xception.errors import ConfigError
from xception.training.checkpoint import checkpoints
from xception.weights.files import reason, remove_leftovers, shown

# Of one setting in a message: a network's config is long.
_SHOWN = 60


@contextlib.contextmanager
def run_folder(out: Path, *, resume: bool) -> Iterator[None]:
    """Hold the run folder for this process; refuse one that holds a run already, unless it is to be resumed."""
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = (out / "run.lock").open("w")
    except OSError as error:
        what = "" if error.filename is None or str(error.filename) == str(out) else f" ({shown(error.filename)})"
        raise ConfigError(f"cannot make the run folder {shown(out)}: {reason(error)}{what}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is training in {shown(out)}") from None
        except OSError as error:
            raise ConfigError(f"cannot lock the run folder {shown(out)}: {reason(error)}") from error
        if not resume:
            require_no_run(out)
        for folder in (out, out / "checkpoints"):
            remove_leftovers(folder)  # of writers that were killed
        yield


def require_no_run(out: Path) -> None:
    """Refuse a folder that holds a run."""
    try:
        if (out / "recipe.json").exists() or checkpoints(out / "checkpoints"):
            raise ConfigError(f"{shown(out)} holds a run already: give --resume to go on with it, or another --out")
    except OSError as error:
        raise ConfigError(f"cannot use the run folder {shown(out)}: {reason(error)}") from error


def require_same_run(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """A resumed run must be the same run: name every setting that is not."""
    different = [f"{name} was {was}, is {now_is}" for name, was, now_is in differences(before, now)]
    if different:
        raise ConfigError(f"cannot resume {shown(out)}: {'; '.join(different)}")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, former and present value of every setting that is not the same, in nested descriptions too."""
    for name in sorted(before.keys() | now.keys()):
        was, now_is = before.get(name), now.get(name)
        if isinstance(was, Mapping) and isinstance(now_is, Mapping):
            yield from differences(was, now_is, f"{prefix}{name}.")
        elif was != now_is:
            yield f"{prefix}{name}", f"{was!r:.{_SHOWN}}", f"{now_is!r:.{_SHOWN}}"
