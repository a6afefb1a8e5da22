"""A system in a process of its own, as the benchmark drives it (`worker.py` is the other end).

A fresh process for each keeps memory apart, lets thread counts be set before anything is imported, and survives a
system that crashes. Processes that wait take no processor time: they block on their input.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from xception.benchmark.case import Case, Part

LOAD_SECONDS = 900.0  # compiling the largest network takes minutes
VISIT_SECONDS = 300.0


class Failed(Exception):
    """A system that does not run; the message is one line."""


class LeftOut(Exception):
    """A system that this machine or this release cannot run, which is no failure; the message is one line."""


@dataclass(frozen=True)
class Visit:
    """Images a second of one visit, and the process's memory so far above that of its imports.

    `shares`: part of a training step -> share of the time, where the system can tell.
    """

    rate: float
    peak_memory_mb: float
    shares: Mapping[Part, float] = field(default_factory=dict)


class Session(Protocol):
    """A loaded system."""

    logit_error: float | None

    def visit(self, seconds: float) -> Visit:
        """Run it for about `seconds`. Raises `Failed`."""
        ...

    def close(self) -> None:
        """Give back what it holds; may be called twice."""
        ...


class Process:
    """A `Session` in a child process. The constructor raises `Failed` and `LeftOut`."""

    def __init__(self, case: Case, folder: Path, environment: dict[str, str]) -> None:
        self.logit_error: float | None = None
        self._typical = case.mode == "latency"
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        threads = {name: str(case.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "xception.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **threads, **environment},
        )
        try:
            answer = self._ask({"do": "load", "case": case.to_dict(), "folder": str(folder)}, LOAD_SECONDS)
        except BaseException:
            self.close()
            raise
        self.logit_error = answer.get("logit_error")

    def visit(self, seconds: float) -> Visit:
        answer = self._ask({"do": "time", "seconds": seconds, "typical": self._typical}, VISIT_SECONDS)
        return Visit(rate=answer["rate"], peak_memory_mb=answer["peak_memory_mb"], shares=answer.get("shares", {}))

    def close(self) -> None:
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._said):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # an order that was never read
                    stream.close()

    def _ask(self, order: dict[str, Any], seconds: float) -> dict[str, Any]:
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(order).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._end()) from None
        answer: dict[str, Any] = json.loads(self._line(time.monotonic() + seconds, seconds))
        if "unsupported" in answer:
            raise LeftOut(answer["unsupported"])
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _line(self, deadline: float, seconds: float) -> bytes:
        assert self._child.stdout is not None
        found = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                if not selector.select(deadline - time.monotonic()):
                    raise Failed(f"no answer within {seconds:.0f} s")
                piece = os.read(self._child.stdout.fileno(), 1 << 16)
                if not piece:
                    raise Failed(self._end())
                found += piece
        return found

    def _end(self) -> str:
        """How the process ended: its signal or status, and the last it said."""
        status = self._child.wait()
        how = f"stopped by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        self._said.seek(0)
        lines = [line.strip() for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        return f"its process {how}" + (f": {lines[-1][:300]}" if lines else "")
