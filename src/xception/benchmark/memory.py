"""The memory of this process, as Linux counts it; 0 elsewhere."""

from __future__ import annotations


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
