"""Memory that is kept: no page faults from step to step, and the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

_CHILD = """
import json, resource, sys
from xception.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
import torch
torch.manual_seed(0)
layer = torch.nn.Conv2d(8, 64, 3, padding=1)
images = torch.randn(32, 8, 64, 64)

def step():
    layer.zero_grad(set_to_none=True)
    layer(images).relu().square().mean().backward()

for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(json.dumps({"faults": after - before, "gradient": layer.weight.grad.flatten().tolist()}))
"""


def _run(mode: str, **environment: str) -> dict[str, Any]:
    unset = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", _CHILD, mode]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc's allocator has these settings")
def test_steps_cause_no_page_faults_and_the_same_gradients() -> None:
    plain, kept = _run("leave"), _run("keep")
    assert plain["faults"] > 10_000  # else there would be nothing to gain
    assert kept["faults"] < plain["faults"] / 10
    assert kept["gradient"] == plain["gradient"]


def test_what_somebody_set_stays() -> None:
    assert _run("keep", MALLOC_MMAP_THRESHOLD_="65536")["faults"] > 10_000
