"""A fresh interpreter for what is decided once a process: the environment, the import, the notice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_python() -> RunPython:
    """`run_python(code, NAME=value, ...)` runs the code with these environment variables changed."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name != "XCEPTION_MAX_ISA"}
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=clean | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run
