"""The memory of this process, as Linux counts it (0 elsewhere), and how it is taken and given back."""

from __future__ import annotations

import contextlib
import ctypes
import sys


def resident_mb(which: str = "VmRSS") -> float:
    """Resident memory in megabytes: "VmRSS" now, "VmHWM" at its highest."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith(which + ":"):
                    return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return 0.0


def reset_peak() -> float:
    """Let the highest count from here on; returns what is resident now, or the highest so far where it stays."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as peak:
            peak.write("5")
    except OSError:
        return resident_mb("VmHWM")
    return resident_mb("VmRSS")


def give_back() -> None:
    """Give the system what this process has freed: others are measured while it waits."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def kept() -> dict[str, str]:
    """Variables for a process that trains: large pages, and freed memory kept, as `training.allocator` sets them."""
    most = str(2**31 - 1)
    return {"THP_MEM_ALLOC_ENABLE": "1", "MALLOC_TRIM_THRESHOLD_": most, "MALLOC_MMAP_THRESHOLD_": most}
