"""A thread's alternate signal stack outlives what a library does to it."""

from __future__ import annotations

import ctypes
import sys

import pytest

from xception.inference.signal_stack import _Stack, kept_signal_stack

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone")
DISABLED = 2  # SS_DISABLE


def exchange(new: _Stack | None = None) -> _Stack:
    """The stack that the thread has; then it has `new`."""
    before = _Stack()
    given = None if new is None else ctypes.byref(new)
    assert ctypes.CDLL(None).sigaltstack(given, ctypes.byref(before)) == 0
    return before


def test_another_stack_is_taken_back() -> None:
    memory = ctypes.create_string_buffer(1 << 16)
    other = _Stack(ctypes.addressof(memory), 0, len(memory))
    before = exchange()
    with kept_signal_stack():
        exchange(other)
        assert exchange().pointer == other.pointer
    after = exchange()
    assert (after.pointer, after.flags, after.size) == (before.pointer, before.flags, before.size)


def test_an_error_passes_and_none_at_all_is_kept_too() -> None:
    mine = exchange(_Stack(None, DISABLED, 0))
    try:
        memory = ctypes.create_string_buffer(1 << 16)
        stack = _Stack(ctypes.addressof(memory), 0, len(memory))
        with pytest.raises(KeyError), kept_signal_stack():
            raise KeyError(exchange(stack))
        assert exchange().flags == DISABLED
    finally:
        exchange(mine)
