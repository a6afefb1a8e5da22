"""What a run tells while it goes: a bar on a terminal, plain lines elsewhere, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from xception.errors import MissingPackageError, TrainingError
from xception.weights.files import atomic_write, reason, shown

LINE_SECONDS = 30.0
"""Between two lines that tell how far an epoch is, where no bar does."""


class Reporter:
    """Says what happens on standard error.

    A progress bar with images/s and time left where that is a terminal; a plain line with them now and then elsewhere.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._title = ""
        self._batches = self._batches_before = self._batches_done = 0
        self._all_images: int | None = None
        self._images = 0
        self._started = self._last_line = 0.0

    def say(self, line: str) -> None:
        """One line for people; never interpreted as markup, since it may hold a file's name."""
        self.console.print(line.encode("utf-8", "backslashreplace").decode(), markup=False)

    def begin(self, title: str, batches: int, done: int = 0, *, images: int | None = None) -> None:
        """Start the bar of an epoch or an evaluation: `batches` steps, `done` of them before, `images` in them all."""
        self.end()
        self._title, self._batches, self._all_images = title, batches, images
        self._batches_before = self._batches_done = done
        self._images = 0
        self._started = self._last_line = time.monotonic()
        # What sets FORCE_COLOR wants colours, not a log full of bars.
        if not (self.console.is_terminal and not self.console.is_dumb_terminal and self.console.file.isatty()):
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(title, total=batches, completed=done, rate="")

    def advance(self, images: int, note: str = "", batches: int = 1) -> None:
        """`batches` batches, of `images` images together, are done."""
        self._images += images
        self._batches_done += batches
        now = time.monotonic()
        speed = self._images / max(now - self._started, 1e-9)
        rate = f"{speed:,.0f} images/s" if speed >= 10 else f"{speed:.1f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, advance=batches, rate=f"{rate} {note}")
        elif now - self._last_line >= LINE_SECONDS and self._batches_done < self._batches:
            self._last_line = now
            each = (now - self._started) / (self._batches_done - self._batches_before)
            left = timedelta(seconds=round(each * (self._batches - self._batches_done)))
            self.say(f"{self._title}: {self._how_far()}, {rate}, {left} left")

    def _how_far(self) -> str:
        if self._all_images is None:
            return f"{self._batches_done:,} of {self._batches:,} batches"
        before = self._all_images * self._batches_before // self._batches
        return f"{before + self._images:,} of {self._all_images:,} images"

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class MetricsLog:
    """``metrics.jsonl``: one JSON object an epoch.

    The file is written anew from `written`, the log as the checkpoint has it: lines of epochs that a killed run did
    not finish go, and a file that was damaged or deleted comes back.
    """

    def __init__(self, path: Path, written: bytes = b"") -> None:
        self.path = path
        self.written = written
        self.records: list[dict[str, Any]] = [json.loads(line) for line in written.splitlines()]

        def write(stream: BinaryIO) -> None:
            stream.write(written)

        atomic_write(path, write)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record; on the disk when this returns. Raises `TrainingError` where it cannot be written."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode("ascii")
        try:
            with self.path.open("ab") as stream:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise TrainingError(f"cannot write {shown(self.path)}: {reason(error)}") from error
        self.records.append(dict(record))
        self.written += line


class TensorBoard:
    """The same figures as TensorBoard events, where it is asked for (extra `track`)."""

    def __init__(self, folder: Path, *, first_epoch: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingPackageError("TensorBoard is not installed: pip install 'xception[track]'") from None
        try:
            # What a killed run told of epochs that are now trained again is to be forgotten.
            self._writer: Any = SummaryWriter(str(folder), purge_step=first_epoch)
        except OSError as error:
            raise TrainingError(f"cannot write {shown(folder)}: {reason(error)}") from error

    def append(self, record: Mapping[str, Any]) -> None:
        """One point for every figure of the epoch."""
        for name, value in record.items():
            if name != "epoch" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()
