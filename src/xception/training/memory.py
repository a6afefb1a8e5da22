"""Memory as the system counts it: the most that this process held, which a dry run measures, and what there is."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def forget_peak(device: torch.device) -> None:
    """Begin a new measurement, where the system can do that (Linux, CUDA); elsewhere the peak only grows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _RESET.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The highest use since `forget_peak`: of the GPU, or of the whole process with Python and libraries."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine_bytes() -> int:
    """The memory of this machine, or what its container may use of it; always the same, however much is in use."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
        return min(installed, int(_CONTAINER_LIMIT.read_text()))
    return installed
