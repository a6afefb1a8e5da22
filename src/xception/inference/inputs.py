"""What a person names on a command line -- files, folders, globs, standard input -- as a stream of paths."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from xception.data.containers import IMAGE_SUFFIXES

# Linux takes no longer path; a line beyond it is not a path but some other file sent by mistake.
_MAX_LINE_BYTES = 4096


class FailedImage(NamedTuple):
    """An input that gave no prediction: the path as it was named, and why, in one line."""

    path: str
    error: str


def expand_inputs(
    patterns: Iterable[str | os.PathLike[str]], stdin: BinaryIO | None = None
) -> Iterator[str | FailedImage]:
    """The paths of the images that `patterns` name, one after the other, as they are found.

    - a file is itself, whatever its suffix;
    - a folder is every image in it and below it (by suffix), sorted, without names that begin with a dot; a
      folder reached twice through symbolic links is entered once;
    - a glob (``*``, ``?``, ``[...]``, ``**``) that is no existing name is what it matches, sorted, as a shell
      would have given it; a folder it matches counts as a folder, and what lies in it comes once;
    - ``-`` is `stdin` (binary), one path a line, not expanded further; empty lines are passed over.

    What is missing, matches nothing, or holds no image comes out as a `FailedImage` in its place.
    """
    for pattern in patterns:
        text = os.fspath(pattern)
        if text == "-":
            yield from _lines(stdin)
        elif os.path.lexists(text) or not _is_glob(text):
            yield from _named(text)
        else:
            yield from _matches(text)


def _named(path: str) -> Iterator[str | FailedImage]:
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        yield FailedImage(path, _reason(error))
        return
    if is_folder:
        yield from _images_below(path)
    else:
        yield path


def _images_below(top: str) -> Iterator[str | FailedImage]:
    found = False
    for found_path in _walk(top, set()):
        found = True
        yield found_path
    if not found:
        yield FailedImage(top, "no images in this folder")


def _walk(folder: str, entered: set[tuple[int, int]]) -> Iterator[str | FailedImage]:
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            return
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as listing:
            entries = sorted((e for e in listing if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        yield FailedImage(folder, _reason(error))
        return
    for entry in entries:
        try:
            is_folder = entry.is_dir()
        except OSError:  # a loop of links: reading it will say so
            is_folder = False
        if is_folder:
            yield from _walk(entry.path, entered)
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            yield entry.path


def _is_glob(text: str) -> bool:
    return any(c in text for c in "*?[")


def _matches(pattern: str) -> Iterator[str | FailedImage]:
    """pathlib's glob, as its ``**`` does not follow links, so that a loop of links cannot trap it."""
    path = Path(pattern)
    base = Path(path.anchor) if path.anchor else Path()
    relative = path.relative_to(path.anchor) if path.anchor else path
    wants_hidden = any(part.startswith(".") for part in relative.parts)
    try:
        matches = sorted(
            str(match)
            for match in base.glob(str(relative))
            if wants_hidden or not any(part.startswith(".") for part in match.relative_to(base).parts)
        )
    except (OSError, ValueError, NotImplementedError) as error:
        yield FailedImage(pattern, _reason(error))
        return
    if not matches:
        yield FailedImage(pattern, "nothing matches this pattern")
    folders: set[Path] = set()  # searched through: what they hold has been named, and is not named again
    for match in map(Path, matches):
        if folders.isdisjoint(match.parents):
            if match.is_dir():
                folders.add(match)
            yield from _named(str(match))


def _lines(stdin: BinaryIO | None) -> Iterator[str | FailedImage]:
    if stdin is None:
        yield FailedImage("-", "there is no standard input to read paths from")
        return
    while line := stdin.readline(_MAX_LINE_BYTES + 1):
        if len(line) > _MAX_LINE_BYTES and not line.endswith(b"\n"):
            yield FailedImage("-", f"expected a path a line, got a line of more than {_MAX_LINE_BYTES} bytes")
            return
        # The bytes of a file's name need not be UTF-8: `fsdecode` keeps them, and opening gives them back.
        if path := os.fsdecode(line.rstrip(b"\r\n")):
            yield path


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error).partition("\n")[0]
