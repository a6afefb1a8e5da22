"""PyTorch's OpenMP runtime, for kernels of our own that run between PyTorch's.

Its idle threads spin for some milliseconds in expectation of work. A second pool of threads on the same cores would
have to share them with the spinning ones, on both sides: training small images lost a third of its speed to that.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

NONE = (0, 0, 0)
_PROCESS = os.getpid()


def torch_openmp() -> tuple[int, int, int]:
    """The addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads in the runtime that torch has loaded.

    Zeros where torch runs on another one, or on none; and in a forked process, where the runtime's threads are not.
    """
    return _find() if os.getpid() == _PROCESS else NONE


@lru_cache(maxsize=1)
def _find() -> tuple[int, int, int]:
    if not sys.platform.startswith("linux"):
        return NONE
    import torch

    near = (Path(torch.__file__).parent, Path(torch.__file__).parent.parent / "torch.libs")
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    ours = sorted(path for path in loaded if any(folder in Path(path).parents for folder in near))
    if len(ours) != 1:  # two would be two runtimes
        return NONE
    library = ctypes.CDLL(ours[0])  # loaded already: this is a handle
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:
        first, second, third = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names)
    except AttributeError:
        return NONE
    return first, second, third
