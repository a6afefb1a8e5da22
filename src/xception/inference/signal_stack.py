"""Keeping a thread's signal stack from a library that leaves a freed one behind.

OpenVINO (2026.4) gives the thread that loads its CPU plugin an alternate signal stack, and frees that memory with the
plugin while the thread still has it. Python's handlers run on the alternate stack, so the next Ctrl-C would end the
process with a segmentation fault.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """`stack_t` of sigaltstack(2), as Linux has it."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Give the thread the alternate signal stack back at the end that it had at the beginning; elsewhere than on
    Linux, nothing."""
    if not sys.platform.startswith("linux"):
        yield
        return
    sigaltstack = ctypes.CDLL(None, use_errno=True).sigaltstack
    before = _Stack()
    sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        sigaltstack(ctypes.byref(before), None)
