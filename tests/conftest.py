"""What holds for every test.

One thread a process, subprocesses included: the suite runs in two processes (pytest-xdist), and two OpenMP teams on two
cores wait for each other at every layer. Hypothesis measures no time, since machines differ and are shared.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import settings  # torch reads the variable when it is first imported

settings.register_profile("xception", deadline=None)
settings.load_profile("xception")
