"""Published checkpoints into the user's cache: resumed where they broke off, verified before they get their name.

A file under its final name is whole: it was written beside it (``NAME.partial``), verified, synced and renamed. Its
digest is taken again each time the file is asked for, a tenth of a second for 100 MB, so that a file which went bad, or
which someone put there by hand, is found out; there is no marker that could be wrong.

Of processes that want the same file at once one downloads and the others wait for it. Where that cannot be arranged
(no locks on this file system, or the other is stuck) each downloads for itself under a name of its own: more traffic,
the same result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from xception.errors import WeightsError
from xception.weights.catalog import Checkpoint, Digest, find_checkpoint
from xception.weights.files import atomic_write, open_regular, reason, shown, sync_folder
from xception.weights.one_writer import only_writer
from xception.weights.transfer import Reply, TransferError, TransferSettings, read_chunks, request_file

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and the size of the whole, None where nobody knows it."""

_PROGRESS_BYTES = 1 << 20  # a try that gets this much further starts the count of failures anew


def cache_folder() -> Path:
    """Where downloads are kept: $XCEPTION_CACHE, else $XDG_CACHE_HOME/xception, else ~/.cache/xception.

    It need not exist. Raises `WeightsError` where there is no home to put it in.
    """
    if own := os.environ.get("XCEPTION_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(own)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # a relative one is to be ignored, says the XDG specification
        return Path(base) / "xception"
    try:
        return Path.home() / ".cache" / "xception"
    except RuntimeError:
        raise WeightsError("no home directory for the cache: set XCEPTION_CACHE to a folder") from None


def fetch_checkpoint(
    checkpoint: Checkpoint | str,
    *,
    model: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    settings: TransferSettings | None = None,
) -> Path:
    """The checkpoint's file, verified, in `folder` (the cache): downloaded if it is not there yet.

    A name is looked up by `find_checkpoint`, with its errors. Raises `WeightsError` as `download` does.
    """
    found = find_checkpoint(checkpoint, model=model) if isinstance(checkpoint, str) else checkpoint
    target = (cache_folder() if folder is None else Path(folder)) / found.file_name
    return download(
        found.url, target, name=found.name, digest=found.digest, size=found.size, progress=progress, settings=settings
    )


def download(
    url: str,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    digest: Digest | None = None,
    size: int | None = None,
    progress: Progress | None = None,
    settings: TransferSettings | None = None,
) -> Path:
    """Bring the file at `url` to `path`, unless it is there and has the digest; returns the absolute path.

    `size` in bytes guides and bounds the transfer, and where there is no `digest` it must be met. An interrupted
    download is taken up again next time, if the server still has the same version. Raises `WeightsError`, one line:
    with both digests where they differ, else with what went wrong, what to download by hand and where to put it.
    """
    settings = settings or TransferSettings()
    job = _Job(
        url=url,
        target=Path(os.path.abspath(path)),
        digest=digest,
        size=size,
        progress=progress or (lambda done, total: None),
        settings=_bounded(settings, size),
    )
    if (fault := job.fault()) is None:
        return job.target
    try:
        with _disk(job.target.parent):
            job.target.parent.mkdir(parents=True, exist_ok=True)
        with _part_to_write(job) as part:
            if job.fault() is not None:  # unless another process has brought it meanwhile
                _bring(job, part)
    except TransferError as error:
        damaged = f"; the file there is not the right one ({fault})" if fault else ""
        verify = f" ({digest})" if digest else ""
        raise WeightsError(
            f"cannot download {shown(name or job.target.name)}: {error}{damaged}; "
            f"get {shown(url)}{verify} by hand and save it as {shown(job.target)}"
        ) from error
    return job.target


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One download: what, where to, and how to know that it is right."""

    url: str
    target: Path
    digest: Digest | None
    size: int | None
    progress: Progress
    settings: TransferSettings

    def fault(self) -> str | None:
        """What keeps the file at `target` from being used: "" if there is none, None if nothing does."""
        return _fault(self.target, self.digest, self.size) if self.target.exists() else ""


def _bounded(settings: TransferSettings, size: int | None) -> TransferSettings:
    """With a quarter and a MiB above the reported size as the bound: sizes guide, digests decide."""
    if size is None:
        return settings
    return replace(settings, max_bytes=min(settings.max_bytes, size + size // 4 + (1 << 20)))


@contextlib.contextmanager
def _part_to_write(job: _Job) -> Iterator[Path]:
    """The unfinished file that this process alone may write: the resumable one, or else one for itself."""
    part = job.target.with_name(job.target.name + ".partial")

    def watch() -> int:
        length = _length(part)
        job.progress(length, job.size)
        return length

    with contextlib.ExitStack() as stack:
        with _disk(job.target.parent):
            lock = job.target.with_name(f".{job.target.name}.lock")
            patience = 2 * (job.settings.timeout + job.settings.longest_pause)
            alone = stack.enter_context(only_writer(lock, patience=patience, watch=watch))
        if alone:
            yield part
            return
        own = job.target.with_name(f"{job.target.name}.{secrets.token_hex(8)}.partial")
        try:
            yield own
        finally:
            _discard(own)  # nobody would find it again


def _bring(job: _Job, part: Path) -> None:
    """Download into `part`, try after try, verify it, and give it its name."""
    contacted, failures, furthest = False, 0, _length(part)
    while error := _one_try(job, part):
        if not error.temporary:
            raise error
        contacted = contacted or not error.offline
        failures = 1 if _length(part) >= furthest + _PROGRESS_BYTES else failures + 1
        furthest = max(furthest, _length(part))
        # Where the network was never seen, one more look is enough.
        if failures >= (job.settings.tries if contacted else min(2, job.settings.tries)):
            raise TransferError(f"{error} (gave up after try {failures})") from error
        pause = max(error.wait, job.settings.pause * 2 ** (failures - 1))
        time.sleep(min(pause, job.settings.longest_pause))


def _one_try(job: _Job, part: Path) -> TransferError | None:
    """Transfer, verify, publish; what kept the transfer from succeeding, None if nothing did."""
    try:
        resumed = _fetch(job, part)
    except TransferError as error:
        return error
    if fault := _fault(part, job.digest, job.size):
        _discard(part)
        if resumed:
            return TransferError(f"the file put together of two parts is wrong: {fault}", temporary=True)
        raise WeightsError(f"the file at {shown(job.url)} is not the right one: {fault}; it was removed")
    _publish(part, job.target)
    return None


def _fetch(job: _Job, part: Path) -> bool:
    """One try: ask for what is missing and append it; returns whether some of it was there before.

    What came stays, whatever ends the try.
    """
    memory = _recall(part, job.url)
    start = _length(part)
    if memory and start and start == memory.total:
        return True  # it ended between the last byte and the name
    try:
        with request_file(job.url, job.settings, start=start, validator=memory.validator if memory else None) as reply:
            _receive(job, part, reply)
            return reply.start > 0
    except TransferError as error:
        if error.restart:
            _discard(part)
        raise


def _receive(job: _Job, part: Path, reply: Reply) -> None:
    done, total = reply.start, reply.total or job.size
    _check_space(part.parent, (total or 0) - done)
    with contextlib.ExitStack() as stack:
        with _disk(part):
            if done == 0:
                _discard(part)
                _remember(part, job.url, reply)
            stream = stack.enter_context(open(part, "ab", buffering=0))
        job.progress(done, total)
        for chunk in read_chunks(reply, job.settings):
            with _disk(part):
                rest = memoryview(chunk)
                while rest:
                    rest = rest[stream.write(rest) :]
            done += len(chunk)
            job.progress(done, total)
    if reply.total is None and job.size is not None and done < job.size:
        # The body ended with its connection, which is also what a cut one looks like.
        raise TransferError(f"the connection ended {job.size - done:,} bytes early", temporary=True)


def _fault(path: Path, digest: Digest | None, size: int | None) -> str | None:
    """How the file's contents differ from what they should be; None if they do not."""
    with open_regular(path) as stream:
        if digest is None:
            length = os.fstat(stream.fileno()).st_size
            return None if size in (None, length) else f"expected {size:,} bytes, got {length:,}"
        # MD5 is Keras's choice; it stands against damage here, not against forgery.
        state = hashlib.new(digest.algorithm, usedforsecurity=False)
        while chunk := stream.read(1 << 20):
            state.update(chunk)
    if digest.matches(state.hexdigest()):
        return None
    return f"expected {digest}, got {digest.algorithm} {state.hexdigest()}"


def _publish(part: Path, target: Path) -> None:
    """The verified file becomes `target` in one step that a loss of power cannot tear."""
    with _disk(target):
        with open(part, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(part, target)
        _memory_of(part).unlink(missing_ok=True)
        sync_folder(target.parent)


# What is remembered of an unfinished file: which version of which address it is the beginning of.


@dataclass(frozen=True, kw_only=True)
class _Memory:
    validator: str
    total: int | None


def _memory_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _remember(part: Path, url: str, reply: Reply) -> None:
    if reply.validator is None:
        return
    text = json.dumps({"url": url, "validator": reply.validator, "total": reply.total})

    def write(stream: BinaryIO) -> None:
        stream.write(text.encode("ascii"))

    atomic_write(_memory_of(part), write)


def _recall(part: Path, url: str) -> _Memory | None:
    """What is remembered of `part`; None where that is nothing that can be used."""
    try:
        with open_regular(_memory_of(part)) as stream:
            fields = json.loads(stream.read(1 << 16))
        validator, total = fields["validator"], fields["total"]
        if fields["url"] == url and isinstance(validator, str) and validator.isascii() and validator.isprintable():
            return _Memory(validator=validator, total=total if type(total) is int else None)
    except (ValueError, TypeError, KeyError, RecursionError):  # a WeightsError is a ValueError
        pass
    return None


def _discard(part: Path) -> None:
    """Forget an unfinished file; what is remembered goes last, lest it be believed of the next one's first bytes."""
    with _disk(part):
        part.unlink(missing_ok=True)
        _memory_of(part).unlink(missing_ok=True)


def _length(part: Path) -> int:
    """Bytes that are there; refuses to go on with anything but a regular file."""
    try:
        status = part.lstat()
    except OSError:
        return 0
    if not stat.S_ISREG(status.st_mode):
        raise WeightsError(f"cannot write {shown(part)}: expected a regular file there, or none")
    return status.st_size


# The cache's disk.


def _check_space(folder: Path, needed: int) -> None:
    """Better now than after ten minutes."""
    with contextlib.suppress(OSError):  # a file system that does not tell will tell later
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise WeightsError(
                f"cannot write to {shown(folder)}: {needed:,} bytes are needed and {free:,} are free; "
                "make room or set XCEPTION_CACHE to another folder"
            )


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """System errors in writing to the cache, as one line that says what helps."""
    try:
        yield
    except OSError as error:
        raise WeightsError(
            f"cannot write {shown(path)}: {reason(error)}; XCEPTION_CACHE can name another folder for downloads"
        ) from error
