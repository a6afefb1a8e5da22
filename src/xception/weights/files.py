"""Writing files so that a reader finds the old one or the new one, whole, and never something in between."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from xception.data.labels import printable
from xception.errors import WeightsError

# One fixed prefix, so that what a killed process left behind can be told from everything else in the folder.
TEMPORARY_PREFIX = ".xception-"
TEMPORARY_SUFFIX = ".tmp"


def shown(path: str | os.PathLike[str]) -> str:
    """The path fit for one line of output: what cannot be printed is escaped."""
    return printable(os.fspath(path))


def reason(error: OSError) -> str:
    """What the system said, without the path and the number: ``No space left on device``."""
    return error.strerror or type(error).__name__


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise the `WeightsError` that `atomic_write` would; for before hours of work, of which nothing is left else."""
    with _system_errors(f"cannot write {shown(path)}"):
        target = Path(os.path.realpath(_file_name(path)))
        _replaceable_mode(target)
        descriptor, temporary = _create_temporary(target.parent)
        os.close(descriptor)
        os.unlink(temporary)


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Put a new file at `path` in one step: whatever goes wrong, the old file (or none) is still there.

    `write` gets a seekable binary stream of a temporary file in the same folder. The file is then flushed,
    synced, renamed over `path`, and its folder synced, in this order, so that a loss of power cannot leave a
    name without its contents. A symbolic link at `path` is followed; the permissions of a file that is
    replaced are kept. Raises `WeightsError` with the path and the system's reason (disk full, no such folder,
    no permission, a directory in the way); what `write` itself raises goes through unchanged.
    """
    with _system_errors(f"cannot write {shown(path)}"):
        target = Path(os.path.realpath(_file_name(path)))
        mode = _replaceable_mode(target)
        descriptor, temporary = _create_temporary(target.parent)
        try:
            with os.fdopen(descriptor, "w+b") as stream:
                if mode is not None and hasattr(os, "fchmod"):
                    os.fchmod(stream.fileno(), mode)
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(target.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in `folder` durable, where the system can do that (not Windows, nor some networks)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike[str]) -> int:
    """Delete the temporary files that killed writers left in `folder`; returns how many.

    Only for the one process that owns the folder: a temporary file of a living writer looks the same.
    """
    leftovers = Path(folder).glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}")
    with _system_errors(f"cannot clean {shown(folder)}"):
        removed = 0
        for path in leftovers:
            path.unlink(missing_ok=True)
            removed += 1
        return removed


def sha256_of(stream: BinaryIO, *, chunk_bytes: int = 1 << 20) -> str:
    """The SHA-256 of what is left in the stream, as 64 hexadecimal digits; memory is bounded by the chunk."""
    digest = hashlib.sha256()
    while chunk := stream.read(chunk_bytes):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits. Raises `WeightsError` where it cannot be read."""
    with open_regular(path) as stream:
        return sha256_of(stream)


@contextlib.contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a regular file for reading; a pipe, device or folder is refused without waiting for it.

    System errors, on opening and while the file is open, become one-line `WeightsError`s that name the path.
    """
    with _system_errors(f"cannot read {shown(path)}"):
        # Opening a pipe would wait for its writer; with O_NONBLOCK it does not, and files do not mind.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(_file_name(path), flags)
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "expected a regular file, got a pipe, socket or device")
            yield stream


@contextlib.contextmanager
def _system_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightsError(f"{doing}: {reason(error)}") from error


def _file_name(path: str | os.PathLike[str]) -> str:
    """The path as text; a zero byte, which no system call takes, is a system error like any other."""
    name = os.fspath(path)
    if "\0" in name:
        raise OSError(errno.EINVAL, "a file name cannot hold a zero byte")
    return name


def _replaceable_mode(target: Path) -> int | None:
    """The permissions of the regular file at `target`, None where there is none; refuses anything else.

    Renaming over a device (``/dev/null``) would replace the device, and over a folder fails only at the end.
    """
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "expected a regular file there, got a pipe, socket or device")
    return stat.S_IMODE(mode)


def _create_temporary(folder: Path) -> tuple[int, Path]:
    """A new file in `folder` under a name nobody can guess; O_EXCL, so a planted link is never followed.

    Not `tempfile`: its files are readable by their owner alone, whatever the umask says.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    path = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(16)}{TEMPORARY_SUFFIX}"
    return os.open(path, flags, 0o666), path
