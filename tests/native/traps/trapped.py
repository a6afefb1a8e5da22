"""A plugin of pytest: AMX's tiles, and AVX-512 FP16, executed by `traps.cpp` where the processor has none.

XCEPTION_TRAPS is the library, XCEPTION_TRAPS_HALF says whether half precision arithmetic is there too (Sapphire Rapids
and later have both), XCEPTION_TRAPS_COUNTS a file that gets the number of instructions executed, by kind.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path

import xception._native as native

KINDS = ("configure", "release", "zero", "load", "store", "bf16", "fp16", "bytes", "half")

library = ctypes.CDLL(os.environ["XCEPTION_TRAPS"])
library.traps_count.restype = ctypes.c_ulonglong
halves = os.environ["XCEPTION_TRAPS_HALF"] == "1"
native.assume_features(["amx_int8", "amx_bf16", "amx_fp16", *(["avx512_fp16"] if halves else [])])


def pytest_sessionstart() -> None:
    """Only now, since pytest's faulthandler has taken the signal while it was configured."""
    if library.traps_install(int(halves)) != 0:
        raise OSError("the handler of SIGILL was not taken")


def pytest_unconfigure() -> None:
    counts = {name: library.traps_count(kind) for kind, name in enumerate(KINDS)}
    Path(os.environ["XCEPTION_TRAPS_COUNTS"]).write_text(json.dumps(counts))
