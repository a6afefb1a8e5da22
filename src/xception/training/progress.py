"""What a run tells while it goes: a bar on a terminal, a line an epoch elsewhere, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from xception.errors import ConfigError


class Reporter:
    """Says what happens on standard error; a progress bar with images/s and time left where that is a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = 0.0
        self._images = 0

    def say(self, line: str) -> None:
        """One line for people; never interpreted as markup, since it may hold a file's name."""
        self.console.print(line.encode("utf-8", "backslashreplace").decode(), markup=False)

    def begin(self, title: str, batches: int, done: int = 0) -> None:
        """Start the bar of an epoch or an evaluation that takes `batches` steps."""
        self.end()
        self._started, self._images = time.monotonic(), 0
        if not self.console.is_terminal:
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

    def advance(self, images: int, note: str = "") -> None:
        """One batch of `images` images is done."""
        self._images += images
        if self._bar is not None:
            rate = self._images / max(time.monotonic() - self._started, 1e-9)
            self._bar.update(self._task, advance=1, rate=f"{rate:,.0f} images/s {note}")

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
    """``metrics.jsonl``: one JSON object an epoch, cut back to `lines` lines where a run is resumed."""

    def __init__(self, path: Path, lines: int) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        kept = b""
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True)[:lines]:
                self.records.append(json.loads(line))
                kept += line
        path.write_bytes(kept)

    def append(self, record: Mapping[str, Any]) -> int:
        """Write one record through to the disk; returns the number of lines."""
        self.records.append(dict(record))
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        return len(self.records)


class TensorBoard:
    """The same figures as TensorBoard events, where it is asked for (extra `track`)."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("TensorBoard is not installed: pip install 'xception[track]'") from None
        self._writer: Any = SummaryWriter(str(folder))

    def append(self, record: Mapping[str, Any]) -> None:
        """One point for every figure of the epoch."""
        for name, value in record.items():
            if name != "epoch" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()
