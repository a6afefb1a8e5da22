"""What ``weights=`` names: a run folder, a file, or a published checkpoint, which is brought if it is not there yet."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xception.errors import WeightsError
from xception.models import registry
from xception.weights.bundle import find_bundle
from xception.weights.catalog import IMAGENET, Checkpoint, find_checkpoint, is_published
from xception.weights.download import Progress, cache_folder, fetch_checkpoint
from xception.weights.files import shown

_USUAL_MODEL = "xception"


@dataclass(frozen=True, kw_only=True)
class Located:
    """A weights file on this machine; `checkpoint` is its entry in the catalog where it was asked for by name."""

    path: Path
    checkpoint: Checkpoint | None = None


def is_name(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is a published name; a file that is called so is meant by ``./NAME``."""
    return isinstance(source, str) and (source == IMAGENET or is_published(source))


def locate(source: str | os.PathLike[str], *, model: str | None = None) -> Located:
    """The file that `source` means: a path, a run folder, or a name of the catalog ("imagenet": of the network
    `model`, or else of Xception), which is downloaded into the cache once.

    Raises `WeightsError` where there is no such file or it cannot be brought, `ConfigError` where a published
    name belongs to another network than `model`.
    """
    if isinstance(source, str) and is_name(source):
        checkpoint = find_checkpoint(source, model=model or (_USUAL_MODEL if source == IMAGENET else None))
        with _told(checkpoint) as progress:
            return Located(path=fetch_checkpoint(checkpoint, progress=progress), checkpoint=checkpoint)
    path = find_bundle(source)
    if os.path.lexists(path):
        return Located(path=path)
    if os.fspath(source) in registry.list_models():
        raise WeightsError(
            f"{os.fspath(source)!r} names a network, and its weights would be random: give a bundle "
            "(model.safetensors), a run folder, a checkpoint file or a published name such as 'imagenet'"
        )
    raise WeightsError(f"no such bundle, run folder, checkpoint file or published name: {shown(source)}")


@contextlib.contextmanager
def _told(checkpoint: Checkpoint) -> Iterator[Progress]:
    """A bar on standard error while bytes come; elsewhere than on a terminal, one line when the first have come.

    Nothing is said of a file that is in the cache already.
    """
    if not sys.stderr.isatty():
        said = False

        def say(done: int, total: int | None) -> None:
            nonlocal said
            if not said:
                size = "" if total is None else f" ({total / 1e6:.1f} MB)"
                sys.stderr.write(f"downloading {checkpoint.name}{size} to {shown(cache_folder())}\n")
                said = True

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task(checkpoint.name, total=checkpoint.size, visible=False)

        def show(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        yield show
