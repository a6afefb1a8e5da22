"""How this process takes memory while it trains on a CPU: large pages, and freed memory kept for the next step.

A training step allocates and frees the same gigabyte of activations each time. Left alone, the C library gives what
was freed back to the system, which then clears every 4 KB page anew: 25,000 page faults a step of `xception_small`
at batch 128. With what is set here it is under a hundred, and the step a quarter faster (docs/log.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's parameters, <malloc.h>
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """For a process that trains and then ends; to be called before torch allocates anything.

    It changes no result. Where the C library is not glibc, or somebody set these things already, nothing is done.
    """
    if not sys.platform.startswith("linux") or any(
        name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    ):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch then asks for large pages (c10/core/impl/alloc_cpu.cpp)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - another C library has none, and other parameters
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)
        libc.mallopt(_MMAP_THRESHOLD, _NEVER)
