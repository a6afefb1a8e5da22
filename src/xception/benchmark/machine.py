"""The machine and the software that a result was measured with."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from xception._version import __version__
from xception.ops import backend

PACKAGES = (
    "torch", "timm", "keras", "tensorflow", "onnx", "onnxruntime", "openvino", "torchao", "numpy"
)  # fmt: skip


def usable_cores() -> int:
    """The processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(threads: int) -> dict[str, Any]:
    """CPU, instruction sets, versions, commit and date, as plain values."""
    return {
        "cpu": backend.cpu_name(),
        "features": list(backend.cpu_features()),
        "max_isa": os.environ.get(backend.CAP_VARIABLE),
        "cores": usable_cores(),
        "threads": threads,
        "system_name": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"xception": __version__, **_versions()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _versions() -> dict[str, str | None]:
    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: found(package) for package in PACKAGES}


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with "-dirty" where files differ from it; else None."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
