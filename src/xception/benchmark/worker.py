"""A process for one system: ``python -m xception.benchmark.worker``, which reads orders as JSON lines and answers them.

Orders: ``load`` (a case and the folder of its network) imports the system's packages, loads the network and compares
its logits; ``time`` (seconds) runs it. Standard output is kept for the answers; what libraries print goes to standard
error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from statistics import fmean, median
from typing import Any

from xception.benchmark.case import Case, Loaded, Unsupported
from xception.benchmark.memory import give_back, reset_peak, resident_mb

MAX_CALLS = 100_000


def load(order: dict[str, Any]) -> tuple[dict[str, Any], Loaded]:
    """The answer to ``load``, and what was loaded."""
    import numpy as np

    from xception.benchmark.systems import systems_for

    case = Case(**order["case"])
    system = systems_for(case.mode)[case.system]
    for name in system.needs:
        import_module(name)
    if system.files:
        import_module("xception.benchmark.networks")
    base = reset_peak()
    folder = Path(order["folder"])
    training = case.mode == "training"
    images: Any = np.zeros((1, 1, 1, 1), np.float32)
    if system.files:
        images = np.load(folder / ("pixels.npy" if training else "images.npy"))[: case.batch]
    loaded = system.load(case, folder, images)
    answer: dict[str, Any] = {"base_mb": base}
    result = loaded.call()
    if loaded.logits is not None and training:
        answer["logit_error"] = largest_error(loaded.logits(result), np.load(folder / "steps.npy"))
    elif loaded.logits is not None:
        expected = np.load(folder / "expected.npy")[: case.batch].astype(np.float64)
        answer["logit_error"] = relative_error(loaded.logits(result), expected)
    give_back()  # a dozen networks in training wait side by side: what their first steps took is gigabytes
    return answer, loaded


def relative_error(found: Any, expected: Any) -> float:
    """|found - expected| / |expected|, Euclidean; infinity where shapes differ or numbers are not finite."""
    import numpy as np

    if np.shape(found) != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def largest_error(found: Any, expected: Any) -> float:
    """The largest |found - expected| / |expected| of several numbers; infinity as in `relative_error`."""
    import numpy as np

    if np.shape(found) != expected.shape:
        return float("inf")
    return max(relative_error(f, e) for f, e in zip(np.asarray(found, np.float64), expected, strict=True))


def run(loaded: Loaded, seconds: float, typical: bool) -> float:
    """Images a second: one call that is not counted, then calls for `seconds`, at least one.

    `typical` takes the median call, as latency is told; else the mean, which is what throughput is.
    """
    if loaded.rate is not None:
        return loaded.rate(seconds)
    loaded.call()
    taken: list[float] = []
    while sum(taken) < seconds and len(taken) < MAX_CALLS:
        began = time.perf_counter()
        loaded.call()
        taken.append(time.perf_counter() - began)
    return loaded.images / (median(taken) if typical else fmean(taken))


def main() -> None:
    """Answer orders until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    loaded: Loaded | None = None
    base = 0.0
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any]
        try:
            if order["do"] == "load":
                answer, loaded = load(order)
                base = answer["base_mb"]
            else:
                assert loaded is not None
                answer = {"rate": run(loaded, order["seconds"], order["typical"])}
                answer["peak_memory_mb"] = resident_mb("VmHWM") - base
                if loaded.shares is not None:
                    answer["shares"] = dict(loaded.shares())
        except Unsupported as error:
            answer = {"unsupported": str(error)}
        except Exception as error:  # an engine raises anything
            lines = [text.strip() for text in str(error).splitlines() if text.strip()]
            answer = {"error": f"{type(error).__name__}: {(lines or ['no message'])[0][:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
