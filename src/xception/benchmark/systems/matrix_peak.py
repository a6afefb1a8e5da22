"""The machine itself: torch's product of two square matrices, whose speed stands for the limit of the matrix units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from xception.benchmark.case import Case, Loaded, System, Unsupported, Variant

SIDE = 2048
OPERATIONS = 2 * SIDE**3
"""Multiplications and additions in one product; its rate is given in products a second, as if one were an image."""


def load(case: Case, folder: Path, images: NDArray[Any]) -> Loaded:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.precision]
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise Unsupported("oneDNN has no fp16 on this machine")
    torch.set_num_threads(case.threads)
    left, right = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    product = torch.empty(SIDE, SIDE, dtype=dtype)
    return Loaded(call=lambda: torch.mm(left, right, out=product), logits=None, images=1)


SYSTEM = System(
    name="machine",
    needs=("torch",),
    files=(),
    variants=tuple(
        Variant(name="matrix product", precision=p, modes=("throughput",)) for p in ("fp32", "bf16", "fp16")
    ),
    load=load,
)
