"""Which kernels this machine can run, each with the type of activations it has."""

from __future__ import annotations

import xception._native as native
from xception.ops import backend


def kernel_levels() -> list[tuple[str, str]]:
    """Every (level, type) that the compiled extension accepts here; AMX by its emulation too."""
    features = set(backend.detected_features())
    found = [("scalar", kind) for kind in ("fp32", "bf16", "fp16")]
    for level in ("avx2", "avx512"):
        if level in features:
            found += [(level, kind) for kind in ("fp32", "bf16", "fp16")]
    found += [
        (level, kind)
        for level, kind, feature in (
            ("avx512_bf16", "bf16", "avx512_bf16"),
            ("avx512_fp16", "bf16", "avx512_fp16"),
            ("avx512_fp16", "fp16", "avx512_fp16"),
            ("avx512_fp16_emulated", "bf16", "avx512"),
            ("avx512_fp16_emulated", "fp16", "avx512"),
            ("amx_emulated", "fp32", "avx512"),
            ("amx_emulated", "bf16", "avx512"),
            ("amx_emulated", "fp16", "avx512"),
            ("amx_half_emulated", "bf16", "avx512"),
            ("amx_half_emulated", "fp16", "avx512"),
            ("amx_bf16", "fp32", "amx_bf16"),
            ("amx_bf16", "bf16", "amx_bf16"),
            ("amx_fp16", "fp16", "amx_fp16"),
        )
        if feature in features
    ]
    return found


LEVELS = kernel_levels()

# What rounding activations and weights to a type may change, of the largest result, in one layer.
TOLERANCE = {"fp32": 2e-6, "bf16": 1.2e-2, "fp16": 1.5e-3}


def network(level: str, kind: str, channels: int, threads: int = 1, latency: bool = False) -> native.Network:
    """An empty network for these kernels."""
    return native.Network(level, kind, channels, native.Crews(threads), latency=latency)
